"""The SGD-bound experiment: its task, its certificates, and claims that can fail."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxkit_experiments.experiment import Results
from jaxkit_experiments.optim import sgd_bound
from jaxkit_experiments.optim.sgd_bound import CARD, Examples, SGDBound, SGDBoundConfig

from jaxkit.theory import ball, bound, norm
from tests.experiments.smoke import smoke_run

CPU = SGDBound.presets["cpu"]


def test_rows_have_norm_one_at_most(tmp_path):
    data = sgd_bound.load(None)
    assert data.x.shape == (1797, 65)
    assert float(jnp.max(jnp.linalg.norm(data.x, axis=1))) == pytest.approx(1, rel=1e-6)
    np.savez(tmp_path / "own.npz", features=np.ones((4, 2)), labels=np.array([0, 1, 2, 1]))
    own = sgd_bound.load(tmp_path / "own.npz")
    np.testing.assert_allclose(own.x, 1 / math.sqrt(3), rtol=1e-6)


@pytest.mark.x32
def test_gradients_are_bounded_by_the_root_of_two():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 5))
    data = Examples(
        jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32),
        jnp.asarray(rng.integers(0, 3, 50), jnp.int32),
    )
    # A model that is sure and wrong comes close to it.
    weights = {"w": 1e3 * jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)}
    each = jax.vmap(lambda x, y: jax.grad(sgd_bound.logistic)(weights, Examples(x[None], y[None])))
    size = jax.vmap(norm)(each(data.x, data.y))
    assert 1.4 < float(size.max()) <= math.sqrt(2) * (1 + 1e-6)


def test_schedules_are_those_of_least_bound():
    for arm, factor in (("constant", 20 * math.sqrt(2)), ("inverse-sqrt", 40)):
        eta = sgd_bound.schedule(CPU, arm, 300)
        value = float(bound(jnp.asarray(eta), 300, 20.0, math.sqrt(2)))
        assert value <= factor / math.sqrt(300) * (1 + 1e-12)
        assert value == pytest.approx(CARD[300][arm][2], rel=1e-3)
        curve = sgd_bound.running_bound(eta, 20.0, math.sqrt(2))
        assert curve[-1] == pytest.approx(value, rel=1e-12)
        other = float(bound(jnp.asarray(1.1 * eta), 300, 20.0, math.sqrt(2)))
        assert other > value
    assert sgd_bound.schedule(CPU, "linear-decay", 9)[-1] > 0


@pytest.mark.x32
def test_runs_are_those_of_a_plain_loop():
    """Whatever the length of the run with which they share a compilation."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 4)), rng.integers(0, 3, 9)
    data = Examples(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))
    start, best = {"w": jnp.zeros((4, 3))}, {"w": jnp.asarray(x[:4, :3] / 9, jnp.float32)}
    task = sgd_bound.Task(data, sgd_bound.logistic, ball(0.5), start, best, 0.0, 0.0)
    eta = np.array([2.0, 1.0, 0.5])
    run = sgd_bound.follow(task, eta, batch_size=5, seeds=(7,), longest=6)

    theta, excess, key = start, [], jax.random.key(7)
    value = jax.jit(jax.value_and_grad(sgd_bound.logistic))
    for t, rate in enumerate(eta.tolist()):
        rows = jax.random.randint(jax.random.fold_in(key, t), (5,), 0, 9)
        batch = Examples(data.x[rows], data.y[rows])
        loss, grads = value(theta, batch)
        excess.append(float(loss) - float(value(best, batch)[0]))
        last, theta = theta, task.domain.project({"w": theta["w"] - rate * grads["w"]})
    np.testing.assert_allclose(run.excess[0], np.cumsum(excess), rtol=1e-5, atol=1e-6)
    assert float(run.last[0]) == pytest.approx(float(value(last, data)[0]), rel=1e-6)
    assert (int(run.regret.steps[0]), float(run.regret.eta_last[0])) == (3, 0.5)
    assert run.regret.plain_sgd.all()
    away = norm({"w": theta["w"] - best["w"]})
    assert float(run.regret.distance_next[0]) == pytest.approx(float(away), rel=1e-5)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return smoke_run(SGDBound(), tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_smoke_preset_end_to_end(smoke):
    ctx, config, arms = smoke
    results = Results(config, arms)
    for of in arms.values():
        assert all(len(values) == len(config.seeds) for values in of.values())
        assert all(np.isfinite(values).all() for values in of.values())
    for arm in sgd_bound.CONVEX:
        for T in config.steps:
            gap, limit = results.metric(arm, f"gap[{T}]"), results.metric(arm, f"bound[{T}]")
            assert (gap < results.metric(arm, f"a_posteriori[{T}]")).all()
            assert (gap < limit).all()
    assert 1.5 < results.mean("constant", "least_loss") < 1.6
    paths = SGDBound().plot(results, ctx)
    assert [path.name for path in paths] == ["bound.png"]
    assert paths[0].stat().st_size > 5000
    assert "of the bound for constant steps" in SGDBound().epilogue(results, ctx)
    certificate = ctx.history("mlp")[0]["certificate"]
    assert certificate.startswith("not certified: convexity")
    statuses = [claim.judge(results).status for claim in SGDBound.claims]
    assert statuses[:3] == ["held"] * 3
    assert statuses[-1] == "not testable"


def card_results():
    """Results as the card has them, with what it does not give filled in by its rules."""
    arms = {arm: {"least_loss": [1.51117] * 3} for arm in sgd_bound.ARMS}
    for T in CPU.steps:
        for arm in sgd_bound.ARMS:
            gap, posterior, plain = CARD[T].get(arm, (0.1, 1.0, 1000.0))
            values = {"gap": gap, "a_posteriori": posterior, "bound": plain, "max_grad": 0.36}
            values |= {"weighted": 0.1, "weighted_bound": 0.5, "last": 0.1, "last_bound": 1.0}
            values |= {"certified": arm != "mlp", "refused_convexity": arm == "mlp"}
            arms[arm] |= {f"{name}[{T}]": [float(value)] * 3 for name, value in values.items()}
    return arms


def judge(arms, config=CPU):
    return [claim.judge(Results(config, arms)).status for claim in SGDBound.claims]


def test_claims_hold_on_the_cards_numbers():
    assert judge(card_results()) == ["held"] * 7


@pytest.mark.parametrize(
    ("index", "arm", "metric", "value"),
    [
        (0, "constant", "gap[300]", 0.22),
        (0, "inverse-sqrt", "a_posteriori[3000]", 0.8),
        (1, "linear-decay", "certified[300]", 0.0),
        (2, "mlp", "certified[3000]", 1.0),
        (2, "mlp", "refused_convexity[300]", 0.0),
        (3, "inverse-sqrt", "gap[3000]", 0.061),
        (3, "constant", "bound[3000]", 0.9),
        (4, "constant", "gap[3000]", 0.068),
        (5, "linear-decay", "bound[3000]", 5.0),
        (5, "linear-decay", "last[3000]", 1.1),
        (6, "inverse-sqrt", "gap[300]", 0.04),
        (6, "constant", "least_loss", 1.52),
    ],
)
def test_each_claim_fails_on_another_number(index, arm, metric, value):
    arms = card_results()
    arms[arm][metric] = [value] * 3
    assert judge(arms)[index] == "not held"


def test_missing_arms_are_not_testable():
    arms = {"mlp": card_results()["mlp"]}
    assert judge(arms) == [*["not testable"] * 2, "held", *["not testable"] * 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("cosine",)}, "arms must be one of"),
        ({"steps": (300, 30)}, "steps must be growing"),
        ({"steps": (1,)}, "steps must be growing"),
        ({"seeds": ()}, "seeds"),
        ({"batch_size": 0}, "batch_size"),
        ({"radius": 0.0}, "radius"),
    ],
)
def test_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CPU, **change)


def test_presets_are_the_cards():
    assert isinstance(CPU, SGDBoundConfig)
    assert (CPU.steps, CPU.batch_size, CPU.radius, len(CPU.seeds)) == ((300, 3000), 16, 10.0, 3)
    assert SGDBound.presets["gpu"].steps[-1] == 1_000_000
