"""Tiger: the card's digits, a second implementation in NumPy, Lion, closed forms, bad gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxkit.optim import (
    is_update_step,
    keras_labels,
    piecewise_linear,
    scale_by_tiger,
    tiger,
    tiger_keras,
)
from jaxkit.optim._leaves import class_of
from tests.tolerance import tol

CENTRES = {"kernel": 0, "embedding": 0, "bias": 0, "gamma": 1}
PARAMS = {
    "kernel": np.array([[0.5, -0.25], [0.125, 1.0]]),
    "embedding": np.array([[0.3, 0.4], [-0.1, 0.1], [0.02, -0.04]]),
    "bias": np.array([0.1, -0.2]),
    "gamma": np.array([1.0, 0.5]),
}
PHASES = {"kernel": 0, "bias": 1, "gamma": 2, "embedding": 3}


def wave(params, step):
    """The card's gradients."""
    return {
        name: np.cos(0.9 * step + 0.6 * np.arange(p.size).reshape(p.shape) + PHASES[name])
        for name, p in params.items()
    }


def run(optimizer, params, history, dtype=jnp.float64, **extra_args):
    """Parameters and states after every step; updates are applied as optax applies them."""
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    params = cast(params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads, extra_args):
        updates, state = optimizer.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    after = []
    with jax.numpy_dtype_promotion("standard"):
        for grads in history:
            params, state = step(params, state, cast(grads), extra_args)
            after.append((params, state))
    return after


def by_hand(
    params, history, *, alpha, beta, decay, k=1, shrink=0.99, floor=0.0, lazy=None, touched=None
):
    """The card's recursion, row by row and in double precision; parameters, momenta by step."""
    theta = {name: np.array(p, np.float64) for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in theta.items()}
    seen = np.zeros(len(theta["embedding"]), bool)
    after = []
    rms = lambda x: max(np.sqrt(np.mean(x**2)), floor)
    for t, grads in enumerate(history, start=1):
        begins, ends = (t - 1) % k == 0, t % k == 0
        rate = alpha(t - 1) if callable(alpha) else alpha
        for name, g in grads.items():
            x, c = theta[name], CENTRES[name]
            if not np.isfinite(g).all():
                theta[name] = c + shrink * (x - c)
            elif name != "embedding":
                m[name] = (beta if begins else 1) * m[name] + (1 - beta) / k * g
                if ends and name == "kernel":
                    theta[name] = x - rate * rms(x) * (np.sign(m[name]) + decay * x)
                elif ends:
                    theta[name] = x - rate / 2 * np.sign(m[name])
            else:
                for r in range(len(x)):
                    hit = touched[r] if touched is not None else np.any(g[r] != 0)
                    fades = (hit and not seen[r]) if lazy == "full" else begins
                    if lazy != "full" or hit:
                        m[name][r] = (beta if fades else 1) * m[name][r] + (1 - beta) / k * g[r]
                    seen[r] |= hit
                    if ends and (lazy is None or seen[r]):
                        x[r] -= rate * rms(x[r]) * (np.sign(m[name][r]) + decay * x[r])
        if ends:
            seen[:] = False
        after.append(({n: v.copy() for n, v in theta.items()}, {n: v.copy() for n, v in m.items()}))
    return after


def agree(got, expected, rtol):
    for (params, state), (theta, m) in zip(got, expected, strict=True):
        for name in theta:
            np.testing.assert_allclose(params[name], theta[name], rtol=rtol, atol=1e-300)
            np.testing.assert_allclose(state.mu[name], m[name], rtol=100 * rtol, atol=1e-16)


# The card's digits -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_digits(dtype):
    history = [wave(PARAMS, t) for t in range(6)]
    after = run(tiger(0.1, 0.9, 0.1, rms_floor=0), PARAMS, history, dtype)
    digits = {
        (0, "kernel"): [0.4394967395, -0.3061815990, 0.0666575702, 1.0518599376],
        (5, "kernel"): [0.3778277616, -0.1005424509, 0.3759161005, 1.1948535999],
        (5, "embedding"): [
            0.3661813269,
            0.3715861646,
            -0.1133784201,
            0.0477494662,
            0.0062327662,
            -0.0460386982,
        ],
        (5, "bias"): [0.2, 0.1],
        (5, "gamma"): [1.2, 0.6],
    }
    for (step, name), expected in digits.items():
        got = after[step][0][name].ravel()
        np.testing.assert_allclose(got, expected, rtol=max(1e-8, tol(dtype, 6)), atol=6e-11)


def test_digits_of_a_bad_gradient():
    params = {**PARAMS, "gamma": np.array([1.2, 0.5])}
    history = [wave(params, t) for t in range(4)]
    history[2]["gamma"][0] = np.nan
    optimizer = tiger(0.1, 0.9, 0.1, accumulation_steps=2, rms_floor=0)
    after = run(optimizer, params, history)
    gammas = [after[step][0]["gamma"] for step in (1, 2, 3)]
    np.testing.assert_allclose(gammas, [[1.25, 0.55], [1.2475, 0.5545], [1.2975, 0.6045]])
    momentum = after[3][1].mu["gamma"]
    np.testing.assert_allclose(momentum, [-0.0699746833, -0.0619485552], atol=6e-11)
    untouched = run(optimizer, params, [wave(params, t) for t in range(4)])
    for name in ("kernel", "embedding", "bias"):
        np.testing.assert_array_equal(after[3][0][name], untouched[3][0][name])


# A second implementation -------------------------------------------------------------------------


def random_history(steps, seed=0):
    rng = np.random.default_rng(seed)
    history = [{n: rng.normal(size=p.shape) for n, p in PARAMS.items()} for _ in range(steps)]
    for grads in history:  # rows that no token of the batch has
        grads["embedding"][rng.uniform(size=3) < 0.5] = 0
    return history


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("lazy", [None, "param", "full"])
def test_equals_the_recursion_by_hand(k, lazy):
    history = random_history(12)
    history[4]["kernel"][0, 0] = np.inf  # within a window for k = 3, the first of one for k = 2
    history[6]["embedding"][2, 1] = np.nan
    history[7]["gamma"][1] = -np.inf
    schedule = lambda t: 0.01 * (1 + t)
    got = run(tiger(schedule, 0.9, 0.1, k, lazy=lazy), PARAMS, history)
    expected = by_hand(
        PARAMS, history, alpha=schedule, beta=0.9, decay=0.1, k=k, floor=1e-3, lazy=lazy
    )
    agree(got, expected, tol("float64", 12))


@pytest.mark.parametrize("lazy", ["param", "full"])
@pytest.mark.parametrize("key", ["embedding", (jax.tree_util.DictKey("embedding"),)])
def test_touched_rows_are_said_by_the_caller(lazy, key):
    rows = np.array([True, False, True])
    history = [wave(PARAMS, t) for t in range(4)]  # dense
    after = run(tiger(0.01, 0.9, 0.1, 2, lazy=lazy), PARAMS, history, touched_rows={key: rows})
    expected = by_hand(
        PARAMS, history, alpha=0.01, beta=0.9, decay=0.1, k=2, floor=1e-3, lazy=lazy, touched=rows
    )
    agree(after, expected, tol("float64", 4))
    np.testing.assert_array_equal(after[-1][0]["embedding"][1], PARAMS["embedding"][1])


@pytest.mark.parametrize(
    "rows",
    [
        {"embeddings": np.ones(3, bool)},
        {"embedding": np.ones(4, bool)},
        {"embedding": np.ones(3)},
        {"kernel": np.ones(2, bool)},
    ],
)
def test_touched_rows_that_fit_nothing(rows):
    optimizer = tiger(0.01, lazy="param")
    params = jax.tree.map(jnp.asarray, PARAMS)
    with pytest.raises(ValueError, match="touched_rows"):
        optimizer.update(params, optimizer.init(params), params, touched_rows=rows)


def test_a_row_at_rest_decays_unless_it_is_lazy():
    history = [{"embedding": np.array([[1.0, -1.0], [0.0, 0.0]])}] * 3
    params = {"embedding": np.array([[0.5, 0.5], [0.3, -0.4]])}
    plain = run(tiger(0.01), params, history)[-1][0]["embedding"]
    assert np.all(np.abs(plain[1]) < np.abs(params["embedding"][1]))
    for lazy in ("param", "full"):
        kept = run(tiger(0.01, lazy=lazy), params, history)[-1][0]["embedding"]
        np.testing.assert_array_equal(kept[1], params["embedding"][1])
        np.testing.assert_array_equal(kept[0], plain[0])


# Lion, accumulation, rates -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fixed_rate_is_lion_with_equal_betas(dtype, decay):
    rng = np.random.default_rng(1)
    history = [{n: rng.normal(size=p.shape) for n, p in PARAMS.items()} for _ in range(50)]
    ours = run(tiger(0.01, 0.9, decay, rate="fixed"), PARAMS, history, dtype)
    lion = run(optax.lion(0.01, b1=0.9, b2=0.9, weight_decay=decay), PARAMS, history, dtype)
    for name in PARAMS:
        np.testing.assert_array_equal(ours[-1][0][name], lion[-1][0][name])


@pytest.mark.x32
@pytest.mark.parametrize("k", [2, 4])
def test_accumulation_is_exact_and_equals_the_large_batch(k):
    steps = 5
    micro = random_history(steps * k)
    mean = lambda window: jax.tree.map(lambda *g: np.mean(g, axis=0), *window)
    windows = [mean(micro[i : i + k]) for i in range(0, len(micro), k)]
    small = run(tiger(0.01, accumulation_steps=k), PARAMS, micro, jnp.float32)
    large = run(tiger(0.01), PARAMS, windows, jnp.float32)
    for step in range(steps):
        params, state = small[(step + 1) * k - 1]
        for name in PARAMS:
            average = large[step][1].mu[name]
            np.testing.assert_allclose(state.mu[name], average, rtol=1e-6, atol=1e-8)
            np.testing.assert_allclose(params[name], large[step][0][name], rtol=1e-5, atol=1e-7)
    # Between the ends of windows nothing moves.
    for name in PARAMS:
        np.testing.assert_array_equal(small[k - 2][0][name], np.float32(PARAMS[name]))


def test_a_step_has_the_relative_size_of_the_rate():
    rng = np.random.default_rng(0)
    for shape in [(7, 5), (3, 4, 5), (1, 1)]:
        params = {"kernel": rng.normal(size=shape)}
        after = run(tiger(1e-3, weight_decay=0.0), params, [{"kernel": rng.normal(size=shape)}])
        change = np.linalg.norm(after[0][0]["kernel"] - params["kernel"])
        size = np.linalg.norm(params["kernel"])
        assert change / size == pytest.approx(1e-3, rel=1e-9)


def test_scaling_the_loss_changes_nothing():
    history = random_history(5)
    scaled = [jax.tree.map(lambda g: 1024.0 * g, grads) for grads in history]
    plain, large = (run(tiger(0.01), PARAMS, h)[-1][0] for h in (history, scaled))
    for name in PARAMS:
        np.testing.assert_array_equal(plain[name], large[name])


def test_scale_by_tiger_is_the_direction():
    history = random_history(6)
    chained = optax.chain(scale_by_tiger(0.9, 0.1, 2), optax.scale_by_learning_rate(0.01))
    whole = run(tiger(0.01, 0.9, 0.1, 2), PARAMS, history)[-1][0]
    parts = run(chained, PARAMS, history)[-1][0]
    for name in PARAMS:
        np.testing.assert_allclose(parts[name], whole[name], rtol=tol("float64"))
    history[0]["bias"][0] = np.nan
    kept = run(chained, PARAMS, history[:1])[-1][0]
    np.testing.assert_array_equal(kept["bias"], PARAMS["bias"])


def test_power_is_between_sign_and_momentum():
    history, params = random_history(4), {"kernel": PARAMS["kernel"]}
    history = [{"kernel": grads["kernel"]} for grads in history]
    gamma = lambda t: 1 - 0.25 * t
    after = run(tiger(0.1, 0.9, 0.0, rate="fixed", power=gamma), params, history)
    x, m = params["kernel"].copy(), 0.0
    for t, grads in enumerate(history):
        m = 0.9 * m + 0.1 * grads["kernel"]
        x = x - 0.1 * np.sign(m) * np.abs(m) ** (0.25 * t)
        np.testing.assert_allclose(after[t][0]["kernel"], x, rtol=tol("float64", 4))
    sgd = optax.chain(optax.ema(0.9, debias=False), optax.sgd(0.1))
    momentum = run(sgd, params, history)[-1][0]["kernel"]
    ours = run(tiger(0.1, 0.9, 0.0, rate="fixed", power=0.0), params, history)[-1][0]["kernel"]
    np.testing.assert_allclose(ours, momentum, rtol=tol("float64", 4))


# The embedding anomaly, in closed form -----------------------------------------------------------


def drift(optimizer, params, steps):
    """Every parameter of `steps` steps under a gradient of -1."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(lambda p: -p / p, params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1]


def test_drift_at_a_fixed_rate():
    drifted = drift(tiger(1e-3, weight_decay=0.01, rate="fixed"), jnp.asarray(0.02), 69_400)
    assert float(drifted[4999]) == pytest.approx(4.8961059, rel=1e-8)
    half = int(np.argmax(np.asarray(drifted) >= 50.0)) + 1
    assert abs(half - 69_314) <= 20  # ln 2 / (η λ), from 0.02 rather than 0


def test_drift_at_a_relative_rate_is_logistic():
    params = {"embedding": jnp.full((1, 2), 0.02)}
    drifted = drift(tiger(1e-3, weight_decay=0.01), params, 8_600)["embedding"][:, 0, 0]
    half = int(np.argmax(np.asarray(drifted) >= 50.0)) + 1
    assert abs(half - 8521) <= 1


@pytest.mark.x32
def test_momentum_in_float16_never_reaches_zero():
    optimizer = tiger(1e-3, mu_dtype=jnp.float16)
    params = {"kernel": jnp.ones((1, 1))}
    _, state = optimizer.update(params, optimizer.init(params), params)

    def step(state, _):
        updates, state = optimizer.update({"kernel": jnp.zeros((1, 1))}, state, params)
        return state, updates["kernel"]

    state, updates = jax.lax.scan(step, state, length=1000)
    assert float(state.mu["kernel"][0, 0]) == 14 * 2.0**-24
    assert float(updates[-1, 0, 0]) < -9e-4


@pytest.mark.x32
def test_momentum_in_float32_pushes_for_thousands_of_steps():
    """It goes below the normal numbers at step 2258, where it is flushed to zero or stalls."""
    _, update = tiger(1e-3)
    params = {"kernel": jnp.ones((1, 1))}
    state = tiger(1e-3).init(params)._replace(mu={"kernel": jnp.full((1, 1), 1e-3)})
    _, mu = jax.lax.scan(
        lambda state, _: (
            (new := update({"kernel": jnp.zeros((1, 1))}, state, params)[1]),
            new.mu["kernel"][0, 0],
        ),
        state,
        length=5000,
    )
    smallest = float(jnp.finfo(jnp.float32).tiny)
    assert float(mu[2256]) >= smallest
    flushed, stalled = 0.0, 14 * 2.0**-149
    assert np.float64(mu[-1]) in (flushed, stalled)


# Bad gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scope(bad):
    history = [wave(PARAMS, 0), wave(PARAMS, 1)]
    history[1]["bias"][1] = bad
    for scope in ("leaf", "global"):
        before, after = run(tiger(0.01, shrink=0.9, scope=scope), PARAMS, history)
        for name, centre in CENTRES.items():
            hit = name == "bias" or scope == "global"
            shrunk = centre + 0.9 * (before[0][name] - centre)
            assert np.allclose(after[0][name], shrunk, rtol=1e-14, atol=0) == hit, name
            assert np.array_equal(after[1].mu[name], before[1].mu[name]) == hit, name


@pytest.mark.x32
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_number_of_many_is_found(bad):
    """Reductions of large arrays are compiled in another way (a maximum on a CPU drops NaN)."""
    params = {"kernel": np.ones((300, 200))}
    history = [{"kernel": np.full((300, 200), 1e30)} for _ in range(2)]  # finite, if large
    history[1]["kernel"][17, 3] = bad
    (before, state), (after, last) = run(tiger(0.01), params, history, jnp.float32)
    assert np.all(np.asarray(before["kernel"]) < 1)
    np.testing.assert_allclose(after["kernel"], 0.99 * before["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(last.mu["kernel"], state.mu["kernel"])


@pytest.mark.x32
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_survives_overflow(dtype):
    """Squares of these parameters overflow in float16, and so does a gradient."""
    params = {"kernel": jnp.full((4, 4), 300.0, dtype)}
    optimizer = tiger(0.01, weight_decay=0.0)
    state = optimizer.init(params)
    assert state.mu["kernel"].dtype == jnp.float32
    updates, state = optimizer.update({"kernel": jnp.ones((4, 4), dtype)}, state, params)
    assert updates["kernel"].dtype == dtype
    np.testing.assert_allclose(np.asarray(updates["kernel"], np.float32), -3.0, rtol=4e-3)
    overflow = {"kernel": jnp.full((4, 4), 6e4, jnp.float32).astype(dtype) * 2}
    updates, state = optimizer.update(overflow, state, params)
    assert np.isfinite(np.asarray(updates["kernel"], np.float32)).all()
    assert np.isfinite(np.asarray(state.mu["kernel"])).all()


@pytest.mark.x32
def test_a_narrow_momentum_is_computed_in_float32():
    """β is no bfloat16; and what float16 cannot hold is a bad gradient, or m were Inf for ever."""
    params, history = {"kernel": np.ones((2, 2))}, [{"kernel": np.ones((2, 2))}]
    history += [{"kernel": np.full((2, 2), 1e-3)}] * 3
    after = run(tiger(0.01, mu_dtype=jnp.bfloat16), params, history, jnp.float32)
    m = jnp.zeros([], jnp.bfloat16)
    for grads, (_, state) in zip(history, after, strict=True):
        exact = 0.965 * float(m) + (1 - 0.965) * grads["kernel"][0, 0]
        m = jnp.asarray(exact, jnp.bfloat16)
        np.testing.assert_array_equal(state.mu["kernel"], m)
    history[1] = {"kernel": np.array([[1.0, 1e6], [1.0, 1.0]])}
    before, after = run(tiger(0.01, mu_dtype=jnp.float16), params, history[:2], jnp.float32)
    np.testing.assert_array_equal(after[1].mu["kernel"], before[1].mu["kernel"])
    np.testing.assert_allclose(after[0]["kernel"], 0.99 * before[0]["kernel"], rtol=1e-6)


def test_parameters_in_float64_are_updated_in_it():
    params = {"kernel": PARAMS["kernel"]}
    optimizer = tiger(0.1, weight_decay=0.0, mu_dtype=jnp.float32)
    params, state = run(optimizer, params, [{"kernel": np.ones((2, 2))}])[-1]
    assert state.mu["kernel"].dtype == jnp.float32
    rms = np.sqrt(np.mean(PARAMS["kernel"] ** 2))
    expected = PARAMS["kernel"] - 0.1 * rms
    np.testing.assert_allclose(params["kernel"], expected, rtol=tol("float64"))


def test_matrices_of_zeros_move_unless_as_in_the_reference():
    params, grads = {"kernel": np.zeros((2, 3))}, {"kernel": np.ones((2, 3))}
    moved = run(tiger(0.1), params, [grads])[-1][0]["kernel"]
    np.testing.assert_allclose(moved, -1e-4, rtol=1e-12)
    still = run(tiger(0.1, rms_floor=0.0), params, [grads])[-1][0]["kernel"]
    np.testing.assert_array_equal(still, 0.0)


# Half precision ----------------------------------------------------------------------------------


@pytest.mark.x32
@pytest.mark.parametrize(
    ("dtype", "rate", "share"),
    [
        ("float16", 1e-3, 0.002),
        ("float16", 2e-4, 0.44),
        ("float16", 1e-4, 0.70),
        ("bfloat16", 2e-3, 0.44),
        ("bfloat16", 1e-3, 0.69),
    ],
)
def test_small_steps_are_lost_unless_rounded_stochastically(dtype, rate, share):
    # The shares are those of weights of deviation 0.02: its place between two powers of 2 matters.
    x = np.random.default_rng(0).normal(scale=0.02, size=(200, 200))
    params = {"kernel": jnp.asarray(x, dtype)}
    grads = {"kernel": jnp.ones((200, 200), dtype)}

    def change(**options):
        optimizer = tiger(rate, weight_decay=0.0, **options)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        new = optax.apply_updates(params, updates)["kernel"]
        return np.asarray(new, np.float64) - np.asarray(params["kernel"], np.float64)

    assert np.mean(change() == 0) == pytest.approx(share, abs=0.01)
    # Now the mean step is that of the mathematics, to within the deviation of the rounding.
    stochastic = change(rounding_key=jax.random.key(0))
    spread = np.std(stochastic) / np.sqrt(stochastic.size)
    rms = np.sqrt(np.mean(np.asarray(params["kernel"], np.float64) ** 2))
    assert abs(np.mean(stochastic) + rate * rms) < 5 * spread


def test_stochastic_rounding_differs_by_step_and_leaf():
    params = {"a": jnp.full((64, 1), 0.3, jnp.bfloat16), "b": jnp.full((64, 1), 0.3, jnp.bfloat16)}
    optimizer = tiger(1e-3, rounding_key=jax.random.key(0))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    one, state = update(params, state, params)
    two, _ = update(params, state, params)
    assert not np.array_equal(one["a"], one["b"])
    assert not np.array_equal(one["a"], two["a"])


def bytes_per_parameter(optimizer):
    params = {"kernel": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) // 10**6


@pytest.mark.x32
def test_state_is_one_buffer_accumulation_included():
    both = lambda inner: optax.MultiSteps(inner, 4)
    assert bytes_per_parameter(tiger(1e-3, accumulation_steps=4)) == 4
    assert bytes_per_parameter(tiger(1e-3, accumulation_steps=4, mu_dtype=jnp.bfloat16)) == 2
    assert bytes_per_parameter(optax.lion(1e-3)) == 4
    assert bytes_per_parameter(both(optax.lion(1e-3))) == 8
    assert bytes_per_parameter(optax.adamw(1e-3)) == 8
    assert bytes_per_parameter(both(optax.adamw(1e-3))) == 12
    assert bytes_per_parameter(both(optax.lamb(1e-3))) == 12
    rows = {"embedding": jax.ShapeDtypeStruct((1000, 8), jnp.float32)}
    touched = jax.eval_shape(tiger(1e-3, lazy="param").init, rows).touched["embedding"]
    assert touched.size * touched.dtype.itemsize == 1000


# Classes -----------------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.gains = nnx.List([nnx.Param(jnp.ones(4)), nnx.Param(jnp.ones((4, 1)))])


def test_classes_of_a_flax_model():
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    for tree in (state, nnx.to_pure_dict(state)):
        labels = jax.tree_util.tree_map_with_path(class_of, tree)
        assert nnx.to_pure_dict(nnx.State(labels) if isinstance(labels, dict) else labels) == {
            "embed": {"embedding": "embedding"},
            "norm": {"scale": "gamma", "bias": "vector"},
            "dense": {"kernel": "matrix", "bias": "vector"},
            "gains": {0: "vector", 1: "matrix"},
        }


def test_classes_by_name():
    shapes = {"Gamma": (2, 2), "BIAS": (2, 2), "embeddings": (2,), "beta": (2, 2), "w": ()}
    tree = {name: jnp.ones(shape) for name, shape in shapes.items()}
    assert jax.tree_util.tree_map_with_path(class_of, {**tree, "bias": [jnp.ones((2, 2))]}) == {
        "Gamma": "gamma",
        "BIAS": "vector",
        "embeddings": "embedding",
        "beta": "vector",
        "w": "vector",
        "bias": ["vector"],
    }
    assert class_of((), jnp.ones((2, 2))) == "matrix"


def test_rows_are_those_of_the_last_axis():
    """Embeddings of three axes, of one, and of none, which is never lazy; by label_fn too."""
    rng = np.random.default_rng(0)
    params = {
        "embedding": rng.normal(size=(2, 3, 4)),
        "embeddings": rng.normal(size=4),
        "table": rng.normal(size=(3, 2)),
        "scalar": {"embedding": np.asarray(0.5)},
    }
    grads = jax.tree.map(np.ones_like, params)
    grads["embedding"][1, 2] = 0
    grads["embedding"][0, 0, 1:] = 0  # touched all the same
    grads["table"][0] = 0
    grads["scalar"]["embedding"] = np.asarray(0.0)
    label_fn = lambda path, leaf: "embedding" if "table" in jax.tree_util.keystr(path) else None
    after = run(tiger(0.1, weight_decay=0.5, lazy="full", label_fn=label_fn), params, [grads])
    moved, touched = after[0][0], after[0][1].touched
    for name in ("embedding", "embeddings", "table"):
        x, g = params[name], grads[name]
        size = np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
        stepped = x - 0.1 * size * (np.sign(g) + 0.5 * x)
        hit = np.any(g != 0, axis=-1, keepdims=True)
        np.testing.assert_allclose(moved[name], np.where(hit, stepped, x), rtol=tol("float64"))
        assert touched[name].shape == hit.shape
    scalar = moved["scalar"]["embedding"]  # with no gradient it decays as any other
    assert float(scalar) == pytest.approx(0.5 - 0.1 * 0.5 * 0.5 * 0.5, rel=1e-12)


def test_touched_rows_are_laid_out_as_their_embedding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"embedding": jax.device_put(jnp.ones((16, 2)), sharding)}
    optimizer = tiger(0.1, accumulation_steps=2, lazy="param")
    state = optimizer.init(params)
    _, later = jax.jit(optimizer.update)(params, state, params)
    for touched in (state.touched["embedding"], later.touched["embedding"]):
        assert touched.sharding.is_equivalent_to(sharding, 2)
    assert np.all(later.touched["embedding"])


def test_label_fn_goes_first():
    calls = []

    def label_fn(path, leaf):
        calls.append(jax.tree_util.keystr(path))
        return "gamma" if leaf.shape == (2, 2) else None

    grads = wave(PARAMS, 0)
    moved = run(tiger(0.1, label_fn=label_fn), PARAMS, [grads])[-1][0]
    expected = PARAMS["kernel"] - 0.05 * np.sign(grads["kernel"])
    np.testing.assert_allclose(moved["kernel"], expected, rtol=1e-14)
    plain = run(tiger(0.1), PARAMS, [grads])[-1][0]
    np.testing.assert_array_equal(moved["embedding"], plain["embedding"])
    assert "['kernel']" in calls
    with pytest.raises(ValueError, match="label_fn at 'kernel' must be one of 'vector', 'gamma'"):
        tiger(0.1, label_fn=lambda path, leaf: "weights", lazy="param").init(
            {"kernel": jnp.ones((2, 2))}
        )


# The state ---------------------------------------------------------------------------------------


def test_update_steps_are_told():
    optimizer = optax.chain(optax.scale(2.0), tiger(0.01, accumulation_steps=3))
    history = [wave(PARAMS, t) for t in range(6)]
    history[3]["bias"][0] = np.inf
    after = run(optimizer, PARAMS, history)
    told = [bool(optax.tree.get(state, "updated")) for _, state in after]
    assert told == [False, False, True, True, False, True]
    before = PARAMS
    for (params, state), expected in zip(after, told, strict=True):
        assert bool(is_update_step(state[1])) == expected
        same = all(np.array_equal(params[name], before[name]) for name in PARAMS)
        assert same != expected
        before = params


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.0}, "beta must be at least 0 and less than 1; got 1.0"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"beta": float("nan")}, "beta must be"),
        ({"accumulation_steps": 0}, "accumulation_steps must be an integer of at least 1; got 0"),
        ({"accumulation_steps": 2.0}, "accumulation_steps must be an integer"),
        ({"accumulation_steps": True}, "accumulation_steps must be an integer"),
        ({"shrink": 0.0}, "shrink must be greater than 0 and at most 1"),
        ({"shrink": 1.1}, "shrink must be"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"rms_floor": -1e-3}, "rms_floor must be at least 0"),
        ({"learning_rate": -1e-3}, "learning_rate must be at least 0"),
        ({"rate": "row"}, "rate must be one of 'rms', 'fixed'"),
        ({"lazy": "row"}, "lazy must be one of 'param', 'full'"),
        ({"scope": "tree"}, "scope must be one of 'leaf', 'global'"),
        ({"power": 1.5}, "power must be at least 0 and at most 1"),
        ({"mu_dtype": jnp.int8}, "mu_dtype must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiger(**{"learning_rate": 1e-3, **options})


def test_wrong_parameters():
    optimizer, params = tiger(1e-3), {"kernel": jnp.ones((2, 2))}
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="params must be given"):
        optimizer.update(params, state)
    for leaf in (jnp.arange(3), jnp.ones(3, jnp.complex64), 1.0):
        with pytest.raises(ValueError, match=r"params must have real floating-point leaves.*'ids'"):
            optimizer.init({"ids": leaf})


def test_options_can_be_injected():
    """Traced options, as `inject_hyperparams` gives them, mean the same."""
    history = random_history(4)
    injected = optax.inject_hyperparams(tiger)(1e-2, 0.9, 0.1, 2)
    plain = run(tiger(1e-2, 0.9, 0.1, 2), PARAMS, history)[-1][0]
    got = run(injected, PARAMS, history)[-1][0]
    for name in PARAMS:
        np.testing.assert_allclose(got[name], plain[name], rtol=tol("float32", 4))


# The reference code ------------------------------------------------------------------------------


def keras_by_hand(params, history, *, rate, beta, decay, k, knots, shrink):
    """What the reference code does to each variable, with its own schedule; double precision."""

    def schedule(t):
        steps = sorted(knots)
        if steps[0] != 0:
            return schedule_from({0: 0.0, **knots}, t)
        return schedule_from(knots, t)

    def schedule_from(points, t):
        steps = sorted(points)
        for left, right in itertools.pairwise(steps):
            if t < right:
                slope = (points[right] - points[left]) / (right - left)
                return points[left] + slope * (t - left)
        return points[steps[-1]]

    x = {name: p.copy() for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in params.items()}
    for t, grads in enumerate(history):
        lr = rate * schedule(t) if (t + 1) % k == 0 else 0.0
        for name, g in grads.items():
            nan = np.isnan(g).any()
            b1 = beta if t % k == 0 and not nan else 1.0
            m[name] = b1 * m[name] + (1 - beta) / k * (np.zeros_like(g) if nan else g)
            eta, lam, c = lr, decay, 0
            if any(part in name for part in ("bias", "beta", "gamma")):
                eta, lam, c = lr / 2, 0, int("gamma" in name)
            elif "embeddings" in name:
                eta = lr * np.sqrt(np.mean(x[name] ** 2, axis=-1, keepdims=True))
            else:
                eta = lr * np.sqrt(np.mean(x[name] ** 2))
            step = (np.sign(m[name]) + lam * x[name]) * eta
            x[name] = (x[name] - c) * shrink + c if nan else x[name] - step
    return x, m


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("knots", [{0: 1}, {3: 1.0, 9: 0.25}])
def test_keras_mode_step_by_step(k, knots):
    rng = np.random.default_rng(3)
    shapes = {
        "dense/kernel": (3, 2),
        "dense/bias": (2,),
        "embedding/embeddings": (4, 3),
        "norm/gamma": (3,),
        "norm/beta": (3,),
        "gain": (3,),
        "embedding_proj/kernel": (2, 2),
        "zeros": (2, 2),
    }
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params["zeros"][:] = 0
    history = [{n: rng.normal(size=s) for n, s in shapes.items()} for _ in range(12)]
    history[4]["norm/gamma"][0] = np.nan
    history[5]["gain"][2] = np.nan
    history[11]["dense/bias"][1] = np.inf
    expected, momentum = keras_by_hand(
        params, history, rate=0.05, beta=0.9, decay=0.1, k=k, knots=knots, shrink=0.95
    )
    optimizer = tiger_keras(0.05, 0.9, 0.1, k, knots, 0.95)
    # The schedule is a float32, as in the reference.
    for got, state in run(optimizer, params, history)[-1:]:
        for name in shapes:
            np.testing.assert_allclose(got[name], expected[name], rtol=tol("float32", 12))
            np.testing.assert_allclose(state.mu[name], momentum[name], rtol=1e-13)
    assert np.isinf(momentum["dense/bias"]).any()
    np.testing.assert_array_equal(got["zeros"], 0.0)


def test_keras_labels():
    tree = {
        "embed": {"embedding": jnp.ones((2, 2))},
        "embedding_proj": {"kernel": jnp.ones((2, 2))},
        "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2), "gain": jnp.ones(2)},
        "embeddings": {"table": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "gamma_net": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))},
        "rescale": {"kernel": jnp.ones((2, 2))},
    }
    assert jax.tree_util.tree_map_with_path(keras_labels, tree) == {
        "embed": {"embedding": "embedding"},
        "embedding_proj": {"kernel": "matrix"},
        "norm": {"scale": "gamma", "bias": "vector", "gain": "matrix"},
        "embeddings": {"table": "embedding", "bias": "vector"},
        "gamma_net": {"bias": "gamma", "kernel": "gamma"},
        "rescale": {"kernel": "matrix"},
    }


def test_schedule_of_the_reference():
    schedule = piecewise_linear({1000: 1, 2000: 0.1}, peak=2.0)
    rates = [float(schedule(t)) for t in (0, 250, 1000, 1500, 2000, 10**6)]
    np.testing.assert_allclose(rates, [0.0, 0.5, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)
    assert float(piecewise_linear({10: 1.0, 0: 0.5})(0)) == 0.5  # in any order
    assert float(jax.jit(piecewise_linear({5: 1}))(jnp.int32(1))) == pytest.approx(0.2)
    for knots in ({}, {-1: 1.0}, {0.5: 1.0}):
        with pytest.raises(ValueError, match="knots"):
            piecewise_linear(knots)
    # From (0, 0): the first update has the rate exactly 0.
    moved = run(tiger_keras(0.1, lr_schedule={2: 1.0}), PARAMS, [wave(PARAMS, 0)])[-1][0]
    for name in PARAMS:
        np.testing.assert_array_equal(moved[name], PARAMS[name])
    # The reference's defaults: a rate of 1e-3 from the first step.
    moved = run(tiger_keras(), PARAMS, [wave(PARAMS, 0)])[-1][0]["bias"]
    expected = PARAMS["bias"] - 5e-4 * np.sign(wave(PARAMS, 0)["bias"])
    np.testing.assert_allclose(moved, expected, rtol=1e-7)
