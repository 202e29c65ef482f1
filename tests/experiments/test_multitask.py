"""The multi-task experiments: their landscape, their runs, and claims that can fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxkit_experiments.experiment import Context, Results
from jaxkit_experiments.optim import multitask as experiment
from jaxkit_experiments.optim.multitask import STARTS, Digits, Toy, pareto_x2, toy_losses


def losses_by_hand(x1, x2):
    f1 = np.log(max(abs(0.5 * (-x1 - 7) - np.tanh(-x2)), 5e-6)) + 6
    f2 = np.log(max(abs(0.5 * (-x1 + 3) + np.tanh(-x2) + 2), 5e-6)) + 6
    q = [((-x1 + side) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20 for side in (7, -7)]
    c1, c2 = max(np.tanh(x2 / 2), 0), max(np.tanh(-x2 / 2), 0)
    return c1 * f1 + c2 * q[0], c1 * f2 + c2 * q[1]


@pytest.mark.parametrize("start", STARTS)
def test_toy_losses(start):
    want = losses_by_hand(*start)
    np.testing.assert_allclose(toy_losses(jnp.array(start)), want, rtol=1e-13)
    np.testing.assert_allclose(toy_losses(jnp.array(start), 0.1), np.array(want) * [0.1, 1])


def test_on_the_pareto_set_gradients_are_opposed():
    jacobian = jax.jit(jax.jacobian(toy_losses))
    for x1 in (-5.0, 0.0, 3.0):
        rows = np.asarray(jacobian(jnp.array([x1, pareto_x2(x1)])))
        norms = np.linalg.norm(rows, axis=1)
        assert rows[0] @ rows[1] / norms.prod() == pytest.approx(-1, abs=1e-12)
    rows = np.asarray(jacobian(jnp.array([0.0, pareto_x2(0.0) + 1])))
    assert rows[0] @ rows[1] / np.linalg.norm(rows, axis=1).prod() > -0.999


def run(cls, tmp_path, **changes):
    config = dataclasses.replace(cls.presets["smoke"], **changes)
    ctx = Context(tmp_path)
    with jax.numpy_dtype_promotion("standard"):  # optax has 0.9 to an integer's power
        arms = {arm: cls().run_arm(config, arm, ctx.for_arm(arm)) for arm in config.arms}
    return Results(config, arms), ctx


@pytest.mark.x32
def test_toy_smoke(tmp_path):
    results, ctx = run(Toy, tmp_path, steps=20, kept=5, scales=(1.0,))
    for arm in results.arms:
        kept = ctx.load_arrays(f"path-{arm}@1")
        assert kept["x"].shape == (2, 6, 2)
        np.testing.assert_array_equal(kept["x"][:, 0], np.asarray(STARTS[:2]))
        # Adam moves by at most about its learning rate a step.
        assert 0 < np.abs(np.diff(kept["x"], axis=1)).max() < 4 * 1.2e-3
        np.testing.assert_allclose(results.metric(arm, "x2@1"), kept["x"][:, -1, 1])
        assert results.mean(arm, "mean@1") == pytest.approx(kept["losses"][:, -1].mean(), rel=1e-5)
    files = Toy().plot(results, ctx)
    assert [file.name for file in files] == ["paths-1.png", "front-1.png"]
    assert all(file.stat().st_size > 5000 for file in files)
    assert {claim.judge(results).status for claim in Toy.claims} == {"not testable"}


@pytest.mark.x32
def test_digits_smoke(tmp_path):
    results, ctx = run(Digits, tmp_path)
    losses = {arm: ctx.load_arrays(f"losses-{arm}@100")["losses"] for arm in results.arms}
    for arm in results.arms:
        assert losses[arm].shape == (1, 20, 3)
        assert losses[arm][0, -5:, 0].mean() < losses[arm][0, :5, 0].mean()
        assert 0 <= results.mean(arm, "digit@1") <= 1
    # Both arms start from the same network and see the same batches.
    np.testing.assert_allclose(losses["mean"][:, 0], losses["normalized_sum"][:, 0], rtol=1e-6)
    files = Digits().plot(results, ctx)
    assert files[0].stat().st_size > 5000
    assert {claim.judge(results).status for claim in Digits.claims} == {"not testable"}


def card_ends():
    """What the card measured, by arm, for the scales 1 and 0.1."""
    down, stuck = np.full(5, -8.4), np.array([2.5, -8.4, 2.5, -8.4, -8.4])
    arms = {}
    for arm in experiment.TOY_ARMS:
        x2 = {
            "mean": stuck,
            "pcgrad": np.array([-7.6, -8.4, -7.75, -8.4, -8.4]),
            "cagrad": np.array([-5.0, -8.36, -5, -8.36, -8.36]),
        }.get(arm, down)
        x1 = np.linspace(-3, 3, 5)
        mean = np.where(x2 < -8.3, -15.09, -11.0)
        arms[arm] = {}
        for scale in (1.0, 0.1):
            arms[arm] |= {f"x1@{scale:g}": x1, f"x2@{scale:g}": x2, f"mean@{scale:g}": mean}
    arms["mean"]["x1@0.1"] = np.array([-5.73, -5.73, 8, -5.73, -5.73])
    return arms


def judge(cls, arms, config=None):
    results = Results(config or cls.presets["cpu"], arms)
    return [claim.judge(results).status for claim in cls.claims]


def test_toy_claims_hold_on_the_cards_numbers():
    assert judge(Toy, card_ends()) == ["held"] * 7


@pytest.mark.parametrize(
    ("index", "arm", "metric", "value"),
    [
        (0, "mean", "x2@1", np.full(5, -8.4)),
        (1, "nash", "x2@1", np.array([-8.4, -8.4, 2.5, -8.4, -8.4])),
        (1, "mgda", "x1@1", np.full(5, 8.0)),
        (2, "pcgrad", "x2@1", np.array([-7.6, -8.4, -7.75, -8.4, -8.2])),
        (3, "pcgrad", "x2@1", np.full(5, -8.4)),
        (4, "cagrad", "mean@1", np.full(5, -14.0)),
        (5, "normalized_sum", "x1@0.1", np.full(5, 5.0)),
        (6, "mean", "x1@0.1", np.full(5, 5.0)),
    ],
)
def test_each_toy_claim_fails_on_another_number(index, arm, metric, value):
    arms = card_ends()
    arms[arm][metric] = value
    assert judge(Toy, arms)[index] == "not held"


def test_digits_claims_can_hold_and_fail():
    good = {
        "mean": {"digit@1": [0.03], "digit@100": [0.06]},
        "normalized_sum": {"digit@1": [0.03], "digit@100": [0.031]},
        "nash": {"digit@1": [0.03], "digit@100": [0.03]},
    }
    assert judge(Digits, good) == ["held"] * 3
    bad = {
        "mean": {"digit@1": [0.03], "digit@100": [0.03]},
        "normalized_sum": {"digit@1": [0.03], "digit@100": [0.05]},
        "nash": {"digit@1": [0.03], "digit@100": [0.03]},
    }
    assert judge(Digits, bad) == ["not held"] * 3


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (Toy, {"arms": ("mdga",)}, "Did you mean 'mgda'"),
        (Toy, {"kept": 7}, "kept must divide steps"),
        (Toy, {"seeds": (5,)}, "seeds must be starts"),
        (Toy, {"scales": ()}, "scales must hold"),
        (Toy, {"learning_rate": 0.0}, "learning_rate"),
        (Digits, {"factors": (0.0,)}, "factors"),
        (Digits, {"seeds": ()}, "seeds"),
        (Digits, {"width": 0}, "width"),
        (Digits, {"arms": ("best",)}, "arms"),
    ],
)
def test_config_rejects(cls, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(cls.presets["cpu"], **change)
