"""Noise scale: the card's digits, unbiased, the same over microbatches, devices and batch sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkit.optim import check_optimizer
from jaxkit.theory import noise_scale as ns
from tests.tolerance import tol

CARD = np.array([[1.0, 0], [2, 1], [0, 1], [1, 2]])
EPS = tol(np.float64, 64)


def tree_of(n, dtype=jnp.float64, seed=0):
    """Gradients of n microbatches: a matrix, a vector of odd size, a scalar."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(1.0 + rng.standard_normal((n, *shape)), dtype)
    return {"layer": {"w": draw(5, 3), "b": draw(7)}, "t": draw()}


def mean_of(grads):
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), grads)


def by_numpy(grads, b):
    flat = np.concatenate(
        [np.asarray(x, float).reshape(len(x), -1) for x in jax.tree.leaves(grads)], 1
    )
    n = len(flat)
    S = b * np.var(flat, axis=0, ddof=1).sum()
    return (flat.mean(0) ** 2).sum() - S / (n * b), S


def close(stats, expected, eps=EPS):
    np.testing.assert_allclose([stats.g2, stats.S], expected, rtol=eps)


# --- estimators ---------------------------------------------------------------------------------


def test_two_batches_of_the_card():
    stats = ns.two_batch_stats(5.0, 2.0, 32, 256)
    close(stats, (11 / 7, 109.7142857), 1e-9)
    assert float(ns.simple_noise_scale(stats)) == pytest.approx(69.8181818, rel=1e-9)


def test_microbatches_of_the_card():
    stats = ns.noise_scale_stats(jnp.asarray(CARD), 8)
    close(stats, (5 / 3, 32 / 3))
    assert float(ns.simple_noise_scale(stats)) == pytest.approx(6.4, rel=EPS)
    small, big = np.mean((CARD**2).sum(1)), (CARD.mean(0) ** 2).sum()
    close(ns.two_batch_stats(small, big, 8, 32), (5 / 3, 32 / 3))


def test_many_estimates_of_the_card():
    """n = 8, b = 4: means of 20 000 estimates within 0.2 % of |g|² and tr Σ (here 4 sigma)."""
    rng = np.random.default_rng(0)
    g, sd, trials = np.linspace(-1, 1, 10), np.linspace(1, 3, 10), 20_000
    grads = g + sd * rng.standard_normal((trials, 8, 10)) / np.sqrt(4)
    stats = jax.jit(jax.vmap(lambda x: ns.noise_scale_stats(x, 4)))(jnp.asarray(grads))
    for values, truth in ((stats.g2, (g**2).sum()), (stats.S, (sd**2).sum())):
        error = np.std(values) / np.sqrt(trials)
        assert abs(np.mean(values) - truth) < 4 * error < 0.02 * truth
    ratio_of_means = np.mean(stats.S) / np.mean(stats.g2)
    assert ratio_of_means == pytest.approx((sd**2).sum() / (g**2).sum(), rel=0.01)
    # Clipping before averaging is a bias: some estimates of g2 are negative.
    assert np.min(stats.g2) < 0


def test_mean_of_ratios_is_biased_upward():
    """As on the card (23.0 for 21.07): few negative g2, but a ratio that is convex in g2."""
    rng = np.random.default_rng(1)
    g, sd = np.full(64, 0.5), np.full(64, np.sqrt(21.07 / 64 * 16))
    draws = g + sd * rng.standard_normal((4000, 8, 64)) / np.sqrt(4)
    stats = jax.vmap(lambda x: ns.noise_scale_stats(x, 4))(jnp.asarray(draws))
    assert np.mean(stats.S) / np.mean(stats.g2) == pytest.approx(21.07, rel=0.02)
    assert np.mean(np.asarray(stats.S) / np.asarray(stats.g2)) > 1.05 * 21.07


@pytest.mark.parametrize(("n", "b"), [(2, 1), (7, 3)])
def test_all_estimators_agree(n, b):
    grads = tree_of(n)
    expected = by_numpy(grads, b)
    close(ns.noise_scale_stats(grads, b), expected)

    moments, _ = jax.lax.scan(
        lambda m, g: (ns.add_microbatch(m, g), None), ns.init_moments(mean_of(grads)), grads
    )
    close(ns.moments_stats(moments, b), expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=EPS), moments.mean, mean_of(grads)
    )

    small = jnp.mean(jax.vmap(ns.squared_norm)(grads))
    close(ns.two_batch_stats(small, ns.squared_norm(mean_of(grads)), b, n * b), expected, 1e-11)

    over_axis = jax.vmap(lambda g: ns.noise_scale_stats(g, b, axis_name="i"), axis_name="i")(grads)
    close(jax.tree.map(lambda x: x[0], over_axis), expected)


def test_groups_add_up():
    grads = tree_of(4)
    labels = {"layer": "layer", "t": "scalar"}  # a prefix of the tree
    whole = ns.noise_scale_stats(grads, 2)
    parts = ns.noise_scale_stats(grads, 2, labels=labels)
    assert set(parts.g2) == set(parts.S) == {"layer", "scalar"}
    close(whole, (sum(parts.g2.values()), sum(parts.S.values())))
    close(ns.NoiseStats(parts.g2["scalar"], parts.S["scalar"]), by_numpy({"t": grads["t"]}, 2))
    by_axes = ns.noise_scale_stats(
        grads, 2, labels=lambda tree: jax.tree.map(lambda x: f"{x.ndim} axes", tree)
    )
    assert set(by_axes.g2) == {"0 axes", "1 axes", "2 axes"}
    assert ns.simple_noise_scale(parts)["layer"] == parts.S["layer"] / parts.g2["layer"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_narrow_gradients_are_summed_in_float32(dtype):
    grads = tree_of(4, dtype)
    stats = ns.noise_scale_stats(grads, 2)
    assert stats.g2.dtype == stats.S.dtype == jnp.float32
    close(stats, by_numpy(grads, 2), 1e-5)
    moments = functools.reduce(
        lambda m, j: ns.add_microbatch(m, jax.tree.map(lambda x: x[j], grads)),
        range(4),
        ns.init_moments(mean_of(grads)),
    )
    assert moments.mean["layer"]["w"].dtype == jnp.float32
    close(ns.moments_stats(moments, 2), by_numpy(grads, 2), 1e-5)


@pytest.mark.x32
def test_tiny_noise_on_a_large_gradient_is_not_lost():
    """|G|² = 1e8 and noise of 1e-2: the difference of squared norms has no digit left."""
    rng = np.random.default_rng(0)
    base = 1e3 * (1 + rng.random(100))
    noise = 1e-2 * rng.standard_normal((2, 100))
    grads = jnp.asarray(base + noise, jnp.float32)
    _, S = by_numpy([np.asarray(grads, np.float64)], 1)
    assert float(ns.noise_scale_stats(grads, 1).S) == pytest.approx(S, rel=1e-3)
    moments = ns.init_moments(grads[0])
    for row in grads:
        moments = ns.add_microbatch(moments, row)
    assert float(ns.moments_stats(moments, 1).S) == pytest.approx(S, rel=2e-2)
    small = jnp.mean(jnp.sum(grads**2, axis=1))
    naive = ns.two_batch_stats(small, jnp.sum(jnp.mean(grads, axis=0) ** 2), 1, 2)
    assert abs(float(naive.S) - S) > S


def test_a_ratio_without_a_positive_denominator_is_nan():
    for g2, S in ((0.0, 1.0), (-1.0, 1.0), (np.nan, 1.0), (1.0, np.inf), (np.inf, 1.0)):
        assert np.isnan(ns.simple_noise_scale(ns.NoiseStats(jnp.float32(g2), jnp.float32(S))))
    slope = jax.grad(lambda g2: ns.simple_noise_scale(ns.NoiseStats(g2, jnp.float32(1.0))))
    assert float(slope(jnp.float32(0.0))) == 0.0


def test_estimates_are_differentiable():
    grads = jnp.asarray(CARD)
    slope = jax.grad(lambda x: ns.noise_scale_stats(x, 8).S)(grads)
    np.testing.assert_allclose(slope, 2 * 8 / 3 * (CARD - CARD.mean(0)), rtol=EPS)


# --- devices ------------------------------------------------------------------------------------


def mesh():
    return Mesh(np.array(jax.devices()), ("data",))


def loss(w, x):
    return jnp.mean((x @ w - 1.0) ** 2)


def test_devices_in_a_training_step():
    """Per-device gradients: one scalar crosses devices beside the gradient's own mean."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.standard_normal((32, 3))), jnp.asarray([0.5, -1.0, 2.0])
    each = jnp.stack([jax.grad(loss)(w, part) for part in x.reshape(8, 4, 3)])

    def step(w, x):
        local = jax.grad(loss)(jax.lax.pcast(w, "data", to="varying"), x)
        mean = jax.lax.pmean(local, "data")
        return mean, ns.noise_scale_stats(local, 4, axis_name="data", mean=mean)

    spread = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P()))
    mean, stats = spread(w, jax.device_put(x, NamedSharding(mesh(), P("data"))))
    np.testing.assert_allclose(mean, jax.grad(loss)(w, x), rtol=1e-12)
    close(stats, by_numpy([each], 4), 1e-11)
    reduced = str(jax.make_jaxpr(spread)(w, x)).count("psum")
    plain = jax.shard_map(
        lambda w, x: jax.lax.pmean(
            jax.grad(loss)(jax.lax.pcast(w, "data", to="varying"), x), "data"
        ),
        mesh=mesh(),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    assert reduced == str(jax.make_jaxpr(plain)(w, x)).count("psum") + 1


def test_accumulation_takes_no_further_gradient():
    """A step that accumulates microbatches costs as many products with the estimate as without."""
    w, x = jnp.asarray([0.5, -1.0, 2.0]), jnp.asarray(np.random.default_rng(0).random((4, 8, 3)))

    def step(w, x, estimate):
        def body(moments, batch):
            grads = jax.grad(loss)(w, batch)
            if estimate:
                return ns.add_microbatch(moments, grads), None
            return moments._replace(mean=moments.mean + grads / 4), None

        moments, _ = jax.lax.scan(body, ns.init_moments(w), x)
        return moments.mean, ns.moments_stats(moments, 8) if estimate else None

    (grads, stats), (plain, _) = (jax.jit(step, static_argnums=2)(w, x, e) for e in (True, False))
    np.testing.assert_allclose(grads, plain, rtol=1e-12)
    each = jax.vmap(jax.grad(loss), (None, 0))(w, x)
    close(stats, by_numpy([each], 8), 1e-11)
    count = lambda e: str(jax.make_jaxpr(step, static_argnums=2)(w, x, e)).count("dot_general")
    assert count(True) == count(False) > 0


def test_microbatches_on_every_device():
    grads = tree_of(24)

    def accumulate(grads):
        start = jax.tree.map(
            lambda x: jax.lax.pcast(x, "data", to="varying"), ns.init_moments(mean_of(grads))
        )
        moments, _ = jax.lax.scan(lambda m, g: (ns.add_microbatch(m, g), None), start, grads)
        return ns.moments_stats(moments, 2, axis_name="data")

    stats = jax.jit(jax.shard_map(accumulate, mesh=mesh(), in_specs=P("data"), out_specs=P()))(
        grads
    )
    close(stats, by_numpy(grads, 2))


def test_sharded_arrays_under_jit():
    grads = tree_of(8)
    there = jax.device_put(grads, NamedSharding(mesh(), P("data")))
    close(jax.jit(ns.noise_scale_stats)(there, 3), by_numpy(grads, 3))


# --- the transformation -------------------------------------------------------------------------


def run(tracker, grads, state=None, **extra):
    state = tracker.init(mean_of(grads)) if state is None else state
    return tracker.update(mean_of(grads), state, **extra)


def test_tracker_is_the_identity_and_its_routes_agree():
    tracker, grads = ns.track_noise_scale(0.9), tree_of(4)
    stats = ns.noise_scale_stats(grads, 2)
    small = jnp.mean(jax.vmap(ns.squared_norm)(grads))
    states = []
    for extra in (
        {"noise_stats": stats},
        {"micro_grads": grads, "b_small": 2},
        {"sq_norm_small": small, "b_small": 2, "b_big": 8},
    ):
        updates, state = run(tracker, grads, **extra)
        assert all(map(np.array_equal, jax.tree.leaves(updates), jax.tree.leaves(mean_of(grads))))
        assert state.g2.dtype == state.S.dtype == jnp.float32
        assert int(state.count) == 1
        states.append((state.g2, state.S))
    np.testing.assert_allclose(states[0], [0.1 * stats.g2, 0.1 * stats.S], rtol=1e-6)
    np.testing.assert_allclose(states[1], states[0], rtol=1e-6)
    np.testing.assert_allclose(states[2], states[0], rtol=1e-6)


def test_tracker_averages_first_and_divides_last():
    decay, tracker = 0.8, ns.track_noise_scale(0.8)
    state, g2, S = None, 0.0, 0.0
    update = jax.jit(lambda grads, state: run(tracker, grads, state, micro_grads=grads, b_small=1))
    for seed in range(5):
        grads = tree_of(2, seed=seed)
        state = tracker.init(mean_of(grads)) if state is None else state
        _, state = update(grads, state)
        stats = by_numpy(grads, 1)
        g2, S = decay * g2 + (1 - decay) * stats[0], decay * S + (1 - decay) * stats[1]
    np.testing.assert_allclose([state.g2, state.S], [g2, S], rtol=1e-5)
    # The correction of both averages for their start at zero cancels.
    correct = 1 - decay**5
    assert float(ns.simple_noise_scale(state)) == pytest.approx(
        (S / correct) / (g2 / correct), rel=1e-5
    )


def test_tracker_by_group():
    labels = lambda tree: jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "rest", tree)
    tracker, grads = ns.track_noise_scale(per_group=labels), tree_of(4)
    _, state = run(tracker, grads, micro_grads=grads, b_small=2)
    assert set(state.g2) == {"matrix", "rest"}
    small = jax.tree.map(
        lambda x: jnp.mean(x), jax.vmap(lambda g: ns.squared_norm(g, labels))(grads)
    )
    _, other = run(tracker, grads, sq_norm_small=small, b_small=2, b_big=8)
    for name in state.S:
        np.testing.assert_allclose(other.S[name], state.S[name], rtol=1e-6)
        np.testing.assert_allclose(other.g2[name], state.g2[name], rtol=1e-6)
    assert set(ns.simple_noise_scale(state)) == {"matrix", "rest"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_tracker_leaves_out_what_is_not_finite(bad):
    tracker, grads = ns.track_noise_scale(0.5), tree_of(4)
    _, before = run(tracker, grads, micro_grads=grads, b_small=2)
    broken = jax.tree.map(lambda x: x.at[0].set(bad), grads)
    _, after = run(tracker, broken, before, micro_grads=broken, b_small=2)
    assert [float(x) for x in after] == [float(x) for x in before]


def test_decay_may_be_injected():
    tracker = optax.inject_hyperparams(ns.track_noise_scale, static_args="per_group")(decay=0.75)
    grads = tree_of(4)
    state = tracker.init(mean_of(grads))
    _, state = tracker.update(mean_of(grads), state, micro_grads=grads, b_small=2)
    inner = state.inner_state
    assert inner.g2.dtype == inner.S.dtype == jnp.float32
    np.testing.assert_allclose([inner.g2, inner.S], 0.25 * np.array(by_numpy(grads, 2)), rtol=1e-6)


STATS = ns.NoiseStats(jnp.float32(1.0), jnp.float32(2.0))


@pytest.mark.slow
def test_tracker_passes_the_contract():
    check_optimizer(
        lambda rate: optax.chain(ns.track_noise_scale(), optax.sgd(rate)),
        extra_args={"noise_stats": STATS},
    )


def test_tracker_under_multi_steps():
    steps = optax.MultiSteps(ns.track_noise_scale(0.5), 2)
    state = steps.init(jnp.zeros(2))
    update = jax.jit(lambda g, s: steps.update(g, s, jnp.zeros(2), noise_stats=STATS))
    for grads, expected, count in ((jnp.ones(2), 0.0, 0), (jnp.full(2, 3.0), 2.0, 1)):
        with jax.numpy_dtype_promotion("standard"):  # optax's accumulation needs it
            updates, state = update(grads, state)
        np.testing.assert_array_equal(updates, np.full(2, expected))
        assert int(state.inner_opt_state.count) == count
    assert float(ns.simple_noise_scale(state.inner_opt_state)) == 2.0


def test_tracker_on_trees_with_nothing_in_them():
    tracker = ns.track_noise_scale()
    for params in ({}, {"a": None, "b": jnp.zeros(())}):
        state = tracker.init(params)
        _, state = tracker.update(params, state, sq_norm_small=1.0, b_small=1, b_big=2)
        assert float(state.S) == pytest.approx(0.02)
    assert jax.eval_shape(tracker.init, jax.ShapeDtypeStruct((3,), jnp.bfloat16)).S.shape == ()


# --- errors -------------------------------------------------------------------------------------

ONE = jnp.ones((1, 2))  # a single microbatch


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ns.two_batch_stats(5.0, 2.0, 0, 256), "b_small must be greater than 0"),
        (lambda: ns.two_batch_stats(5.0, 2.0, 32, 32), "b_big must be greater than b_small = 32"),
        (lambda: ns.noise_scale_stats(jnp.ones((4, 2)), -1), "b must be greater than 0"),
        (lambda: ns.noise_scale_stats(jnp.ones((1, 2)), 8), "at least 2.*got n = 1"),
        (lambda: ns.noise_scale_stats((jnp.ones(3), jnp.ones((2, 2))), 8), "one leading axis"),
        (lambda: ns.noise_scale_stats(jnp.ones((2, 2)), 8, mean=jnp.ones(2)), "mean must be left"),
        (lambda: ns.moments_stats(ns.init_moments(jnp.ones(2)), 0), "b must be greater than 0"),
        (lambda: ns.track_noise_scale(1.0), r"decay must be in \[0, 1\)"),
        (lambda: run(ns.track_noise_scale(), jnp.ones((2, 2))), "update must be given noise_stats"),
        (
            lambda: run(ns.track_noise_scale(), ONE, micro_grads=ONE, b_small=4),
            "at least 2: one alone shows no noise",
        ),
        (
            lambda: run(ns.track_noise_scale(), ONE, sq_norm_small=1.0, b_small=4, b_big=4),
            "b_big must be greater than b_small = 4",
        ),
        (
            lambda: run(
                ns.track_noise_scale(per_group="all"),
                jnp.ones((2, 2)),
                sq_norm_small=1.0,
                b_small=1,
                b_big=2,
            ),
            "sq_norm_small must have the groups",
        ),
        (lambda: ns.next_batch_size(0, 1.0), "b must be greater than 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_are_no_gradients():
    with pytest.raises(TypeError, match="micro_grads must be an array of real"):
        ns.noise_scale_stats(jnp.ones((2, 2), jnp.int32), 1)


def test_one_microbatch_alone_shows_no_noise():
    moments = ns.add_microbatch(ns.init_moments(jnp.ones(2)), jnp.ones(2))
    with pytest.raises(ValueError, match="at least 2"):
        ns.moments_stats(moments, 4)
    assert np.isnan(jax.jit(ns.moments_stats)(moments, 4).S)


def test_batch_size_warm_up():
    assert ns.next_batch_size(32, 65.0) == 64
    assert ns.next_batch_size(32, 64.0) == 32
    assert ns.next_batch_size(32, float("nan")) == 32
    assert ns.next_batch_size(32, 1e9, most=48) == 48
    assert ns.next_batch_size(32, 1e9, most=16) == 32
