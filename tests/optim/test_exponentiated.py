"""Exponentiated gradient: the card's digits, what the updates preserve, and what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkit.optim import check_optimizer, exponentiated_gradient
from jaxkit.optim.exponentiated import eg
from tests.tolerance import tol


def step(optimizer, params, grads, state=None):
    params, grads = jnp.asarray(params), jnp.asarray(grads)
    state = optimizer.init(params) if state is None else state
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def run(optimizer, params, grads):
    """Parameters and state after a step for each of `grads`, in one compiled scan."""

    @jax.jit
    def scanned(params, grads):
        def body(carry, g):
            updates, state = optimizer.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (params, optimizer.init(params)), grads)[0]

    return scanned(params, grads)


# --- the card's digits -------------------------------------------------------------------------


@pytest.mark.parametrize("log_state", [False, True])
@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("mirror", (0.4524187090, 2.1025421928, 0.0)),
        ("reparam", (0.4756147123, 2.2103418362, 0.0)),
    ],
)
def test_check_1_nonneg(variant, expected, log_state):
    optimizer = eg(0.1, variant=variant, log_state=log_state)
    theta, _ = step(optimizer, [0.5, 2.0, 0.0], [1.0, -0.5, 3.0])
    np.testing.assert_allclose(theta, expected, atol=1e-9)


@pytest.mark.x32
def test_check_1_in_float32():
    theta, _ = step(eg(0.1), [0.5, 2.0, 0.0], [1.0, -0.5, 3.0])
    assert theta.dtype == jnp.float32
    np.testing.assert_allclose(theta, (0.4524187090, 2.1025421928, 0.0), atol=1e-6)


@pytest.mark.parametrize("log_state", [False, True])
@pytest.mark.parametrize("shift", [0.0, 7.0, -3000.0])
def test_check_2_simplex(shift, log_state):
    optimizer = eg(0.5, "simplex", log_state=log_state)
    theta, _ = step(optimizer, [0.2, 0.3, 0.5], np.array([1.0, 0.0, -1.0]) + shift)
    np.testing.assert_allclose(theta, (0.0973824903, 0.2408348748, 0.6617826348), atol=1e-9)


def test_check_3_signed():
    plus, minus = jnp.array([0.3, 0.2]), jnp.array([0.1, 0.4])
    w, g = plus - minus, jnp.array([0.5, -1.0])
    logs = (jnp.log(plus), jnp.log(minus))

    optimizer = eg(0.3, "signed", total=1.0)
    new, state = step(optimizer, w, g, optimizer.init(w)._replace(logs=logs))
    np.testing.assert_allclose(jnp.exp(state.logs[0]), (0.2744911256, 0.2869918514), atol=1e-9)
    np.testing.assert_allclose(jnp.exp(state.logs[1]), (0.1235080879, 0.3150089351), atol=1e-9)
    np.testing.assert_allclose(new, jnp.exp(state.logs[0]) - jnp.exp(state.logs[1]), atol=1e-15)

    beta = 2 * jnp.sqrt(jnp.array([0.03, 0.08]))
    expected = (0.1420289687, -0.0263555268)
    unnormalized = eg(0.3, "signed", beta=beta)
    new, state = step(unnormalized, w, g)
    np.testing.assert_allclose(new, expected, atol=1e-9)
    np.testing.assert_allclose(jnp.exp(state.logs[0] + state.logs[1]), (0.03, 0.08), rtol=1e-13)
    new, _ = step(eg(0.3, "hypentropy", beta=beta), w, g)
    np.testing.assert_allclose(new, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("beta", "rate", "expected", "atol"),
    [
        (1e4, 1e-7, (0.2995, -1.999), 1e-9),
        (1e-8, 0.1, (0.2853688274, -1.8096748361), 1e-9),
    ],
)
def test_check_4_hypentropy_lies_between_descent_and_egu(beta, rate, expected, atol):
    w, _ = step(eg(rate, "hypentropy", beta=beta), [0.3, -2.0], [0.5, -1.0])
    np.testing.assert_allclose(w, expected, atol=atol)


@pytest.mark.parametrize("kind", ["random", "drifting", "coins"])
def test_check_5_hedge_bound(kind):
    n, length = 10, 500
    rng = np.random.default_rng(0)
    losses = rng.uniform(size=(length, n))
    if kind == "drifting":
        losses = (losses + np.linspace(0, 1, length)[:, None] * np.linspace(0, 1, n)) / 2
    if kind == "coins":
        losses = np.round(losses)
    optimizer = eg(np.sqrt(8 * np.log(n) / length), "simplex")

    def body(carry, loss):
        theta, state = carry
        updates, state = optimizer.update(loss, state, theta)
        return (optax.apply_updates(theta, updates), state), jnp.dot(theta, loss)

    theta = jnp.full(n, 1 / n)
    _, paid = jax.lax.scan(body, (theta, optimizer.init(theta)), jnp.asarray(losses))
    regret = float(jnp.sum(paid)) - losses.sum(axis=0).min()
    bound = np.sqrt(length * np.log(n) / 2)
    np.testing.assert_allclose(bound, 23.99, atol=5e-3)
    assert regret <= bound
    if kind == "coins":  # nobody can do better on these
        assert regret > bound / 3


# --- what the updates are ----------------------------------------------------------------------


def test_egu_minimises_its_objective():
    theta, g, rate = jnp.array([0.5, 2.0, 1e-3]), jnp.array([1.0, -0.5, 3.0]), 0.1

    def objective(x):
        return jnp.sum(rate * g * x + x * jnp.log(x / theta) - x + theta)

    new, _ = step(eg(rate), theta, g)
    np.testing.assert_allclose(jax.grad(objective)(new), 0, atol=1e-14)


def test_reparam_is_the_gradient_step_on_the_logarithm():
    theta, target, rate = jnp.array([0.5, 2.0]), jnp.array([1.0, 0.3]), 0.1
    loss = lambda theta: jnp.sum((theta - target) ** 3)
    z = jnp.log(theta)
    z = z - rate * jax.grad(lambda z: loss(jnp.exp(z)))(z)
    new, _ = step(eg(rate, variant="reparam"), theta, jax.grad(loss)(theta))
    np.testing.assert_allclose(new, jnp.exp(z), rtol=1e-14)


def test_stateless_hypentropy_is_the_unnormalised_pair():
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(4, 3)))
    grads = jnp.asarray(rng.normal(size=(50, 4, 3)) * 3)
    pair, state = run(eg(0.1, "signed", beta=0.2), w, grads)
    alone, _ = run(eg(0.1, "hypentropy", beta=0.2), w, grads)
    np.testing.assert_allclose(pair, alone, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(jnp.exp(sum(state.logs)), 0.01, rtol=1e-12)


def test_signed_pair_starts_from_the_parameters_and_keeps_their_sum():
    zero = eg(0.1, "signed", total=3.0).init(jnp.zeros((2, 5)))
    np.testing.assert_allclose(jnp.exp(jnp.stack(zero.logs)), 3 / 20, rtol=1e-14)

    w = jnp.array([[0.3, -0.5], [0.0, 0.1]])
    optimizer = eg(0.1, "signed", total=3.0)
    plus, minus = map(jnp.exp, optimizer.init(w).logs)
    np.testing.assert_allclose(plus - minus, w, atol=1e-15)
    np.testing.assert_allclose(jnp.sum(plus + minus), 3.0, rtol=1e-14)
    same, _ = step(optimizer, w, jnp.zeros_like(w))
    np.testing.assert_allclose(same, w, atol=1e-15)

    grads = jnp.asarray(np.random.default_rng(0).normal(size=(30, 2, 2)) * 20)
    new, state = run(optimizer, w, grads)
    np.testing.assert_allclose(jnp.sum(jnp.exp(jnp.stack(state.logs))), 3.0, rtol=1e-13)
    assert 2.5 < float(jnp.sum(jnp.abs(new))) <= 3 * (1 + 1e-14)


@pytest.mark.parametrize("log_state", [False, True])
def test_rows_of_a_simplex_are_independent(log_state):
    rng = np.random.default_rng(0)
    theta = rng.dirichlet(np.ones(4), size=(3, 2)) * 5
    g = rng.normal(size=(3, 2, 4))
    optimizer = eg(0.7, "simplex", total=5.0, log_state=log_state)
    together, _ = step(optimizer, theta, g)
    weights = theta * np.exp(-0.7 * g)
    expected = 5 * weights / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(together, expected, rtol=1e-13)
    alone, _ = step(optimizer, theta[2, 1], g[2, 1])
    np.testing.assert_allclose(together[2, 1], alone, rtol=1e-14)


def test_trees_with_several_leaves_and_a_schedule():
    schedule = lambda count: 0.1 / (1 + count).astype(jnp.float32)
    optimizer = eg(schedule, "hypentropy", beta=jnp.float32(0.5))
    params = {"a": jnp.ones((2, 3)), "b": (jnp.float32(-0.3), None)}
    grads = jax.tree.map(jnp.ones_like, params)
    state = optimizer.init(params)
    for count in range(3):
        updates, state = optimizer.update(grads, state, params)
        for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            exact = np.float64(old)
            exact = 0.5 * np.sinh(np.arcsinh(exact / 0.5) - 0.1 / (1 + count)) - exact
            np.testing.assert_allclose(new, exact, rtol=tol(jnp.float32))
        params = optax.apply_updates(params, updates)
    assert params["b"][1] is None
    assert int(state.count) == 3


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "options"),
    [
        ("nonneg", {}),
        ("nonneg", {"variant": "reparam"}),
        ("hypentropy", {"beta": 0.1}),
        ("hypentropy", {"beta": 1e-8}),
        ("hypentropy", {"beta": 1e4}),
    ],
)
@pytest.mark.parametrize("size", [1e-6, 1e-2, 3.0, 30.0])
def test_float32_updates_are_those_of_float64(constraint, options, size):
    """Small steps keep their digits, where exp(-η g) θ - θ in float32 would lose them."""
    rng = np.random.default_rng(0)
    optimizer = eg(1.0, constraint, **options)
    theta = rng.uniform(0.1, 2.0, 64).astype(np.float32)
    g = (size * rng.uniform(0.5, 1.0, 64)).astype(np.float32)
    narrow, _ = optimizer.update(jnp.asarray(g), optimizer.init(theta), jnp.asarray(theta))
    theta, g = theta.astype(np.float64), g.astype(np.float64)
    updates, _ = optimizer.update(jnp.asarray(g), optimizer.init(theta), jnp.asarray(theta))
    room = 1 + size + np.max(np.arcsinh(theta / options.get("beta", 1.0)))
    np.testing.assert_allclose(narrow, updates, rtol=tol(jnp.float32) * room)


@pytest.mark.parametrize("beta", [1e-8, 0.1, 1e4])
def test_hypentropy_in_both_of_its_forms_is_the_definition(beta):
    w = np.linspace(-3, 3, 13)
    for size in (0.0, 1e-3, 0.999, 1.001, 5.0):
        new, _ = step(eg(1.0, "hypentropy", beta=beta), w, np.full(13, size))
        exact = beta * np.sinh(np.arcsinh(w / beta) - size)
        np.testing.assert_allclose(new, exact, rtol=1e-12, atol=1e-12)
    still, _ = step(eg(1.0, "hypentropy", beta=beta), jnp.float32(w), np.zeros(13, np.float32))
    np.testing.assert_array_equal(still, jnp.float32(w))


def test_zero_is_absorbing_in_float32_unless_the_logarithm_is_kept():
    theta = jnp.array([1.0, 0.0], jnp.float32)
    there = jnp.ones((120, 2), jnp.float32)
    back_and_forth = jnp.concatenate([there, -there])
    direct, _ = run(eg(1.0), theta, back_and_forth)
    np.testing.assert_array_equal(direct, [0.0, 0.0])
    kept, state = run(eg(1.0, log_state=True), theta, back_and_forth)
    np.testing.assert_allclose(kept, [1.0, 0.0], rtol=1e-6)
    assert int(state.clipped) == 0

    simplex = jnp.array([0.5, 0.5], jnp.float32)
    tilt = back_and_forth * jnp.array([[1.0, 0.0]], jnp.float32)
    direct, _ = run(eg(1.0, "simplex"), simplex, tilt)
    np.testing.assert_array_equal(direct, [0.0, 1.0])
    kept, _ = run(eg(1.0, "simplex", log_state=True), simplex, tilt)
    np.testing.assert_allclose(kept, simplex, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_simplex_does_not_drift(dtype):
    theta = jnp.array([[0.25, 0.125, 0.5, 0.125]], dtype)
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(2000, 1, 4)), dtype)
    new, _ = run(eg(0.01, "simplex"), theta, grads)
    assert abs(float(jnp.sum(new.astype(jnp.float32))) - 1) <= 2 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("variant", ["mirror", "reparam"])
def test_log_state_undoes_what_others_do_to_the_parameters(variant):
    optimizer = eg(0.1, variant=variant, log_state=True)
    theta, g = jnp.array([0.5, 2.0]), jnp.array([1.0, -0.5])
    new, _ = step(optimizer, theta, g)
    decayed, _ = step(optimizer, 0.9 * theta, g, optimizer.init(theta))
    np.testing.assert_allclose(decayed, new, rtol=1e-14)


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 80.0), (jnp.float64, 700.0)])
def test_exponents_are_clipped_and_counted(dtype, limit):
    one = lambda *x: jnp.asarray(x, dtype)
    g = one(-2 * limit, 2 * limit, 1.0)
    for options in ({}, {"log_state": True}, {"variant": "reparam"}):
        theta, state = step(eg(1.0, **options), one(1, 1, 1), g)
        np.testing.assert_allclose(theta, one(np.exp(limit), 0, np.exp(-1)), rtol=1e-5)
        assert int(state.clipped) == 1
    for constraint in ("hypentropy", "signed"):
        w, state = step(eg(1.0, constraint, beta=2.0), one(0, 0, 0), g)
        assert jnp.all(jnp.isfinite(w))
        assert int(state.clipped) == 2
        np.testing.assert_allclose(w[2], 2 * np.sinh(-1), rtol=1e-6)
        assert float(w[0]) > np.exp(0.99 * limit)
        assert float(w[1]) < -np.exp(0.99 * limit)
    _, state = step(eg(1.0, "simplex"), one(0.5, 0.5), one(-2 * limit, 2 * limit))
    assert int(state.clipped) == 0
    tree, optimizer = {"a": g, "b": one(1)}, eg(1.0)
    params = jax.tree.map(jnp.ones_like, tree)
    _, state = optimizer.update(tree, optimizer.init(params), params)
    assert int(state.clipped) == 1
    # A large weight that takes a small step needs no clipping.
    w, state = step(eg(0.1, "hypentropy", beta=1e-8), one(1e30), one(1))
    assert int(state.clipped) == 0
    np.testing.assert_allclose(w, 1e30 * np.exp(-0.1), rtol=1e-6)


def test_a_corner_of_the_simplex_has_a_derivative():
    """Of weights that are zero too, whatever their gradients: θ' = p and ∂p/∂g = -η (p - p pᵀ)."""
    theta, g = jnp.array([0.0, 0.3, 0.7, 0.0]), jnp.array([-2000.0, 1.0, -0.5, 2000.0])
    after = lambda theta, g: step(eg(0.5, "simplex"), theta, g)[0]
    p = np.asarray(theta) * np.exp([0, -0.5, 0.25, 0])
    p /= p.sum()
    np.testing.assert_allclose(after(theta, g), p, rtol=1e-14)
    by_gradient = jax.jacobian(after, argnums=1)(theta, g)
    np.testing.assert_allclose(by_gradient, -0.5 * (np.diag(p) - np.outer(p, p)), atol=1e-15)
    assert np.all(np.isfinite(jax.jacobian(after)(theta, g)))


@pytest.mark.parametrize(
    ("constraint", "options"),
    [
        ("nonneg", {}),
        ("nonneg", {"log_state": True}),
        ("simplex", {}),
        ("simplex", {"log_state": True}),
        ("signed", {}),
        ("hypentropy", {"beta": 0.3}),
    ],
)
def test_a_bad_gradient_is_seen_and_kept_out(constraint, options):
    """An infinite one as well, which else would put a weight at zero for good.

    Compiled for many numbers, where a minimum or maximum on a CPU may lose a NaN among them.
    """
    optimizer = eg(0.1, constraint, **options)
    theta = jnp.full((4, 4096), 1 / 16384 if constraint == "signed" else 1 / 4096, jnp.float32)
    guarded = optax.apply_if_finite(optimizer, 5)
    state, update = guarded.init(theta), jax.jit(guarded.update)
    plain = jax.jit(optimizer.update)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        g = jnp.ones_like(theta).at[2, 77].set(bad)
        assert np.isnan(plain(g, state.inner_state, theta)[0][2, 77])
        updates, after = update(g, state, theta)
        np.testing.assert_array_equal(updates, 0)
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)


@pytest.mark.parametrize(
    ("constraint", "options"),
    [("simplex", {}), ("simplex", {"log_state": True}), ("signed", {"total": 2.0}), ("nonneg", {})],
)
def test_eight_devices_equal_one(constraint, options):
    """Also where a row, or the sum of a leaf, is spread over all of them."""
    optimizer = eg(0.5, constraint, **options)
    theta = jnp.arange(1.0, 17.0) / 136
    grads = jnp.cos(jnp.arange(48.0)).reshape(3, 16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
    alone = run(optimizer, theta, grads)
    spread = run(optimizer, put(theta, "data"), put(grads, None, "data"))
    assert len(spread[0].sharding.device_set) == 8
    chex.assert_trees_all_close(spread, alone, rtol=1e-12, atol=1e-15)


def test_a_rate_can_be_differentiated_through():
    theta, g = jnp.array([0.5, 2.0]), jnp.array([1.0, -0.5])
    for constraint, options in [
        ("nonneg", {}),
        ("nonneg", {"log_state": True}),
        ("signed", {"beta": 0.3}),
        ("hypentropy", {"beta": 0.3}),
    ]:
        after = lambda rate, c=constraint, o=options: step(eg(rate, c, **o), theta, g)[0]
        slope = jax.jacfwd(after)(0.1)
        numeric = (after(0.1 + 1e-6) - after(0.1 - 1e-6)) / 2e-6
        np.testing.assert_allclose(slope, numeric, rtol=1e-8)


# --- the contract ------------------------------------------------------------------------------


# Two leaves are enough for optimizers that ask nothing of a leaf's name.
WAVE = 0.3 * np.cos(1.3 * np.arange(40) + 0.4).astype(np.float32)
PARAMS = {"bias": jnp.asarray(WAVE[:8]), "kernel": jnp.asarray(WAVE[8:].reshape(8, 4))}


def positive(x):
    return jnp.abs(x) + 0.1


def on_simplex(x):
    return positive(x) / jnp.sum(positive(x), axis=-1, keepdims=True) if x.ndim else x


def faster(constraint, **options):
    """Thirty times the contract's rate: updates are judged to some digits of their own, and what
    is computed as a difference of weights has only those of the weights."""

    def make(rate):
        scaled = (lambda count: 30 * rate(count)) if callable(rate) else 30 * rate
        return eg(scaled, constraint, **options)

    return make


CASES = {
    "nonneg": (eg, {"project": positive}),
    "simplex": (
        faster("simplex", log_state=True),
        {"project": on_simplex, "skip": ["scalars"]},  # a scalar has no axis to sum over
    ),
    "signed": (faster("signed", total=1e4), {}),
    "hypentropy": (functools.partial(eg, constraint="hypentropy", beta=0.1), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_contract(case):
    make, options = CASES[case]
    params = jax.tree.map(options.get("project", jnp.asarray), PARAMS)
    check_optimizer(make, params=params, **options)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0; got 0.0"),
        ({"learning_rate": -1.0}, "learning_rate must be greater than 0; got -1.0"),
        ({"constraint": "simplx"}, "constraint must be one of .*Did you mean 'simplex'"),
        ({"variant": "dual"}, "variant must be one of 'mirror', 'reparam'; got 'dual'"),
        ({"constraint": "simplex", "total": 0.0}, "total must be greater than 0; got 0.0"),
        ({"constraint": "hypentropy"}, "beta must be given"),
        ({"constraint": "hypentropy", "beta": 0.0}, "beta must be greater than 0; got 0.0"),
        (
            {"constraint": "hypentropy", "beta": np.array([1.0, -1.0])},
            "beta must be greater than 0; got array",
        ),
        ({"constraint": "signed", "beta": 0.1, "total": 1.0}, "total must be left out"),
        ({"total": 1.0}, "total must be left out under the constraint 'nonneg'"),
        ({"constraint": "simplex", "beta": 1.0}, "beta must be left out under .*'simplex'"),
        ({"constraint": "simplex", "variant": "reparam"}, "variant must be left out under"),
        ({"constraint": "signed", "log_state": True}, "log_state must be left out under"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        exponentiated_gradient(**({"learning_rate": 0.1} | options))


@pytest.mark.parametrize(
    ("optimizer", "params", "match"),
    [
        (eg(0.1), {"w": jnp.array([0.1, -0.2])}, r"params at 'w' must not be negative; got -0\.2"),
        (eg(0.1, "simplex"), jnp.array([1.2, -0.2]), "params must not be negative"),
        (eg(0.1, "simplex"), jnp.array([[0.5, 0.5], [0.5, 0.498]]), "rows of params must sum to 1"),
        (eg(0.1, "simplex"), jnp.zeros(3), "rows of params must sum to 1.0"),
        (eg(0.1, "simplex", total=2.0), jnp.array([0.5, 0.5]), "must sum to 2.0"),
        (eg(0.1, "simplex"), jnp.array(1.0), "must have at least one axis"),
        (eg(0.1), jnp.array([1, 2]), "floating-point"),
    ],
)
def test_parameters_are_checked(optimizer, params, match):
    with pytest.raises(ValueError, match=match):
        optimizer.init(params)
    state = eg(0.1).init(jnp.array([0.5]))
    with pytest.raises(ValueError, match=match):
        optimizer.update(params, state, params)


def test_rows_of_a_narrow_type_may_be_rounded():
    thirds = jnp.full(3, 1 / 3, jnp.bfloat16)
    assert abs(float(jnp.sum(thirds.astype(jnp.float32))) - 1) > 1e-3
    eg(0.1, "simplex").init(thirds)
    with pytest.raises(ValueError, match="must sum to 1"):
        eg(0.1, "simplex").init(0.9 * thirds)


def test_signed_parameters_fit_into_their_total():
    with pytest.raises(ValueError, match=r"sum is at most total = 1\.0; got 1\.5"):
        eg(0.1, "signed").init(jnp.array([1.0, -0.5]))
    # Later the pair is the truth, whatever has become of the parameters.
    optimizer, w = eg(0.1, "signed"), jnp.array([0.5, -0.5])
    new, _ = step(optimizer, 3 * w, jnp.zeros(2), optimizer.init(w))
    np.testing.assert_allclose(new, w, rtol=1e-14)


@pytest.mark.parametrize("constraint", ["nonneg", "simplex", "signed"])
def test_leaves_without_entries(constraint):
    new, _ = step(eg(0.1, constraint), jnp.zeros((0, 3)), jnp.zeros((0, 3)))
    assert new.shape == (0, 3)


def test_params_are_needed():
    optimizer = eg(0.1)
    state = optimizer.init(jnp.ones(2))
    with pytest.raises(ValueError, match="params must be given"):
        optimizer.update(jnp.ones(2), state)


def test_under_jit_checkify_finds_what_is_refused_outside():
    bad, g = jnp.array([0.7, -0.2]), jnp.ones(2)
    for constraint, match in (("nonneg", "must not be negative"), ("simplex", "must sum to")):
        optimizer = eg(0.1, constraint, checkify=True)
        named = lambda x: {"{w}": x}  # in a message that is a format
        good = named(jnp.array([0.5, 0.5]))
        state = optimizer.init(good)
        update = checkify.checkify(jax.jit(optimizer.update))
        error, _ = update(named(g), state, good)
        error.throw()
        wrong = bad if constraint == "nonneg" else jnp.abs(bad)
        error, _ = update(named(g), state, named(wrong))
        with pytest.raises(checkify.JaxRuntimeError, match=f"params at '{{w}}' {match}"):
            error.throw()
    # Without the option jit says nothing, and the update is what the formula gives.
    updates, _ = jax.jit(eg(0.1).update)(g, eg(0.1).init(jnp.ones(2)), bad)
    np.testing.assert_allclose(updates, bad * np.expm1(-0.1), rtol=1e-14)
