"""The batch-size experiment: quadratics, sweeps, noise along a run, claims that can fail."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxkit_experiments.experiment import Context, Results
from jaxkit_experiments.optim import batch_size
from jaxkit_experiments.optim.batch_size import BatchSize, BatchSizeConfig, Examples

from tests.experiments.smoke import smoke_run

CPU, SMOKE = BatchSize.presets["cpu"], BatchSize.presets["smoke"]
TINY = dataclasses.replace(SMOKE, hidden=3, noise_size=8, target=1e-9)


def tiny_data():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((20, 4)), jnp.float32)
    return Examples(x, jnp.asarray(rng.integers(0, 3, 20), jnp.int32), 3)


@pytest.mark.x32
@pytest.mark.parametrize("kind", ["sgd", "sign"])
def test_the_best_of_the_grid_is_near_the_law(kind):
    from jaxkit.theory import optimal_lr_quadratic

    law = optimal_lr_quadratic(*batch_size.quadratic(CPU, 0), 64, kind)
    rate, decrease = batch_size.best_of_grid(CPU, 0, kind, 64)
    assert rate == pytest.approx(float(law.lr), rel=0.03)
    assert decrease == pytest.approx(float(law.decrease), rel=0.03)


@pytest.mark.x32
def test_steps_are_counted_as_by_a_plain_loop():
    config = dataclasses.replace(TINY, seeds=(3,), rates=(0.5, 2.0))
    data = tiny_data()
    batches = np.random.default_rng((3, 4)).integers(20, size=(20, 4), dtype=np.int32)
    losses = {}

    @jax.jit
    def step(params, rows, rate):
        grads = jax.grad(batch_size.loss)(params, data.x[rows], data.y[rows])
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        return params, batch_size.loss(params, data.x, data.y)

    for rate in config.rates:
        params = batch_size.network(jax.random.key(3), 4, 3, 3)
        for t in range(20):
            params, value = step(params, batches[t], rate)
            losses[rate, t + 1] = float(value)
    looked_at = [losses[rate, t] for rate in config.rates for t in (5, 10, 15, 20)]
    target = sorted(looked_at)[2] + 1e-4
    config = dataclasses.replace(config, target=target)
    found = batch_size.steps_to_target(config, data, "sgd", 4, 20)
    for rate, steps in zip(config.rates, found[0], strict=True):
        arrived = [t for t in (5, 10, 15, 20) if losses[rate, t] <= target]
        assert steps == (arrived[0] if arrived else math.inf)
    assert np.isfinite(found).any()


@pytest.mark.x32
def test_noise_along_a_run():
    config = dataclasses.replace(TINY, noise_steps=(0, 4), seeds=(5,))
    data = tiny_data()
    seen = batch_size.noise_along(config, data)
    assert set(seen) == {0, 4}
    params = batch_size.network(jax.random.key(5), 4, 3, 3)
    slope = lambda x, y: jax.grad(batch_size.loss)(params, x[None], y[None])
    grads = jax.jit(jax.vmap(slope))(data.x, data.y)
    each = np.concatenate([leaf.reshape(20, -1) for leaf in jax.tree.leaves(grads)], axis=1)
    exact = np.var(each, axis=0).sum() / np.sum(np.mean(each, axis=0) ** 2)
    assert seen[0]["exact"][0] == pytest.approx(exact, rel=1e-4)
    assert math.isnan(seen[0]["online"][0])  # nothing seen yet
    assert seen[4]["loss"][0] < seen[0]["loss"][0]


def test_own_data(tmp_path):
    np.savez(tmp_path / "own.npz", features=np.ones((4, 2)), labels=np.array([0, 1, 2, 1]))
    own = batch_size.load(tmp_path / "own.npz")
    assert (own.x.shape, own.classes) == ((4, 2), 3)
    assert batch_size.load(None).x.shape == (1797, 64)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    ctx, _, arms = smoke_run(BatchSize(), tmp_path_factory.mktemp("run"), SMOKE)
    return ctx, arms


@pytest.mark.slow
def test_smoke_preset_end_to_end(smoke):
    ctx, arms = smoke
    results = Results(SMOKE, arms)
    for of in arms.values():
        assert all(len(values) == len(SMOKE.seeds) for values in of.values())
    assert results.mean("quadratic-sgd", "worst_lr_error") < 0.2
    assert results.mean("digits-sgd", "steps[4]") > results.mean("digits-sgd", "steps[64]")
    assert results.mean("digits-sgd", "B_crit") == pytest.approx(
        results.mean("digits-sgd", "E_min") / results.mean("digits-sgd", "S_min"), rel=1e-4
    )
    paths = BatchSize().plot(results, ctx)
    assert [path.name for path in paths] == ["rates.png", "steps.png", "noise.png"]
    assert all(path.stat().st_size > 5000 for path in paths)
    assert "digits-sgd, by batch size: 4:" in BatchSize().epilogue(results, ctx)
    assert {claim.judge(results).status for claim in BatchSize.claims} == {"not testable"}


@pytest.mark.slow
@pytest.mark.x32
def test_sizes_that_never_arrive_are_left_out():
    config = dataclasses.replace(SMOKE, caps=(5, 40, 20), target=1.2, rates=(1e-6, 1.0))
    of = BatchSize._sweep(config, "sgd", batch_size.load(None), Context(None, writes=False))
    assert np.isnan(of["steps[4]"]).all()
    assert np.isnan(of["lr[4]"]).all()
    results = Results(config, {"digits-sgd": of})
    assert "4: not reached" in BatchSize().epilogue(results, None)


def card_results():
    """What the card measured: its sweep, its noise scales, laws within a percent."""
    config = BatchSize.presets["card"]
    steps = dict(zip(config.sizes, (560, 365, 170, 110, 65, 45, 40, 40, 40, 35), strict=True))
    rates = dict(zip(config.sizes, (0.125, 0.125, 0.5, 0.5, 1, 1, 1, 1, 1, 1), strict=True))
    noise = dict(zip(config.noise_steps, (39, 43, 44, 99, 87, 138, 287), strict=True))
    three = lambda value: [float(value)] * 3
    arms = {arm: {} for arm in batch_size.ARMS}
    for arm in batch_size.QUADRATIC:
        arms[arm] = {"worst_lr_error": three(0.01), "worst_decrease_error": three(0.01)}
    for B in config.quadratic_sizes:
        arms["quadratic-sgd"][f"lr[{B}]"] = three(1 / (1 + 20 / B))
        arms["quadratic-sign"][f"lr[{B}]"] = three(0.2 / (math.sqrt(64 / B) + math.sqrt(B / 64)))
    for B in config.sizes:
        arms["digits-sgd"] |= {f"steps[{B}]": three(steps[B]), f"lr[{B}]": three(rates[B])}
    arms["digits-sgd"] |= {"S_min": three(33.8), "E_min": three(565), "B_crit": three(16.7)}
    for t, scale in noise.items():
        arms["digits-noise"] |= {f"exact[{t}]": three(scale), f"online[{t}]": three(1.2 * scale)}
    arms["digits-noise"]["B_simple"] = three(50)
    return config, arms


def judge(config, arms):
    return [claim.judge(Results(config, arms)).status for claim in BatchSize.claims]


def test_claims_hold_on_the_cards_numbers():
    assert judge(*card_results()) == ["held"] * 9


@pytest.mark.parametrize(
    ("index", "arm", "metric", "value"),
    [
        (0, "quadratic-sgd", "worst_lr_error", 0.06),
        (0, "quadratic-sgd", "worst_decrease_error", 0.06),
        (1, "quadratic-sign", "worst_lr_error", 0.04),
        (2, "quadratic-sign", "lr[4096]", 0.2),
        (2, "quadratic-sgd", "lr[1]", 2.0),
        (3, "digits-sgd", "steps[64]", 60),
        (3, "digits-sgd", "steps[512]", 300),
        (4, "digits-noise", "B_simple", 100),
        (5, "digits-sgd", "lr[512]", 0.125),
        (5, "digits-sgd", "lr[512]", 64.0),
        (6, "digits-noise", "exact[400]", 70),
        (7, "digits-noise", "online[400]", 1000),
        (7, "digits-noise", "online[400]", 50),
        (8, "digits-sgd", "E_min", 1000),
    ],
)
def test_each_claim_fails_on_another_number(index, arm, metric, value):
    config, arms = card_results()
    arms[arm][metric] = [float(value)] * 3
    assert judge(config, arms)[index] == "not held"


def test_missing_arms_are_not_testable():
    config, arms = card_results()
    only = {"quadratic-sgd": arms["quadratic-sgd"]}
    assert judge(config, only) == ["held", *["not testable"] * 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("digits-lion",)}, "arms must be one of"),
        ({"sizes": (4, 1, 16)}, "sizes must be growing"),
        ({"sizes": (1, 4)}, "caps must have one entry"),
        ({"rates": ()}, "rates must be growing"),
        ({"noise_size": 6}, "noise_size must be a multiple of 4"),
        ({"noise_steps": (10, 0)}, "noise_steps must be growing"),
        ({"trials": 0}, "trials"),
        ({"target": 0.0}, "target"),
        ({"correlation": 1.5}, "correlation"),
        ({"seeds": ()}, "seeds"),
    ],
)
def test_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CPU, **change)


def test_presets_are_the_cards():
    assert isinstance(CPU, BatchSizeConfig)
    assert (CPU.sizes, CPU.caps) == ((1, 4, 16, 64, 256), (1200, 400, 200, 100, 100))
    assert (CPU.rates[0], CPU.rates[-1], CPU.target) == (2**-4, 2, 0.3)
    card = BatchSize.presets["card"]
    assert (card.rates[0], card.rates[-1], card.sizes[-1]) == (2**-8, 2**3, 512)
