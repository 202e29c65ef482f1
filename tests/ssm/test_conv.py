import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter

from jaxkit.ssm.conv import fft_conv, fft_conv_bidirectional, fft_size
from tests.tolerance import tol


def direct(u, forward, backward=None, skip=None):
    """The double sum of the definition, in float64."""
    u = np.asarray(u, np.float64)
    length = u.shape[-2]
    y = np.zeros_like(u)
    for k in range(length):
        for j in range(length):
            taps = forward if j <= k else backward
            lag = k - j if j <= k else j - k - 1
            if taps is not None and lag < taps.shape[1]:
                y[..., k, :] += taps[:, lag] * u[..., j, :]
    return y if skip is None else y + skip * u


def smooth(n):
    for p in (2, 3, 5, 7):
        while n % p == 0:
            n //= p
    return n == 1


@given(st.integers(1, 5000))
@settings(deadline=None, max_examples=200)
def test_fft_size_is_the_next_smooth_number(n):
    assert fft_size(n) == next(k for k in range(n, 2 * n + 1) if smooth(k))
    assert fft_size(n, power_of_two=True) == next(
        k for k in range(n, 2 * n + 1) if k & (k - 1) == 0
    )


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("taps", [1, 5, 33, 40])
def test_causal_equals_the_double_sum(length, taps):
    rng = np.random.default_rng(length * 100 + taps)
    u = rng.standard_normal((2, 3, length, 4))
    kernel = rng.standard_normal((4, taps))
    skip = rng.standard_normal(4)
    got = fft_conv(jnp.asarray(u), jnp.asarray(kernel), skip=jnp.asarray(skip))
    assert got.shape == u.shape
    np.testing.assert_allclose(got, direct(u, kernel, skip=skip), atol=tol("float64", length))


def test_causal_equals_lfilter():
    rng = np.random.default_rng(0)
    u, taps = rng.standard_normal((200, 1)), rng.standard_normal((1, 200))
    want = lfilter(taps[0], [1.0], u[:, 0])
    got = fft_conv(jnp.asarray(u), jnp.asarray(taps))[:, 0]
    np.testing.assert_allclose(got, want, atol=np.abs(want).max() * tol("float64", 200))


@pytest.mark.parametrize("length", [1, 2, 8, 21])
@pytest.mark.parametrize("taps", [(1, 1), (21, 21), (4, 30)])
def test_bidirectional_equals_the_double_sum(length, taps):
    rng = np.random.default_rng(length)
    u = rng.standard_normal((2, length, 3))
    forward, backward = (rng.standard_normal((3, n)) for n in taps)
    skip = rng.standard_normal(3)
    got = fft_conv_bidirectional(
        jnp.asarray(u), jnp.asarray(forward), jnp.asarray(backward), skip=jnp.asarray(skip)
    )
    want = direct(u, forward, backward, skip)
    np.testing.assert_allclose(got, want, atol=tol("float64", length))


@pytest.mark.parametrize("length", [16, 15])
def test_bidirectional_is_the_card_s_two_l_periodic_kernel(length):
    """`[K_f, 0_L] + [0_L, flip K_b]`, whatever the size of the transform."""
    rng = np.random.default_rng(3)
    u, forward, backward = (rng.standard_normal(length) for _ in range(3))
    zeros = np.zeros(length)
    periodic = np.concatenate([forward, zeros]) + np.concatenate([zeros, backward[::-1]])
    want = np.fft.irfft(np.fft.rfft(periodic) * np.fft.rfft(u, 2 * length), 2 * length)[:length]
    got = fft_conv_bidirectional(
        jnp.asarray(u)[:, None], jnp.asarray(forward)[None], jnp.asarray(backward)[None]
    )[:, 0]
    np.testing.assert_allclose(got, want, atol=tol("float64", length) * 4)


def test_jacobian_is_lower_triangular_toeplitz():
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.standard_normal((1, 9)))
    jacobian = jax.jacobian(lambda u: fft_conv(u[:, None], kernel)[:, 0])(jnp.zeros(9))
    lags = np.subtract.outer(np.arange(9), np.arange(9))
    want = np.where(lags >= 0, np.asarray(kernel)[0, np.maximum(lags, 0)], 0.0)
    np.testing.assert_allclose(jacobian, want, atol=tol("float64", 9))


@pytest.mark.x32
@pytest.mark.parametrize("length", [100, 2048])
def test_float32_to_roundoff(length):
    rng = np.random.default_rng(0)
    u = rng.standard_normal((length, 2)).astype(np.float32)
    kernel = rng.standard_normal((2, length)).astype(np.float32)
    got = fft_conv(jnp.asarray(u), jnp.asarray(kernel))
    assert got.dtype == jnp.float32
    want = np.stack(
        [np.convolve(u[:, h].astype(float), kernel[h].astype(float))[:length] for h in range(2)], 1
    )
    # The error of an FFT is spread evenly: relative to the norms, not to each output.
    scale = np.linalg.norm(u, axis=0) * np.linalg.norm(kernel, axis=1)
    assert (np.abs(got - want) / scale).max() < tol("float32")


def test_bfloat16_input_is_convolved_in_float32():
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.standard_normal((512, 2)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((2, 512)), jnp.float32)
    got = fft_conv(u, kernel)
    assert got.dtype == jnp.bfloat16
    exact = fft_conv(u.astype(jnp.float32), kernel)
    assert bool(jnp.all(got == exact.astype(jnp.bfloat16)))
    text = str(jax.make_jaxpr(fft_conv)(u, kernel))
    assert "c64" in text
    assert "c128" not in text


def test_jit_vmap_grad():
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.standard_normal((3, 10, 2)))
    kernels = jnp.asarray(rng.standard_normal((3, 2, 10)))
    together = jax.jit(jax.vmap(fft_conv))(u, kernels)
    for i in range(3):
        np.testing.assert_allclose(together[i], direct(u[i], kernels[i]), atol=tol("float64", 10))
    weights = jnp.asarray(rng.standard_normal((10, 2)))
    # The gradient with respect to the taps is the correlation of weights and inputs.
    got = jax.grad(lambda k: jnp.sum(weights * fft_conv(u[0], k)))(kernels[0])
    w, x = np.asarray(weights), np.asarray(u[0])
    want = np.stack([(w[lag:] * x[: 10 - lag]).sum(0) for lag in range(10)], 1)
    np.testing.assert_allclose(got, want, atol=tol("float64", 10))


def test_mixed_dtypes_keep_the_dtype_of_the_input():
    u = jnp.ones((4, 1), jnp.float32)
    assert fft_conv(u, jnp.ones((1, 4), jnp.float64)).dtype == jnp.float32
    assert fft_conv(u.astype(jnp.float64), jnp.ones((1, 4), jnp.float32)).dtype == jnp.float64


@pytest.mark.parametrize(
    ("u", "kernel", "skip", "error", "match"),
    [
        (
            jnp.ones((4, 2), complex),
            jnp.ones((2, 4)),
            None,
            TypeError,
            "u must be an array of real",
        ),
        (jnp.ones((4, 2), int), jnp.ones((2, 4)), None, TypeError, "u must be .* int64"),
        (jnp.ones((4, 2)), jnp.ones((2, 4), complex), None, TypeError, "kernel must be"),
        (jnp.ones((4,)), jnp.ones((2, 4)), None, ValueError, r"u must be .*got shape \(4,\)"),
        (jnp.ones((0, 2)), jnp.ones((2, 4)), None, ValueError, "length at least 1"),
        (jnp.ones((4, 3)), jnp.ones((2, 4)), None, ValueError, r"3 heads of u.*\(2, 4\)"),
        (jnp.ones((4, 2)), jnp.ones((2, 0)), None, ValueError, "at least one tap"),
        (jnp.ones((4, 2)), jnp.ones((4,)), None, ValueError, "kernel must be"),
        (jnp.ones((4, 2)), jnp.ones((2, 4)), jnp.ones(3), ValueError, "skip must have 2 heads"),
        (jnp.ones((4, 2)), jnp.ones((2, 4)), jnp.ones((2, 1)), ValueError, "skip must be"),
    ],
)
def test_errors_name_the_argument(u, kernel, skip, error, match):
    with pytest.raises(error, match=match):
        fft_conv(u, kernel, skip=skip)
    both = match.replace("kernel", "kernel_forward")
    with pytest.raises(error, match=both):
        fft_conv_bidirectional(u, kernel, jnp.ones((2, 4)), skip=skip)


def test_errors_of_the_backward_kernel_and_of_the_size():
    with pytest.raises(ValueError, match="kernel_backward must be"):
        fft_conv_bidirectional(jnp.ones((4, 2)), jnp.ones((2, 4)), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="least must be at least 1; got 0"):
        fft_size(0)
    with pytest.raises(TypeError, match="least must be an integer"):
        fft_size(2.5)
