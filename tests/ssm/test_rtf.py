import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import lfilter

from jaxkit.ssm import rtf
from jaxkit.ssm.conv import fft_conv
from tests.tolerance import tol


def make(seed=0, heads=3, size=4, *, h0=False, slack=False):
    """Stable float64 parameters with poles up to .9, and nothing zero."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(heads):
        pairs = 0.9 * rng.uniform(0.2, 1, size // 2) * np.exp(1j * rng.uniform(0, 3, size // 2))
        real = rng.uniform(-0.9, 0.9, size % 2)
        rows.append(np.poly(np.concatenate([pairs, pairs.conj(), real])).real[1:])
    params = {"a": np.stack(rows), "b": rng.standard_normal((heads, size))}
    params["d"] = rng.standard_normal(heads)
    if h0:
        params["h0"] = rng.standard_normal(heads)
    if slack:
        params["slack"] = rng.standard_normal(heads)
    return {name: jnp.asarray(value) for name, value in params.items()}


def by_lfilter(params, l_max, length):
    """K from SciPy: the transposed dense solve for C, then the difference equation."""
    kernels = []
    for a, b in zip(np.asarray(rtf.denominator(params)), np.asarray(params["b"]), strict=True):
        size = len(a)
        companion = np.zeros((size, size))
        companion[0] = -a
        companion[1:, :-1] = np.eye(size - 1)
        power = np.linalg.matrix_power(companion, l_max)
        c = np.linalg.solve((np.eye(size) - power).T, b)
        impulse = np.eye(l_max)[0]
        kernels.append((c, lfilter(c, np.r_[1, a], impulse)))
    numerators, taps = (np.stack(part) for part in zip(*kernels, strict=True))
    if "h0" in params:
        taps = np.roll(taps, 1, axis=1)
        taps[:, 0] += np.asarray(params["h0"])
    return numerators, taps[:, :length]


def test_card_example():
    params = {"a": jnp.asarray([[-0.5]]), "b": jnp.ones((1, 1)), "d": jnp.zeros(1)}
    np.testing.assert_allclose(rtf.kernel(params, 4)[0], np.array([16, 8, 4, 2]) / 15, rtol=1e-14)
    np.testing.assert_allclose(rtf.numerator(params, l_max=4), [[16 / 15]], rtol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("l_max", [6, 17, 32])
@pytest.mark.parametrize("h0", [False, True])
@pytest.mark.parametrize("slack", [False, True])
def test_kernel_is_the_impulse_response_of_lfilter(size, l_max, h0, slack):
    params = make(size, size=size, h0=h0, slack=slack)
    c, want = by_lfilter(params, l_max, l_max)
    scale = np.abs(want).max() * tol("float64", l_max)
    np.testing.assert_allclose(rtf.kernel(params, l_max), want, atol=scale)
    np.testing.assert_allclose(rtf.kernel(params, 3, l_max=l_max), want[:, :3], atol=scale)
    np.testing.assert_allclose(rtf.numerator(params, l_max=l_max), c, atol=scale * 4)


def test_zero_denominator_is_a_finite_impulse_response():
    rng = np.random.default_rng(0)
    b = jnp.asarray(rng.standard_normal((2, 3)))
    params = {"a": jnp.zeros((2, 3)), "b": b, "d": jnp.zeros(2)}
    np.testing.assert_allclose(rtf.kernel(params, 8), np.pad(b, ((0, 0), (0, 5))), atol=1e-15)
    params["h0"] = jnp.asarray([1.0, -2.0])
    want = np.concatenate([params["h0"][:, None], b, np.zeros((2, 4))], axis=1)
    np.testing.assert_allclose(rtf.kernel(params, 8), want, atol=1e-15)


def test_the_paper_s_first_tap_holds_what_wraps_around():
    """K_0 = h_0 + C Ā^{L−1} B."""
    params = make(h0=True)
    c = np.asarray(rtf.numerator(params, l_max=9))
    for h in range(3):
        companion = np.zeros((4, 4))
        companion[0], companion[1:, :-1] = -np.asarray(params["a"][h]), np.eye(3)
        wrapped = c[h] @ np.linalg.matrix_power(companion, 8)[:, 0]
        got = float(rtf.kernel(params, 9)[h, 0])
        assert got == pytest.approx(float(params["h0"][h]) + wrapped, abs=1e-12)


@functools.cache
def stepped(length, h0):
    params = make(7, h0=h0)
    u = jnp.asarray(np.random.default_rng(1).standard_normal((2, length, 3)))
    system = rtf.discretize(params, l_max=length)
    state = rtf.init_state(3, 4, batch_shape=(2,), dtype=jnp.float64)

    def body(state, u):
        y, state = rtf.step(system, state, u)
        return state, y

    state, y = jax.jit(lambda s, u: jax.lax.scan(body, s, u))(state, jnp.moveaxis(u, 1, 0))
    return params, system, u, jnp.moveaxis(y, 0, 1), state


@pytest.mark.parametrize("h0", [False, True])
@pytest.mark.parametrize("length", [5, 24])
def test_steps_equal_the_convolution(length, h0):
    params, _, u, y, _ = stepped(length, h0)
    want = fft_conv(u, rtf.kernel(params, length), skip=params["d"])
    np.testing.assert_allclose(y, want, atol=float(jnp.abs(want).max()) * tol("float64", length))


@pytest.mark.parametrize("h0", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 64])
def test_any_chunking_gives_the_same_outputs_and_state(chunk, h0):
    _, system, u, y, last = stepped(24, h0)
    for cuts in ((24,), (10, 24), (1, 2, 17, 24)):
        state = rtf.init_state(3, 4, batch_shape=(2,), dtype=jnp.float64)
        parts, start = [], 0
        for cut in cuts:
            part, state = rtf.prefill(system, state, u[:, start:cut], chunk_size=chunk)
            parts.append(part)
            start = cut
        np.testing.assert_allclose(jnp.concatenate(parts, 1), y, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(state, last, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("h0", [False, True])
@pytest.mark.parametrize("new", [5, 12, 40])
def test_change_length_keeps_the_response(new, h0):
    params = make(3, h0=h0)
    changed = rtf.change_length(params, length=12, new_length=new)
    both = min(new, 12)
    old = np.asarray(rtf.kernel(params, 12))
    scale = np.abs(old).max() * tol("float64", 40) * 4
    np.testing.assert_allclose(rtf.kernel(changed, new)[:, :both], old[:, :both], atol=scale)
    first, second = rtf.discretize(params, l_max=12), rtf.discretize(changed, l_max=new)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one, other, atol=scale)


# --- stability


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_schur_cohn_agrees_with_the_roots(size):
    rng = np.random.default_rng(size)
    a = rng.uniform(-1, 1, (300, size)) * rng.uniform(0.2, 2, (300, 1))
    radius = np.array([np.abs(np.roots(np.r_[1, row])).max() for row in a])
    clear = np.abs(radius - 1) > 1e-6
    assert 30 < (radius < 1).sum() < 290
    got = np.asarray(rtf.is_stable(jnp.asarray(a)))
    assert np.array_equal(got[clear], radius[clear] < 1)
    margin = np.asarray(rtf.is_stable(jnp.asarray(a), margin=0.1))
    clear = np.abs(radius - 0.9) > 1e-6
    assert np.array_equal(margin[clear], radius[clear] < 0.9)


def test_l1_norm_is_only_sufficient():
    double = -np.array([1.8, -0.81])
    assert np.abs(double).sum() == pytest.approx(2.61)
    assert bool(rtf.is_stable(jnp.asarray(double)))
    assert not bool(rtf.is_stable(jnp.asarray([-1.0])))
    assert not bool(rtf.is_stable(jnp.asarray([jnp.nan, 0.0])))
    assert bool(jax.jit(rtf.is_stable)(jnp.zeros(3)))


def test_an_unstable_pole_wraps_around():
    """The documented trap: the kernel is the anti-causal response, not an error."""
    params = {"a": jnp.asarray([[-2.0]]), "b": jnp.ones((1, 1)), "d": jnp.zeros(1)}
    got = np.asarray(rtf.kernel(params, 8))[0]
    np.testing.assert_allclose(got, 2.0 ** np.arange(8) / (1 - 2.0**8), rtol=1e-13)
    assert not bool(rtf.is_stable(params["a"]).any())


@pytest.mark.parametrize("init", rtf.INITS)
def test_initial_denominators(init):
    params = rtf.init_params(jax.random.key(0), 200, 16, l_max=64, init=init)
    stable = float(jnp.mean(rtf.is_stable(rtf.denominator(params))))
    if init == "zeros":
        assert not params["a"].any()
    if init == "xavier":
        # The card: 24 % are not stable at d = 16 (three standard errors of 200 draws are 9 %).
        assert stable == pytest.approx(0.76, abs=0.09)
    else:
        assert stable == 1.0
    if init == "montel":
        assert float(jnp.abs(params["a"]).max()) <= 1 / 16
    assert bool((params["h0"] == 1).all())
    assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}


def test_l1_constraint_is_always_stable():
    params = rtf.init_params(
        jax.random.key(1), 100, 8, l_max=64, init="xavier", constraint="l1", dtype=jnp.float64
    )
    params["a"] = params["a"] * 100
    params["slack"] = params["slack"] * jnp.linspace(-1, 1, 100)
    bounded = rtf.denominator(params)
    total = np.abs(params["a"]).sum(1)
    want = np.asarray(params["a"]) / (total + np.abs(params["slack"]))[:, None]
    np.testing.assert_allclose(bounded, want, rtol=1e-14)
    assert bool(rtf.is_stable(bounded).all())
    zero = {"a": jnp.zeros((1, 2)), "slack": jnp.zeros(1)}
    assert not rtf.denominator(zero).any()


# --- transformations and dtypes


def test_gradient_against_finite_differences():
    params = make(2, heads=1, size=3, h0=True, slack=True)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((1, 10)))
    loss = jax.jit(lambda p: jnp.sum(weights * rtf.kernel(p, 10)))
    grads = jax.grad(loss)(params)
    for name in ("a", "b", "h0", "slack"):
        flat = params[name].ravel()
        for i in range(flat.size):
            move = lambda t: {
                **params,
                name: flat.at[i].add(t).reshape(params[name].shape),  # noqa: B023
            }
            want = (loss(move(1e-6)) - loss(move(-1e-6))) / 2e-6
            assert float(grads[name].ravel()[i]) == pytest.approx(float(want), abs=1e-7)


@pytest.mark.x32
def test_float32_and_bfloat16_inputs():
    params = rtf.init_params(jax.random.key(0), 4, 8, l_max=128, init="montel")
    wide = {name: np.asarray(value, np.float64) for name, value in params.items()}
    _, want = by_lfilter(wide, 128, 128)
    got = rtf.kernel(params, 128)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=tol("float32", 8) * np.abs(want).max())
    system = rtf.discretize(params, l_max=128)
    u = jnp.ones((2, 10, 4), jnp.bfloat16)
    y, state = jax.jit(rtf.prefill)(system, rtf.init_state(4, 8, batch_shape=(2,)), u)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


def test_vmap_over_parameters():
    one, two = make(0), make(1)
    both = jax.tree.map(lambda *x: jnp.stack(x), one, two)
    got = jax.vmap(lambda p: rtf.kernel(p, 8))(both)
    np.testing.assert_allclose(got[1], rtf.kernel(two, 8), atol=1e-12)


params_ = make()
key_ = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: rtf.init_params(key_, 2, 8, l_max=8), ValueError, r"less than l_max = 8 \(d < L"),
        (lambda: rtf.init_params(key_, 2, 0, l_max=8), ValueError, "state_size must be at least 1"),
        (lambda: rtf.init_params(key_, 0, 4, l_max=8), ValueError, "heads must be at least 1"),
        (lambda: rtf.init_params(key_, 2, 4, init="zero"), ValueError, "Did you mean 'zeros'"),
        (lambda: rtf.init_params(key_, 2, 4, constraint="l2"), ValueError, "constraint must be"),
        (lambda: rtf.init_params(key_, 2, 4, dtype=jnp.bfloat16), TypeError, "dtype must be"),
        (lambda: rtf.kernel(params_, 4), ValueError, "d < L"),
        (lambda: rtf.kernel(params_, 0), ValueError, "length must be at least 1; got 0"),
        (lambda: rtf.kernel(params_, 9, l_max=8), ValueError, "at most l_max = 8.*change_length"),
        (lambda: rtf.kernel(params_, 8, rate=2.0), ValueError, "rate must be 1"),
        (lambda: rtf.discretize(params_, l_max=4), ValueError, "d < L"),
        (lambda: rtf.discretize(params_, l_max=8, rate=0.5), ValueError, "rate must be 1"),
        (lambda: rtf.change_length(params_, length=8, new_length=3), ValueError, "new_length"),
        (lambda: rtf.kernel({"a": params_["a"]}, 8), ValueError, "params must hold 'b'"),
        (
            lambda: rtf.kernel({**params_, "b": jnp.ones((3, 5))}, 8),
            ValueError,
            r"one shape \[heads, d\]",
        ),
        (
            lambda: rtf.kernel({**params_, "b": jnp.ones((3, 4), complex)}, 8),
            TypeError,
            r"params\['b'\] must be an array of real",
        ),
        (lambda: rtf.is_stable(jnp.ones((2, 0))), ValueError, "at least one coefficient"),
        (lambda: rtf.is_stable(jnp.ones(2, complex)), TypeError, "a must be an array of real"),
        (lambda: rtf.is_stable(jnp.ones(2), margin=1.0), ValueError, "margin must be below 1"),
        (lambda: rtf.init_state(0, 4), ValueError, "heads must be at least 1"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("shape", "dtype", "error"),
    [((5, 2), float, ValueError), ((3,), float, ValueError), ((5, 3), complex, TypeError)],
)
def test_wrong_inputs(shape, dtype, error):
    system = rtf.discretize(params_, l_max=8)
    state = rtf.init_state(3, 4, dtype=jnp.float64)
    with pytest.raises(error, match="u must"):
        rtf.prefill(system, state, jnp.ones(shape, dtype))
    with pytest.raises(error, match="u must"):
        rtf.step(system, state, jnp.ones(shape[-1:] if len(shape) > 1 else (4,), dtype))
    with pytest.raises(ValueError, match="state must have shape"):
        rtf.step(system, state[:2], jnp.ones(3))
    with pytest.raises(ValueError, match="chunk_size must be"):
        rtf.prefill(system, state, jnp.ones((5, 3)), chunk_size=0)
