"""Step-size adaptation: the card's digits, a reference in NumPy, and what leaves s and p alone."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkit.optim import check_optimizer, eg_sgd, eg_stepsize, egdd, tiger
from tests.tolerance import tol


def run(optimizer, params, gradient, steps):
    """Parameters and state after steps on `gradient(params, step)`, in one compiled loop."""
    return loop(optimizer, gradient)(params, steps)


@functools.cache
def loop(optimizer, gradient):
    """Compiled once for all numbers of steps."""

    def body(step, carry):
        params, state = carry
        updates, state = optimizer.update(gradient(params, step), state, params)
        return optax.apply_updates(params, updates), state

    start = lambda params: (params, optimizer.init(params))
    return jax.jit(lambda params, steps: jax.lax.fori_loop(0, steps, body, start(params)))


CURVATURE = np.array([1.0, 0.1, 10.0])


def quadratic(theta, step=None):
    return theta * jnp.asarray(CURVATURE, theta.dtype)


def numpy_egdd(theta, grads, *, lr, mu, beta, gain_lr, scale_lr, gain_bounds, scale_bounds, raw):
    """The listing of the card in float64; `grads` of a step and θ."""
    v, average, p = (np.zeros_like(theta), np.zeros_like(theta), np.ones_like(theta))
    s = 1.0
    for t in range(1, 1 + len(grads)):
        g = grads[t - 1]
        a = np.sum(g * v)
        if not raw:
            a = a / ((np.linalg.norm(g) + 1e-10) * (np.linalg.norm(v) + 1e-10))
        s = np.clip(s * np.exp(scale_lr * a), *scale_bounds)
        h = g * average / (1 - beta ** max(t - 1, 1)) if raw else np.sign(g) * np.sign(average)
        p = np.clip(p * np.exp(gain_lr * h), *gain_bounds)
        v = mu * v + lr * p * g
        average = beta * average + (1 - beta) * g
        theta = theta - s * v
    return theta, s, p


# --- the card's digits -------------------------------------------------------------------------


def test_check_6_post_form():
    params, state = run(eg_sgd(0.1, 0.5), jnp.array([1.0, -2.0]), lambda x, _: x, 5)
    np.testing.assert_allclose(params, (0.2938916324, 0.0011546614), atol=1e-9)
    np.testing.assert_allclose(state.step_sizes.gain, (3.1344524223, 11.0469331153), rtol=1e-9)


def test_the_post_form_has_no_bounds():
    signs = lambda _, step: jnp.array([1.0, 1.0]).at[1].set(jnp.where(step % 2 == 0, 1.0, -1.0))
    _, state = run(eg_sgd(0.1, 1.0), jnp.zeros(2), signs, 11)
    np.testing.assert_allclose(state.step_sizes.log_gain, [10, -10], rtol=1e-14)


@pytest.mark.x32
def test_check_6_in_float32():
    params, _ = run(eg_sgd(0.1, 0.5), jnp.array([1.0, -2.0]), lambda x, _: x, 5)
    np.testing.assert_allclose(params, (0.2938916324, 0.0011546614), atol=1e-6)


def momentum_inside(rate, momentum):
    """Momentum with the rate inside, as an inner optimizer."""
    return optax.chain(optax.scale_by_learning_rate(rate), optax.trace(momentum))


@pytest.mark.parametrize(
    "optimizer",
    [
        egdd(0.05),
        egdd(0.05, scale_scope="leaf"),
        eg_stepsize(momentum_inside(0.05, 0.9), where="pre"),
        eg_stepsize(optax.sgd(0.05, momentum=0.9), where="pre"),
    ],
    ids=["global", "leaf", "wrapper", "optax-sgd"],
)
def test_check_7_egdd(optimizer):
    params, state = run(optimizer, jnp.ones(3), quadratic, 2)
    np.testing.assert_allclose(params, (0.8569299583, 0.9854655081, -0.2032126471), atol=1e-9)
    np.testing.assert_allclose(state.step_sizes.gain, 1.0100501671, rtol=1e-9)
    np.testing.assert_allclose(state.step_sizes.scale, 1.0009965734, rtol=1e-9)

    params, state = run(optimizer, jnp.ones(3), quadratic, 30)
    np.testing.assert_allclose(params, (0.1897334385, 0.1622517457, -0.2254693120), atol=1e-9)
    gain = (1.0512710964, 1.3364274880, 0.9323938199)
    np.testing.assert_allclose(state.step_sizes.gain, gain, rtol=1e-9)
    np.testing.assert_allclose(state.step_sizes.scale, 0.9946325517, rtol=1e-9)


@pytest.mark.x32
def test_check_7_in_float32():
    params, state = run(egdd(0.05), jnp.ones(3), quadratic, 30)
    np.testing.assert_allclose(params, (0.1897334385, 0.1622517457, -0.2254693120), atol=1e-5)
    np.testing.assert_allclose(state.step_sizes.scale, 0.9946325517, rtol=1e-5)


def gradients(tree, step):
    return jax.tree.map(lambda x: jnp.cos(x + step.astype(x.dtype)).astype(x.dtype), tree)


@pytest.mark.parametrize("where", ["post", "pre"])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_check_8_no_rates_are_the_inner_optimizer(where, dtype):
    inner = optax.sgd(0.01, momentum=0.9)
    off = eg_stepsize(inner, gain_lr=0, scale_lr=0, where=where)
    # Rates that may change keep their state, and are as exact where nothing is fused.
    kept = eg_stepsize(inner, gain_lr=jnp.float32(0), scale_lr=jnp.float32(0), where=where)
    params = {"a": jnp.linspace(-1, 1, 6, dtype=dtype), "b": jnp.ones((2, 2), dtype)}
    with jax.numpy_dtype_promotion("standard"):  # optax's own
        chex.assert_trees_all_equal(
            run(off, params, gradients, 7)[0], run(inner, params, gradients, 7)[0]
        )
        state, reference = kept.init(params), inner.init(params)
        for step in jnp.arange(3):
            grads = gradients(params, step)
            updates, state = kept.update(grads, state, params)
            expected, reference = inner.update(grads, reference, params)
            chex.assert_trees_all_equal(updates, expected)
            params = optax.apply_updates(params, updates)
    assert state.step_sizes.scale == 1
    assert off.init(params).step_sizes.log_gain is None
    assert kept.init(params).step_sizes.log_gain is not None


@pytest.mark.parametrize(
    "optimizer",
    [
        egdd(0.05, gain_lr=1.0, scale_lr=1.0),
        eg_stepsize(optax.sgd(0.05), gain_lr=1.0, scale_lr=1.0),
        eg_stepsize(optax.sgd(0.05), gain_lr=1.0, scale_lr=1.0, gain_signal="direction", raw=True),
    ],
)
def test_check_8_the_first_step_changes_nothing(optimizer):
    _, state = run(optimizer, jnp.ones(3), quadratic, 1)
    np.testing.assert_array_equal(state.step_sizes.gain, 1)
    np.testing.assert_array_equal(state.step_sizes.scale, 1)
    _, state = run(optimizer, jnp.ones(3), quadratic, 2)
    assert np.all(np.asarray(state.step_sizes.gain) != 1)


@pytest.mark.parametrize("signal", ["ema", "direction"])
def test_check_9_constant_signs_gain_a_percent_and_alternating_ones_lose(signal):
    optimizer = eg_stepsize(optax.sgd(1e-3), gain_signal=signal)
    signs = lambda _, step: (
        jnp.array([1.0, -1.0, 0.0]).at[2].set(jnp.where(step % 2 == 0, 1.0, -1.0))
    )
    for steps in (2, 3, 11):
        _, state = run(optimizer, jnp.zeros(3), signs, steps)
        kept, alternating = state.step_sizes.gain[:2], state.step_sizes.gain[2]
        np.testing.assert_allclose(kept, math.exp(0.01 * (steps - 1)), rtol=1e-12)
        np.testing.assert_allclose(alternating, math.exp(-0.01 * (steps - 1)), rtol=1e-12)


# --- against references ------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_egdd_is_the_listing(raw):
    """With bounds that are met, signals that change, and more than one axis."""
    options = {
        **{"beta": 0.7, "gain_lr": 0.2, "scale_lr": 0.3, "raw": raw},
        **{"gain_bounds": (0.8, 1.5), "scale_bounds": (0.9, 1.2)},
    }
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(40, 2, 5)) + 0.5
    grads[10:, 0, 0] = np.cos(np.pi * np.arange(30))
    grads[1] *= 1e-10  # where the 1e-10 beside the norms counts
    theta = rng.normal(size=(2, 5))
    stacked = jnp.asarray(grads)
    params, state = run(
        egdd(0.1, 0.8, **options), jnp.asarray(theta), lambda _, step: stacked[step], 40
    )
    expected, scale, gain = numpy_egdd(theta, grads, lr=0.1, mu=0.8, **options)
    np.testing.assert_allclose(params, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(state.step_sizes.gain, gain, rtol=1e-12)
    np.testing.assert_allclose(state.step_sizes.scale, scale, rtol=1e-12)
    assert gain.min() == 0.8
    assert gain.max() == 1.5


def test_scale_scopes():
    """A scale for each leaf is that of the leaf alone; a global one that of the leaves as one."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(20, 6)) + 0.5
    make = functools.partial(eg_stepsize, optax.sgd(0.1, momentum=0.5), scale_lr=0.1)
    tree = {"a": jnp.zeros(2), "b": jnp.zeros((2, 2))}
    split = lambda g: {"a": g[:2], "b": g[2:].reshape(2, 2)}
    stacked = jnp.asarray(grads)

    together, state = run(make(), tree, lambda _, step: split(stacked[step]), 20)
    flat, flat_state = run(make(), jnp.zeros(6), lambda _, step: stacked[step], 20)
    np.testing.assert_allclose(together["b"].ravel(), flat[2:], rtol=1e-12)
    np.testing.assert_allclose(state.step_sizes.scale, flat_state.step_sizes.scale, rtol=1e-12)

    leaf = make(scale_scope="leaf")
    _, state = run(leaf, tree, lambda _, step: split(stacked[step]), 20)
    for name in tree:
        _, alone = run(leaf, tree[name], lambda _, step, n=name: split(stacked[step])[n], 20)
        np.testing.assert_allclose(state.step_sizes.scale[name], alone.step_sizes.scale, rtol=1e-12)
    assert abs(state.step_sizes.scale["a"] - state.step_sizes.scale["b"]) > 1e-3


def test_raw_signals_are_derivatives_of_the_loss():
    """∂L/∂s = <D, g> and ∂L/∂p = s d g at the new point, by automatic differentiation."""
    loss = lambda x: jnp.sum(jnp.cos(x) * jnp.arange(1.0, 4.0))
    optimizer = eg_stepsize(
        optax.sgd(0.1, momentum=0.9),
        **{"gain_lr": 1e-3, "scale_lr": 1e-3, "raw": True, "gain_signal": "direction"},
        **{"gain_bounds": (0, math.inf), "scale_bounds": (0, math.inf)},
    )
    theta, state = run(optimizer, jnp.array([0.1, -0.5, 2.0]), lambda x, _: jax.grad(loss)(x), 5)
    s, p = state.step_sizes.scale, state.step_sizes.gain
    updates, after = optimizer.update(jax.grad(loss)(theta), state, theta)
    s, p = after.step_sizes.scale, after.step_sizes.gain
    d = updates / (s * p)
    by_scale = jax.grad(lambda s: loss(theta + s * p * d))(s)
    by_gain = jax.grad(lambda p: loss(theta + s * p * d))(p)
    new = theta + updates
    _, last = optimizer.update(jax.grad(loss)(new), after, new)
    np.testing.assert_allclose(last.step_sizes.log_scale - jnp.log(s), -1e-3 * by_scale, rtol=1e-9)
    np.testing.assert_allclose(
        last.step_sizes.log_gain - jnp.log(p), -1e-3 * by_gain / s, rtol=1e-8, atol=1e-15
    )


def test_additive_rule_is_the_hypergradient():
    """On a linear loss the cosine is 1: s = 1 + k scale_lr, up to its bound."""
    optimizer = eg_stepsize(
        optax.sgd(0.1), gain_lr=0, scale_lr=0.5, scale_rule="additive", scale_bounds=(0.5, 3.0)
    )
    slope = lambda *_: jnp.ones(2)
    for steps, scale in ((1, 1.0), (2, 1.5), (4, 2.5), (9, 3.0)):
        params, state = run(optimizer, jnp.zeros(2), slope, steps)
        np.testing.assert_allclose(state.step_sizes.scale, scale, rtol=1e-9)
    np.testing.assert_allclose(params, -0.1 * (1 + 1.5 + 2 + 2.5 + 5 * 3), rtol=1e-9)


def test_adam_cancels_gains_in_front_of_it():
    """Why `where="post"` is the default: with "pre" the trajectory is that without gains."""
    adam = optax.adam(0.01, eps=0.0)
    make = functools.partial(eg_stepsize, adam, gain_lr=0.5, gain_bounds=(1.0, 3.0), scale_lr=0)
    # The gain reaches its bound at the third step and is constant from there.
    gradient = lambda x, step: jnp.ones_like(x)
    with jax.numpy_dtype_promotion("standard"):
        plain, _ = run(adam, jnp.zeros(2, jnp.float32), gradient, 60)
        pre, _ = run(make(where="pre"), jnp.zeros(2, jnp.float32), gradient, 60)
        post, _ = run(make(), jnp.zeros(2, jnp.float32), gradient, 60)
    np.testing.assert_allclose(pre, plain, rtol=0.15)
    assert np.all(post / plain > 2.5)


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "signal"), [("global", "ema"), ("leaf", "direction")])
def test_non_finite_gradients_leave_the_step_sizes(scope, signal):
    inner = optax.stateless(lambda g, _: jax.tree.map(lambda g: -0.1 * g, g))
    optimizer = eg_stepsize(inner, gain_lr=0.1, scale_lr=0.1, scale_scope=scope, gain_signal=signal)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    _, state = run(optimizer, params, lambda x, _: x, 3)
    update = jax.jit(optimizer.update)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        grads = {"a": jnp.array([1.0, bad, -1.0]), "b": jnp.ones(2)}
        updates, after = update(grads, state, params)
        chex.assert_trees_all_equal(after.step_sizes, state.step_sizes)
        assert not np.isfinite(updates["a"][1]), "it goes on to the inner rule"
        # The next finite step goes on from there, and nothing is poisoned.
        _, onward = update(params, after, params)
        assert int(onward.step_sizes.count) == int(state.step_sizes.count) + 1
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(onward))
        assert np.all(onward.step_sizes.gain["b"] > state.step_sizes.gain["b"])
        before, then = (jax.tree.leaves(x.step_sizes.scale)[-1] for x in (after, onward))
        assert then > before


@pytest.mark.parametrize("raw", [False, True])
def test_products_that_overflow_leave_the_scale(raw):
    optimizer = eg_stepsize(optax.sgd(0.1), scale_lr=0.5, raw=raw)
    huge = lambda x, _: jnp.full_like(x, 1e30)
    _, state = run(optimizer, jnp.zeros(3, jnp.float32), huge, 3)
    assert state.step_sizes.scale == 1
    assert np.all(state.step_sizes.gain > 1)
    assert np.all(np.isfinite(state.step_sizes.gain))


def test_a_zero_gradient_has_no_direction():
    optimizer = eg_stepsize(optax.sgd(0.1), gain_lr=0.5, scale_lr=0.5)
    _, state = run(optimizer, jnp.zeros(3), lambda x, _: x, 5)
    np.testing.assert_array_equal(state.step_sizes.scale, 1)
    np.testing.assert_array_equal(state.step_sizes.gain, 1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gains_of_narrow_parameters_are_exact(dtype):
    """Two hundred steps of 1 % each: in bfloat16 the gain would stop or run away."""
    optimizer = eg_stepsize(optax.sgd(1e-3), gain_bounds=(1e-2, 1e2))
    ones = jnp.ones(4, dtype)
    params, state = run(optimizer, ones, lambda x, _: jnp.ones_like(x), 201)
    assert params.dtype == dtype
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
    np.testing.assert_allclose(state.step_sizes.gain, math.exp(2), rtol=tol(jnp.float32, 200))


@pytest.mark.parametrize(
    ("options", "floats"),
    [
        ({}, 3),
        ({"scale_lr": 0}, 2),
        ({"gain_lr": 0}, 1),
        ({"gain_lr": 0, "scale_lr": 0}, 0),
        ({"gain_signal": "direction"}, 2),
        ({"gain_signal": "direction", "scale_lr": 0}, 2),
    ],
)
def test_state_holds_what_is_needed(options, floats):
    count = lambda optimizer: sum(
        x.size for x in jax.tree.leaves(optimizer.init(jnp.ones(1000))) if x.ndim
    )
    assert count(eg_stepsize(optax.sgd(0.1), **options)) == 1000 * floats
    assert count(egdd(0.1)) == 3000
    assert count(eg_sgd(0.1, 0.1)) == 2000


def test_mixed_precisions_in_one_tree():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2), "c": jnp.ones((), jnp.float32)}
    optimizer = eg_stepsize(optax.sgd(1e-3), scale_lr=0.1)
    new, state = run(optimizer, params, lambda x, _: x, 3)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, params)
    np.testing.assert_allclose(state.step_sizes.scale, math.exp(0.2), rtol=1e-5)


def test_extra_arguments_reach_the_inner_optimizer():
    def update(grads, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda g: -factor * g, grads), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    optimizer, params = eg_stepsize(inner), jnp.ones(3)
    updates, _ = optimizer.update(params, optimizer.init(params), params, factor=0.25)
    np.testing.assert_array_equal(updates, -0.25)


def test_nothing_is_differentiated_through_the_signals():
    """d θ₂ / d θ₀ through two steps is that of fixed s and p."""
    optimizer = eg_stepsize(optax.sgd(0.1), gain_lr=0.3, scale_lr=0.3, raw=True)

    def after(theta):
        state = optimizer.init(theta)
        for _ in range(2):
            updates, state = optimizer.update(quadratic(theta), state, theta)
            theta = theta + updates
        return theta, state

    jacobian, state = jax.jacobian(after, has_aux=True)(jnp.ones(3))
    factor = state.step_sizes.scale * state.step_sizes.gain
    expected = (1 - 0.1 * CURVATURE) * (1 - 0.1 * factor * CURVATURE)
    np.testing.assert_allclose(jacobian, np.diag(expected), rtol=1e-12, atol=1e-15)


def test_a_badly_known_rate_is_mended():
    """A hundred times too small a rate: the flat coordinate stands still, with gains it moves."""
    plain, _ = run(optax.sgd(1e-4), jnp.ones(3), quadratic, 1000)
    adapted, _ = run(eg_stepsize(optax.sgd(1e-4)), jnp.ones(3), quadratic, 1000)
    assert plain[1] > 0.98
    assert adapted[1] < 0.3
    assert np.all(np.abs(adapted) < plain)


# --- several devices ---------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("kind", ["jit", "shard_map"])
def test_eight_devices_equal_one(kind, scope):
    """The inner products of the scale are over all devices, and so is a bad gradient on one."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    make = functools.partial(egdd, 0.1, gain_lr=0.1, scale_lr=0.3, scale_scope=scope)
    params = {"a": jnp.linspace(-1, 1, 16), "b": jnp.ones((8, 3))}
    grads = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(5.0 * x.size) * 0.7).reshape(5, *x.shape) + 0.5, params
    )
    grads["a"] = grads["a"].at[3, 15].set(jnp.nan)

    def steps(optimizer, params, grads):
        def body(state, g):
            updates, state = optimizer.update(g, state)
            return state, updates

        return jax.lax.scan(body, optimizer.init(params), grads)

    alone, updates = jax.jit(functools.partial(steps, make()))(params, grads)
    split = jax.tree.map(lambda _: P("data"), params)
    split_grads = jax.tree.map(lambda _: P(None, "data"), params)
    if kind == "jit":
        put = lambda tree, specs: jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
        )
        run_all = jax.jit(functools.partial(steps, make()))
        state, spread = run_all(put(params, split), put(grads, split_grads))
    else:
        sizes = alone.step_sizes._replace(count=P(), log_gain=split, average=split)
        sizes = sizes._replace(log_scale=jax.tree.map(lambda _: P(), sizes.log_scale))
        manual = jax.shard_map(
            functools.partial(steps, make(axis_name="data")),
            mesh=mesh,
            in_specs=(split, split_grads),
            out_specs=(alone._replace(step_sizes=sizes, momentum=split), split_grads),
        )
        state, spread = jax.jit(manual)(params, grads)
    assert int(state.step_sizes.count) == 4
    chex.assert_trees_all_close(state, alone, rtol=1e-12)
    chex.assert_trees_all_close(spread, updates, rtol=1e-12)


# --- the contract ------------------------------------------------------------------------------

# Two leaves are enough for optimizers that ask nothing of a leaf's name.
WAVE = 0.3 * np.cos(1.3 * np.arange(40) + 0.4).astype(np.float32)
PARAMS = {"bias": jnp.asarray(WAVE[:8]), "kernel": jnp.asarray(WAVE[8:].reshape(8, 4))}

CASES = {
    "egdd": egdd,
    "eg_sgd": lambda rate: eg_sgd(rate, 0.1),
    "momentum": lambda rate: eg_stepsize(optax.sgd(rate, momentum=0.9), gain_lr=0.1, scale_lr=0.1),
    "lion": lambda rate: eg_stepsize(
        optax.lion(rate),
        **{"scale_scope": "leaf", "gain_signal": "direction", "where": "pre"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_contract(case):
    check_optimizer(CASES[case], params=PARAMS)


@pytest.mark.slow
def test_what_the_inner_optimizer_keeps_finite_stays_finite():
    check_optimizer(
        lambda rate: eg_stepsize(tiger(rate)),
        **{"params": PARAMS, "stays_finite": True, "checks": ["non_finite_gradients"]},
    )


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beta": 1.0}, r"beta must be at least 0 and less than 1; got 1\.0"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"gain_lr": -0.1}, "gain_lr must be at least 0"),
        ({"scale_lr": -0.1}, "scale_lr must be at least 0"),
        ({"gain_bounds": (2.0, 3.0)}, r"gain_bounds must .* contain the initial value 1; got \(2"),
        ({"gain_bounds": (-1.0, 3.0)}, "gain_bounds must be non-negative"),
        ({"scale_bounds": (0.1, 0.9)}, "scale_bounds must .* contain the initial value 1"),
        ({"gain_signal": "sign"}, "gain_signal must be one of 'ema', 'direction'"),
        ({"where": "before"}, "where must be one of 'post', 'pre'"),
        ({"scale_scope": "tree"}, "scale_scope must be one of 'global', 'leaf'"),
        ({"scale_rule": "add"}, "scale_rule must be one of .* Did you mean 'additive'"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        eg_stepsize(optax.sgd(0.1), **options)


def test_rates_are_checked():
    for make in (egdd, lambda rate: eg_sgd(rate, 0.1)):
        with pytest.raises(ValueError, match=r"learning_rate must be greater than 0; got 0\.0"):
            make(0.0)
    with pytest.raises(ValueError, match="momentum must be at least 0 and less than 1"):
        egdd(0.1, 1.0)
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        eg_sgd(0.1, -1.0)
    with pytest.raises(ValueError, match="floating-point"):
        egdd(0.1).init({"index": jnp.arange(3)})
