import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkit.ssm import scan
from jaxkit.ssm.scan import zoh_transition
from tests.tolerance import tol

diagonal_scan = jax.jit(scan.diagonal_scan, static_argnames=("reverse", "chunk_size", "axis"))


def planes(z):
    return jnp.asarray(z.real), jnp.asarray(z.imag)


def loop(a, b, x0=0.0):
    """x_k = a_k x_{k-1} + b_k, one step after the other; steps on axis 0."""
    a = np.broadcast_to(a, b.shape)
    states, x = [], x0
    for ak, bk in zip(a, b, strict=True):
        x = ak * x + bk
        states.append(x)
    return np.stack(states)


def draw(rng, shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def stable(rng, shape):
    return rng.uniform(0.3, 1.0, shape) * np.exp(1j * rng.uniform(0, 2 * np.pi, shape))


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("reverse", [False, True])
def test_complex_recurrence_equals_the_loop(chunk, reverse):
    rng = np.random.default_rng(0)
    a, b, x0 = stable(rng, (14, 3)), draw(rng, (14, 3)), draw(rng, (3,))
    re, im = diagonal_scan(
        planes(a), planes(b), initial=planes(x0), reverse=reverse, chunk_size=chunk
    )
    want = loop(a[::-1], b[::-1], x0)[::-1] if reverse else loop(a, b, x0)
    np.testing.assert_allclose(np.asarray(re) + 1j * np.asarray(im), want, atol=tol("float64", 14))


@given(
    length=st.integers(1, 20),
    chunk=st.one_of(st.none(), st.integers(1, 25)),
    kind=st.sampled_from(["all", "steps", "modes", "unit"]),
    start=st.booleans(),
)
@settings(deadline=None, max_examples=12)
def test_real_recurrence_broadcasts(length, chunk, kind, start):
    rng = np.random.default_rng(length)
    shape = {"all": (2, length, 3), "steps": (length, 3), "modes": (3,), "unit": (1, length, 1)}
    a, b = rng.uniform(-1, 1, shape[kind]), rng.standard_normal((2, length, 3))
    x0 = rng.standard_normal((2, 3)) if start else None
    got = diagonal_scan(
        jnp.asarray(a),
        jnp.asarray(b),
        initial=None if x0 is None else jnp.asarray(x0),
        chunk_size=chunk,
    )
    full = np.broadcast_to(a, b.shape)
    for i in range(2):
        want = loop(full[i], b[i], x0[i] if start else 0.0)
        np.testing.assert_allclose(got[i], want, atol=tol("float64", length))


@pytest.mark.parametrize("chunk", [None, 4])
def test_other_axes(chunk):
    rng = np.random.default_rng(0)
    b = rng.standard_normal((2, 9, 3, 4))
    a = rng.uniform(-1, 1, (3, 4))
    got = diagonal_scan(jnp.asarray(a), jnp.asarray(b), axis=-3, chunk_size=chunk)
    for i in range(2):
        np.testing.assert_allclose(got[i], loop(a, b[i]), atol=tol("float64", 9))
    vector = diagonal_scan(jnp.asarray(0.5), jnp.asarray(b[0, :, 0, 0]), axis=-1)
    np.testing.assert_allclose(vector, loop(0.5, b[0, :, 0, 0]), atol=tol("float64", 9))


def test_any_split_gives_the_same_states():
    rng = np.random.default_rng(1)
    a, b = planes(stable(rng, (12, 2))), planes(draw(rng, (12, 2)))
    whole = diagonal_scan(a, b)
    for cut in (1, 5, 11):
        first = diagonal_scan(tuple(p[:cut] for p in a), tuple(p[:cut] for p in b))
        second = diagonal_scan(
            tuple(p[cut:] for p in a),
            tuple(p[cut:] for p in b),
            initial=tuple(p[-1] for p in first),
        )
        for i in range(2):
            joined = jnp.concatenate([first[i], second[i]])
            np.testing.assert_allclose(joined, whole[i], atol=tol("float64", 12))


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradients_are_those_of_the_adjoint_recurrence(chunk):
    rng = np.random.default_rng(2)
    a, b, w = (draw(rng, (8, 2)) * 0.7 for _ in range(3))

    def loss(a, b):
        re, im = diagonal_scan(a, b, chunk_size=chunk)
        return jnp.sum(re * w.real) + jnp.sum(im * w.imag)

    grad_a, grad_b = jax.jit(jax.grad(loss, argnums=(0, 1)))(planes(a), planes(b))
    # λ_k = w_k + conj(a_{k+1}) λ_{k+1}; the cotangents are λ_k and λ_k conj(x_{k-1}).
    x, adjoint = loop(a, b), np.zeros((8, 2), complex)
    for k in reversed(range(8)):
        adjoint[k] = w[k] + (np.conj(a[k + 1]) * adjoint[k + 1] if k < 7 else 0)
    before = np.concatenate([np.zeros((1, 2)), x[:-1]])
    for got, want in ((grad_b, adjoint), (grad_a, adjoint * np.conj(before))):
        np.testing.assert_allclose(np.asarray(got[0]) + 1j * np.asarray(got[1]), want, rtol=1e-11)


@pytest.mark.parametrize("chunk", [None, 64])
def test_jit_vmap_and_float32(chunk):
    rng = np.random.default_rng(3)
    a, b = stable(rng, (2, 300, 4)), draw(rng, (2, 300, 4))
    low = [tuple(p.astype(jnp.float32) for p in planes(z)) for z in (a, b)]
    got = jax.jit(jax.vmap(lambda a, b: diagonal_scan(a, b, chunk_size=chunk)))(*low)
    assert got[0].dtype == jnp.float32
    for i in range(2):
        exact = loop(*(np.asarray(p[0][i], float) + 1j * np.asarray(p[1][i], float) for p in low))
        error = np.abs(np.asarray(got[0][i]) + 1j * np.asarray(got[1][i]) - exact).max()
        assert error < tol("float32", 300) * np.abs(exact).max()


def test_bfloat16_is_accumulated_in_float32():
    b = jnp.ones((1000, 1), jnp.bfloat16)
    got = diagonal_scan(jnp.ones((1,), jnp.bfloat16), b)
    assert got.dtype == jnp.bfloat16
    # In bfloat16 a sum of ones stops at 256.
    assert float(got[-1, 0]) == 1000.0


def test_chunks_need_less_memory_for_gradients():
    b = jax.ShapeDtypeStruct((1024, 16), jnp.float32)
    a = jax.ShapeDtypeStruct((16,), jnp.float32)

    def bytes_(chunk):
        loss = lambda a, b: jnp.sum(diagonal_scan(a, b, chunk_size=chunk) ** 2)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(a, b).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_(32) < 0.6 * bytes_(None)


def test_irregular_steps_equal_the_exact_solution():
    """Held input between irregular times: the matrix exponential of the augmented system."""
    from scipy.linalg import expm

    rng = np.random.default_rng(4)
    eigenvalues = np.array([-0.5 + 3j, -1e-9 + 1e-9j, -2.0 + 0j, 0j])
    steps, u = rng.uniform(0.01, 2.0, 6), rng.standard_normal(6)
    decay, gain = zoh_transition(planes(eigenvalues), jnp.asarray(steps))
    drive = tuple(g * jnp.asarray(u)[:, None] for g in gain)
    re, im = diagonal_scan(decay, drive)
    x = np.zeros(4, complex)
    for k in range(6):
        for n, eigenvalue in enumerate(eigenvalues):
            flow = expm(steps[k] * np.array([[eigenvalue, u[k]], [0, 0]]))
            x[n] = flow[0, 0] * x[n] + flow[0, 1]
        got = np.asarray(re[k]) + 1j * np.asarray(im[k])
        np.testing.assert_allclose(got, x, rtol=1e-12, atol=1e-13)


def test_splitting_a_step_changes_nothing():
    eigenvalues = planes(np.array([-0.3 + 2j, -1.0 + 0.1j]))
    whole, _ = zoh_transition(eigenvalues, jnp.asarray([0.75]))
    (re, im), gains = zoh_transition(eigenvalues, jnp.asarray([0.25, 0.5]))
    np.testing.assert_allclose(re[0] * re[1] - im[0] * im[1], whole[0][0], rtol=1e-14)
    both = diagonal_scan((re, im), gains)
    _, gain = zoh_transition(eigenvalues, jnp.asarray([0.75]))
    np.testing.assert_allclose(both[0][-1], gain[0][0], rtol=1e-14)
    np.testing.assert_allclose(both[1][-1], gain[1][0], rtol=1e-14)


def test_gain_keeps_its_digits_for_small_steps():
    import mpmath

    eigenvalues = np.array([-0.5 + 1.3j], np.complex128)
    step = np.float32(1e-4)
    low = tuple(p.astype(jnp.float32) for p in planes(eigenvalues))
    _, gain = zoh_transition(low, jnp.asarray([step]))
    lam = mpmath.mpc(float(low[0][0]), float(low[1][0]))
    want = mpmath.expm1(lam * mpmath.mpf(float(step))) / lam
    got = complex(float(gain[0][0, 0]), float(gain[1][0, 0]))
    # (e^z − 1)/Λ without expm1 would be wrong by 1e-3.
    assert abs(got - complex(want)) < 2e-7 * abs(complex(want))
    # The gradient at Λ = 0 exists: d/dΛ of the gain is Δ²/2 there, and the limit Δ is its value.
    value = zoh_transition(jnp.zeros(1), jnp.asarray([3.0]))[1]
    assert float(value[0, 0]) == 3.0
    slope = jax.grad(lambda z: zoh_transition(z, jnp.asarray([3.0]))[1].sum())(jnp.zeros(1))
    assert bool(jnp.isfinite(slope).all())


ones, raw = jnp.ones((4, 2)), scan.diagonal_scan


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: raw(ones, (ones, ones)), TypeError, "got 1 and 2 planes"),
        (
            lambda: raw(ones, ones, initial=(ones[0], ones[0])),
            TypeError,
            "initial and",
        ),
        (
            lambda: raw(ones.astype(complex), ones),
            TypeError,
            "decay must be an array",
        ),
        (lambda: raw(ones, ones.astype(int)), TypeError, "drive must be an array"),
        (
            lambda: raw((ones, ones[0]), (ones, ones)),
            ValueError,
            "planes of one shape",
        ),
        (lambda: raw((ones,) * 3, ones), ValueError, "pair"),
        (lambda: raw(jnp.ones((3, 2)), ones), ValueError, "decay must broadcast"),
        (lambda: raw(jnp.ones((1, 1, 4, 2)), ones), ValueError, "axes for drive"),
        (
            lambda: raw(ones, ones, initial=jnp.ones(3)),
            ValueError,
            "initial must have",
        ),
        (lambda: raw(ones, ones, chunk_size=0), ValueError, "chunk_size must be"),
        (lambda: raw(ones, ones, axis=0), ValueError, "axis must be"),
        (lambda: raw(ones[:0], ones[:0]), ValueError, "at least one step"),
        (lambda: zoh_transition(ones[0], jnp.asarray([0.1, 0.0])), ValueError, "steps must be"),
        (lambda: zoh_transition(ones[0], jnp.asarray([1])), TypeError, "steps must be"),
        (lambda: zoh_transition(ones[0].astype(complex), ones[0]), TypeError, "eigenvalues must"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()
