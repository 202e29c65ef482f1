import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from scipy.signal import cont2discrete

from jaxkit.ssm import s5
from jaxkit.ssm.conv import fft_conv
from tests.tolerance import tol

HEADS, SIZE, LENGTH = 3, 8, 12
apply = jax.jit(s5.apply, static_argnames=("discretization", "chunk_size", "stability"))
prefill = jax.jit(s5.prefill, static_argnames="chunk_size")


@functools.cache
def make(*, bidirectional=False, seed=0):
    params = s5.init_params(
        jax.random.key(seed),
        HEADS,
        SIZE,
        blocks=2,
        dt_min=0.05,
        dt_max=0.5,
        bidirectional=bidirectional,
        dtype=jnp.float64,
    )
    u = np.random.default_rng(seed).standard_normal((2, LENGTH, HEADS))
    return params, jnp.asarray(u)


def host(params):
    """Λ, B, C, Δ and D in NumPy."""
    value = {name: np.asarray(part, np.float64) for name, part in params.items()}
    pair = lambda part: part[..., 0] + 1j * part[..., 1]
    eigenvalues = -np.exp(value["log_neg_re"]) + 1j * value["im"]
    return eigenvalues, pair(value["b"]), pair(value["c"]), np.exp(value["log_step"]), value["d"]


def loop(params, u, discretization="zoh", rate=1.0, steps=None):
    """The recurrence on all N states (both members of each pair), by SciPy."""
    eigenvalues, b, c, delta, d = host(params)
    outputs = []
    for example in np.asarray(u):
        x = np.zeros(2 * len(eigenvalues), complex)
        rows = []
        for k, now in enumerate(example):
            held = 1.0 if steps is None else steps[k]
            for i, lam in enumerate(np.concatenate([eigenvalues, eigenvalues.conj()])):
                n = i % len(eigenvalues)
                drive = (b[n] if i < len(eigenvalues) else b[n].conj()) @ now
                dt = rate * held * delta[n]
                if discretization == "zoh":
                    flow = expm(dt * np.array([[lam, drive], [0, 0]]))
                    x[i] = flow[0, 0] * x[i] + flow[0, 1]
                else:
                    a_bar, b_bar, *_ = cont2discrete(
                        (np.array([[lam]]), np.array([[drive]]), np.eye(1), np.zeros((1, 1))),
                        dt,
                        "bilinear",
                    )
                    x[i] = a_bar[0, 0] * x[i] + b_bar[0, 0]
            rows.append((np.concatenate([c, c.conj()], axis=1) @ x).real + d * now)
        outputs.append(rows)
    return np.asarray(outputs)


def test_initial_spectrum_is_that_of_the_normal_part_of_legs():
    params = s5.init_params(jax.random.key(0), 2, 16, blocks=2, dtype=jnp.float64)
    r = np.sqrt(2 * np.arange(8) + 1.0)
    legs = -np.tril(np.outer(r, r), -1) - np.diag(np.arange(8) + 1.0)
    p = r / np.sqrt(2)
    eigenvalues = np.linalg.eigvals(legs + np.outer(p, p))
    want = np.sort(eigenvalues.imag[eigenvalues.imag > 0])
    assert np.allclose(eigenvalues.real, -0.5, atol=1e-10)
    np.testing.assert_allclose(params["im"], np.tile(want, 2), rtol=1e-9)
    # The card's digits for N = 8.
    card = [0.4274887123, 1.9577941509, 5.3542085150, 19.8574103710]
    np.testing.assert_allclose(params["im"][:4], card, atol=5e-11)
    np.testing.assert_allclose(-jnp.exp(params["log_neg_re"]), -0.5, rtol=1e-14)


def test_initial_scales():
    params = s5.init_params(jax.random.key(1), 64, 128, blocks=4, bidirectional=True)
    variance = lambda part: float(jnp.mean(jnp.sum(part**2, axis=-1)))
    # 4096 complex entries: a relative standard error of 1/64.
    assert variance(params["b"]) == pytest.approx(1 / 64, rel=5 / 64)
    assert variance(params["c"]) == pytest.approx(1 / 128, rel=5 / 64)
    assert not np.array_equal(params["c"], params["c_backward"])
    assert float(params["log_step"].min()) >= np.log(1e-3)
    assert float(params["log_step"].max()) <= np.log(1e-1)
    assert params["log_step"].shape == (64,)
    assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("discretization", s5.DISCRETIZATIONS)
@pytest.mark.parametrize("chunk", [None, 5])
def test_scan_equals_the_full_recurrence(discretization, chunk):
    params, u = make()
    got = apply(params, u, discretization=discretization, chunk_size=chunk)
    want = loop(params, u, discretization)
    np.testing.assert_allclose(got, want, atol=tol("float64", LENGTH) * 4)


@pytest.mark.parametrize("discretization", s5.DISCRETIZATIONS)
def test_steps_and_any_split_equal_the_scan(discretization):
    params, u = make()
    want = apply(params, u, discretization=discretization)
    system = s5.discretize(params, discretization=discretization)
    state = s5.init_state(SIZE, batch_shape=(2,), dtype=jnp.float64)
    one = jax.jit(s5.step)
    outputs = []
    for k in range(LENGTH):
        y, state = one(system, state, u[:, k])
        outputs.append(y)
    np.testing.assert_allclose(jnp.stack(outputs, 1), want, atol=tol("float64", LENGTH))
    last = state
    for cuts in ((LENGTH,), (1, LENGTH), (5, 6, LENGTH)):
        state = s5.init_state(SIZE, batch_shape=(2,), dtype=jnp.float64)
        parts, start = [], 0
        for cut in cuts:
            part, state = prefill(system, state, u[:, start:cut], chunk_size=4)
            parts.append(part)
            start = cut
        np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=tol("float64", LENGTH))
        np.testing.assert_allclose(state, last, atol=tol("float64", LENGTH))


def test_bidirectional_runs_a_second_scan_from_the_end():
    params, u = make(bidirectional=True)
    forward = {name: value for name, value in params.items() if name != "c_backward"}
    backward = {**forward, "c": params["c_backward"], "d": jnp.zeros(HEADS)}
    want = apply(forward, u) + jnp.flip(apply(backward, jnp.flip(u, 1)), 1)
    np.testing.assert_allclose(apply(params, u), want, atol=tol("float64", LENGTH))
    np.testing.assert_allclose(apply(forward, u), loop(forward, u), atol=tol("float64", LENGTH) * 4)


def test_causality_by_the_jacobian():
    params, u = make()
    jacobian = jax.jacobian(lambda x: apply(params, x))(u[0])
    for k in range(LENGTH):
        assert not jacobian[k, :, k + 1 :].any()
        assert jacobian[k, :, k].any()


def test_one_input_one_output_is_a_diagonal_layer():
    """K_l = 2 Re Σ C Ā^l B̄ of every pair of channels, by convolution."""
    params, u = make()
    eigenvalues, b, c, delta, d = host(params)
    powers = np.exp(np.outer(np.arange(LENGTH), delta * eigenvalues))
    b_bar = (np.expm1(delta * eigenvalues) / eigenvalues)[:, None] * b
    want = np.asarray(u) * d
    for j in range(HEADS):
        taps = 2 * np.einsum("hm,lm,m->hl", c, powers, b_bar[:, j]).real
        one = jnp.broadcast_to(u[..., j : j + 1], u.shape)
        want = want + np.asarray(fft_conv(one, jnp.asarray(taps)))
    np.testing.assert_allclose(apply(params, u), want, atol=tol("float64", LENGTH) * 4)


def test_irregular_steps():
    params, u = make()
    steps = np.random.default_rng(3).uniform(0.1, 3.0, LENGTH)
    want = loop(params, u, steps=steps)
    for given in (steps, np.tile(steps, (2, 1))):
        got = apply(params, u, steps=jnp.asarray(given))
        np.testing.assert_allclose(got, want, atol=tol("float64", LENGTH) * 4)
    same = apply(params, u, steps=jnp.ones(LENGTH))
    np.testing.assert_allclose(same, apply(params, u), atol=tol("float64", LENGTH))


def test_rate_is_exact_for_held_inputs():
    """Twice the step = the same held signal with every input given twice, read every second."""
    params, u = make()
    params = {**params, "d": jnp.zeros(HEADS)}
    held = apply(params, jnp.repeat(u, 2, axis=1))[:, 1::2]
    np.testing.assert_allclose(apply(params, u, rate=2.0), held, atol=tol("float64", LENGTH))
    np.testing.assert_allclose(
        apply(params, u, rate=0.5, discretization="bilinear"),
        loop(params, u, "bilinear", rate=0.5),
        atol=tol("float64", LENGTH) * 4,
    )


def test_gradients_flow_to_every_parameter():
    params, u = make(bidirectional=True)
    loss = jax.jit(lambda p: jnp.sum(apply(p, u, chunk_size=4) ** 2))
    grads = jax.grad(loss)(params)
    for name, value in params.items():
        direction = jnp.asarray(np.random.default_rng(0).standard_normal(value.shape))
        move = lambda t: loss({**params, name: value + t * direction})  # noqa: B023
        want = (move(1e-5) - move(-1e-5)) / 2e-5
        got = jnp.sum(grads[name] * direction)
        assert float(got) == pytest.approx(float(want), rel=1e-6, abs=1e-6)


@pytest.mark.x32
def test_float32_and_bfloat16():
    params = s5.init_params(jax.random.key(0), 4, 16)
    u = jnp.asarray(np.random.default_rng(0).standard_normal((1, 48, 4)), jnp.float32)
    got = apply(params, u)
    eigenvalues, b, c, delta, d = host(params)
    a_bar = np.exp(delta * eigenvalues)
    b_bar = (np.expm1(delta * eigenvalues) / eigenvalues)[:, None] * b
    x, want = np.zeros(8, complex), []
    for now in np.asarray(u[0], float):
        x = a_bar * x + b_bar @ now
        want.append(2 * (c @ x).real + d * now)
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got[0]) - np.array(want)).max() / np.abs(want).max()
    assert error < tol("float32", 16)
    low = apply(params, u.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    system, state = s5.discretize(params), s5.init_state(16, batch_shape=(1,))
    y, state = s5.step(system, state, u[:, 0].astype(jnp.bfloat16))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.complex64)


key = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: s5.init_params(key, 2, 7), ValueError, "state_size must be even"),
        (lambda: s5.init_params(key, 2, 12, blocks=4), ValueError, "multiple of blocks = 4"),
        (lambda: s5.init_params(key, 2, 8, blocks=0), ValueError, "blocks must be at least 1"),
        (lambda: s5.init_params(key, 0, 8), ValueError, "heads must be at least 1"),
        (lambda: s5.init_params(key, 2, 8, dt_min=0.0), ValueError, "dt_min must be"),
        (lambda: s5.init_params(key, 2, 8, dt_min=0.2), ValueError, "dt_min must be less than"),
        (lambda: s5.init_params(key, 2, 8, stability="tanh"), ValueError, "stability must be"),
        (lambda: s5.init_params(key, 2, 8, dtype=jnp.float16), TypeError, "dtype must be"),
        (lambda: s5.discretize(make()[0], rate=0.0), ValueError, "rate must be"),
        (lambda: s5.discretize(make()[0], discretization="zo"), ValueError, "Did you mean 'zoh'"),
        (lambda: s5.apply(make()[0], jnp.ones((4, 2))), ValueError, "heads = 3"),
        (lambda: s5.apply(make()[0], jnp.ones(3)), ValueError, "u must have shape"),
        (lambda: s5.apply(make()[0], jnp.ones((0, 3))), ValueError, "at least one position"),
        (lambda: s5.apply(make()[0], jnp.ones((4, 3), complex)), TypeError, "u must be an array"),
        (
            lambda: s5.apply(make()[0], jnp.ones((4, 3)), steps=jnp.ones(5)),
            ValueError,
            "steps must have shape",
        ),
        (
            lambda: s5.apply(make()[0], jnp.ones((4, 3)), steps=-jnp.ones(4)),
            ValueError,
            "steps must be positive",
        ),
        (
            lambda: s5.apply(
                make()[0], jnp.ones((4, 3)), steps=jnp.ones(4), discretization="bilinear"
            ),
            ValueError,
            "steps needs discretization 'zoh'",
        ),
        (lambda: s5.init_state(5), ValueError, "state_size must be even"),
        (
            lambda: s5.step(s5.discretize(make()[0]), s5.init_state(6), jnp.ones(3)),
            ValueError,
            "state must have shape",
        ),
        (
            lambda: s5.prefill(s5.discretize(make()[0]), s5.init_state(8), jnp.ones((2, 4, 3))),
            ValueError,
            "state must have shape",
        ),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_no_step_for_a_bidirectional_layer():
    params, _ = make(bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional"):
        s5.discretize(params)
