"""Optimizers on bytes: equal grids, one decay, trials as by a plain loop, selection, claims."""

import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxkit_experiments.experiment import Context, Results
from jaxkit_experiments.optim import language_model as olm
from jaxkit_experiments.optim.language_model import OptimizerComparison, Sweep
from jaxkit_experiments.vq.language_model import build_model
from jaxkit_experiments.vq.text import Windows, held_out, read_corpus

from jaxkit.attention.vq import next_token_loss
from tests.experiments.smoke import smoke_run
from tests.settings import users_settings

CPU, SMOKE = OptimizerComparison.presets["cpu"], OptimizerComparison.presets["smoke"]
BYTES = {"tiger": (4, 4), "lion": (4, 8), "adamw": (8, 12), "lamb": (8, 12)}


def test_every_optimizer_has_the_same_budget():
    for config in OptimizerComparison.presets.values():
        for arm in olm.ARMS:
            rates = np.array(config.rates(arm))
            assert len(rates) == config.points
            np.testing.assert_allclose(rates[1:] / rates[:-1], config.factor)
            middle = math.exp(np.log(rates).mean())
            assert middle == pytest.approx(config.scale * olm.CENTRES[arm])


PARAMS = {
    "kernel": jnp.array([[0.5, -0.25], [0.125, 1.0]], jnp.float32),
    "bias": jnp.array([0.5, 2.0], jnp.float32),
    "u": jnp.array([[3.0, 1.0]], jnp.float32),
}


@pytest.mark.x32
@pytest.mark.parametrize("arm", olm.ARMS)
def test_decay_is_of_matrices_and_the_same_at_every_rate(arm):
    config = dataclasses.replace(CPU, weight_decay=0.25, steps=300, warmup=2)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)

    @jax.jit
    def update(rate, state):
        return olm.full_optimizer(config, arm, rate).update(zeros, state, PARAMS)

    for rate in (1e-3, 0.1):
        with users_settings():
            state = olm.full_optimizer(config, arm, rate).init(PARAMS)
            for shape in (0.0, 0.5, 1.0):  # the warm-up
                updates, state = update(rate, state)
                np.testing.assert_allclose(
                    updates["kernel"], -0.25 * shape * PARAMS["kernel"], rtol=1e-6
                )
                assert not updates["bias"].any()
                assert not updates["u"].any()


@pytest.mark.x32
def test_first_steps_are_each_optimizers_own():
    config = dataclasses.replace(CPU, weight_decay=0.0, warmup=1, clip=1e9)
    grads = jax.tree.map(lambda p: 100.0 * (p - 0.3), PARAMS)
    size = lambda x: float(jnp.sqrt(jnp.mean(x**2)))
    sign = {name: np.sign(g) for name, g in grads.items()}
    wanted = {
        # of the size of the matrix itself, half the rate for vectors
        "tiger": {"kernel": size(PARAMS["kernel"]), "bias": 0.5, "u": 0.5},
        "lion": {"kernel": 1.0, "bias": 1.0, "u": 1.0},
        "adamw": {"kernel": 1.0, "bias": 1.0, "u": 1.0},
        "lamb": {name: size(p) for name, p in PARAMS.items()},
    }
    for arm, of in wanted.items():
        with users_settings():
            optimizer = olm.full_optimizer(config, arm, 0.01)
            state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
            for _ in range(2):  # the first has a rate of 0
                updates, state = update(grads, state, PARAMS)
        for name, scale in of.items():
            np.testing.assert_allclose(updates[name], -0.01 * scale * sign[name], rtol=1e-4)


@pytest.mark.x32
@pytest.mark.parametrize("arm", olm.ARMS)
def test_second_step_has_the_betas_of_language_models(arm):
    theta = np.array([[0.5, -0.25], [0.125, 1.0]])
    first = np.array([[1.0, -2.0], [3.0, 4.0]])
    # A sign turns where the second gradient outweighs what is left of the first.
    second = -first * np.array([[0.375, 0.385], [0.96, 0.97]])
    m, v = 0.1 * (0.9 * first + second), 0.01 * (0.99 * first**2 + second**2)
    adam = (m / (1 - 0.9**2)) / np.sqrt(v / (1 - 0.99**2))
    norm = np.linalg.norm
    wanted = {
        "tiger": norm(theta) / 2 * np.sign(0.965 * first + second),
        "lion": np.sign(0.95 * 0.02 * first + 0.05 * second),
        "adamw": adam,
        "lamb": norm(theta) / norm(adam) * adam,
    }[arm]
    params = {"kernel": jnp.asarray(theta, jnp.float32)}
    with users_settings():
        optimizer = olm.make_optimizer(arm, 0.01)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for gradient in (first, second):
            updates, state = update({"kernel": jnp.asarray(gradient)}, state, params)
    np.testing.assert_allclose(updates["kernel"], -0.01 * wanted, rtol=1e-4)


@pytest.mark.x32
@pytest.mark.parametrize("arm", olm.ARMS)
def test_bytes_of_the_states_themselves(arm):
    params = {"kernel": jnp.ones((100, 100), jnp.float32), "bias": jnp.zeros(1, jnp.float32)}
    for accumulation, wanted in zip((1, 4), BYTES[arm], strict=True):
        with users_settings():
            state = olm.make_optimizer(arm, 1e-3, accumulation).init(params)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        assert held / 10_001 == pytest.approx(wanted, abs=0.01)


@pytest.mark.x32
@pytest.mark.parametrize("arm", olm.ARMS)
def test_accumulation_steps_once_in_a_window(arm):
    grads = jax.tree.map(lambda p: p - 0.3, PARAMS)
    with users_settings():
        optimizer = olm.make_optimizer(arm, 0.01, 2)
        state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
        moved = []
        for _ in range(4):
            updates, state = update(grads, state, PARAMS)
            moved.append(bool(updates["kernel"].any()))
    assert moved == [False, True, False, True]


def some_sweep(validation, test=None):
    validation = np.asarray(validation, float)
    test = validation if test is None else np.asarray(test, float)
    rates = np.arange(1.0, 1 + len(validation))
    return Sweep(rates, np.array([1.0]), validation[None], validation[None], test)


def test_the_best_is_chosen_on_the_validation_part_over_all_seeds():
    # By the test part it were the first, by the first seed the third.
    found = some_sweep([[3, 3], [2, 2], [1, 4]], [[0, 0], [1, 1], [2, 2]])
    assert found.best == 1
    nan = np.nan
    assert some_sweep([[3, 3], [2, 2], [1, nan]]).best == 1
    assert some_sweep([[3, 3], [2, 2], [-np.inf, -np.inf]]).best == 1


# --- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    ctx, _, arms = smoke_run(OptimizerComparison(), tmp_path_factory.mktemp("run"), SMOKE)
    return ctx, arms


@pytest.mark.slow
@pytest.mark.x32
def test_a_trial_is_a_plain_loop(smoke):
    ctx, _ = smoke
    found = olm.load(ctx, "adamw")
    corpus, seed, point = read_corpus(), SMOKE.seeds[1], 2
    model = build_model(SMOKE.model(), "full", jax.random.key(seed))
    graph, params = nnx.split(model)

    def nats(params, windows):
        return next_token_loss(nnx.merge(graph, params), windows[:, :-1], targets=windows[:, 1:])[0]

    rate = SMOKE.rates("adamw")[point]
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, SMOKE.warmup, SMOKE.steps, 0.1)
    source = Windows(corpus.train, seed, SMOKE.batch_size, SMOKE.length)
    value_and_grad = jax.jit(jax.value_and_grad(nats))
    adam, bits = optax.scale_by_adam(0.9, 0.99), []
    with users_settings():
        state = adam.init(params)
        for t in range(SMOKE.steps):
            value, grads = value_and_grad(params, source[t]["bytes"])
            bits.append(float(value) / math.log(2))
            norm = float(optax.tree.norm(grads))
            grads = jax.tree.map(lambda g, n=norm: g / max(1.0, n / SMOKE.clip), grads)
            updates, state = adam.update(grads, state)
            s = float(shape(t))
            params = jax.tree.map(
                lambda p, u, s=s: (
                    p - s * (rate * u + SMOKE.weight_decay * p * (min(p.shape) > 1 < p.ndim))
                ),
                params,
                updates,
            )
    halves = np.asarray(bits).reshape(2, -1).mean(1)
    np.testing.assert_allclose(found.training[:, point, 1], halves, rtol=2e-4)
    assert halves[1] < halves[0]
    for part, value in (("validation", found.validation[-1]), ("test", found.test)):
        held = held_out(getattr(corpus, part), SMOKE.length, count=8, batch_size=8)[0]
        assert value[point, 1] == pytest.approx(
            float(value_and_grad(params, jnp.asarray(held))[0]) / math.log(2), rel=2e-4
        )


@pytest.mark.slow
@pytest.mark.x32
def test_a_killed_run_goes_on_where_it_was(smoke, tmp_path):
    ctx, _ = smoke
    shutil.copytree(ctx.run_dir, tmp_path / "run")
    again = Context(tmp_path / "run").for_arm("tiger")
    shutil.rmtree(again.arm_dir() / "checkpoints" / "sweep" / "step_00000010")
    saved = again.history()
    with users_settings():
        resumed = olm.sweep(SMOKE, "tiger", read_corpus(), again)
    for name, value in olm.load(ctx, "tiger")._asdict().items():
        np.testing.assert_array_equal(getattr(resumed, name), value, err_msg=name)
    assert again.history() == saved
    assert [record["step"] for record in saved] == [5, 10]


@pytest.mark.slow
def test_smoke_preset_end_to_end(smoke):
    ctx, arms = smoke
    results = Results(SMOKE, arms)
    for arm in SMOKE.arms:
        found = olm.load(ctx, arm)
        assert found.test.shape == (3, 2)
        assert found.validation.shape == (2, 3, 2)
        # Seeds begin with other weights, rates with the same.
        assert len(np.unique(found.test)) == 6
        best = found.best
        assert results.mean(arm, "learning_rate") == pytest.approx(SMOKE.rates(arm)[best])
        assert arms[arm]["bits_per_byte"] == found.test[best].tolist()
        assert arms[arm]["validation"] == found.validation[-1, best].tolist()
        assert results.mean(arm, "edge") == (-1, 0, 1)[best]
        assert results.mean(arm, "state_bytes") == pytest.approx(BYTES[arm][0], abs=0.01)
        accumulated = results.mean(arm, "state_bytes_accumulated")
        assert accumulated == pytest.approx(BYTES[arm][1], abs=0.02)
    paths = OptimizerComparison().plot(results, ctx)
    assert [path.name for path in paths] == ["rates.png", "curves.png"]
    assert all(path.stat().st_size > 5000 for path in paths)
    shown = OptimizerComparison().epilogue(results, ctx)
    assert shown.count("edge") == sum(bool(results.mean(arm, "edge")) for arm in SMOKE.arms)
    assert {claim.judge(results).status for claim in OptimizerComparison.claims} == {"not testable"}


# --- claims ------------------------------------------------------------------------------------


def card_arms():
    """The posts' order, inside the grids."""
    bits = {"lion": 2.50, "tiger": 2.51, "adamw": 2.55, "lamb": 2.57}
    return {
        arm: {
            "bits_per_byte": [bits[arm] - 0.01, bits[arm] + 0.01],
            "edge": [0.0, 0.0],
            "state_bytes": [float(BYTES[arm][0])] * 2,
            "state_bytes_accumulated": [float(BYTES[arm][1])] * 2,
        }
        for arm in olm.ARMS
    }


def judge(arms, config=CPU):
    return [claim.judge(Results(config, arms)) for claim in OptimizerComparison.claims]


def test_claims_hold_on_the_posts_order():
    verdicts = judge(card_arms())
    assert [verdict.status for verdict in verdicts] == ["held"] * 4
    assert "+0.010 for lion" in verdicts[0].detail


@pytest.mark.parametrize(
    ("index", "arm", "metric", "value"),
    [
        (0, "lion", "bits_per_byte", 2.54),
        (1, "tiger", "bits_per_byte", 2.58),
        (2, "lamb", "bits_per_byte", 2.61),
        (2, "lamb", "bits_per_byte", 2.49),
        (3, "tiger", "state_bytes_accumulated", 8.0),
        (3, "adamw", "state_bytes_accumulated", 8.0),
        (3, "lamb", "state_bytes_accumulated", 16.0),
    ],
)
def test_each_claim_fails_on_another_number(index, arm, metric, value):
    arms = card_arms()
    arms[arm][metric] = [value, value]
    assert judge(arms)[index].status == "not held"


@pytest.mark.parametrize("edge", [-1.0, 1.0])
def test_nothing_is_said_of_a_best_rate_at_the_edge(edge):
    arms = card_arms()
    arms["tiger"]["edge"] = [edge, edge]
    verdicts = judge(arms)
    assert [v.status for v in verdicts] == ["not testable", "not testable", "held", "held"]
    assert "tiger is at the edge" in verdicts[0].detail


def test_what_was_not_trained_is_not_testable():
    arms = card_arms()
    short = dataclasses.replace(CPU, steps=100, warmup=10)
    assert [v.status for v in judge(arms, short)] == [*["not testable"] * 3, "held"]
    arms["lamb"]["bits_per_byte"] = [np.nan, np.nan]  # diverged at every rate
    assert [v.status for v in judge(arms)] == ["held", "held", "not testable", "held"]
    del arms["lion"]
    assert [v.status for v in judge(arms)][::3] == ["not testable", "not testable"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("sgd",)}, "arms must be one of"),
        ({"seeds": ()}, "seeds must hold"),
        ({"points": 2}, "points must be at least 3"),
        ({"factor": 1.0}, "factor must be greater than 1"),
        ({"scale": 0.0}, "scale must be greater than 0"),
        ({"steps": 301}, "steps must be a multiple of evaluate_every = 50"),
        ({"warmup": 300}, "warmup must be less than steps = 300"),
        ({"windows": 4}, "windows must be at least batch_size = 8"),
        ({"accumulation": 1}, "accumulation must be at least 2"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"dtype": "float16"}, "dtype must be one of"),
    ],
)
def test_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CPU, **change)
