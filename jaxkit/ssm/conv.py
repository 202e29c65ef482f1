"""Causal and bidirectional convolution of sequences with per-channel kernels, by FFT.

Sequences are `[..., length, heads]`, kernels `[heads, taps]`. The transforms run in float32 at
least, whatever the input: a bfloat16 FFT would lose the tail of every long kernel.
"""

from functools import cache

import jax
import jax.numpy as jnp

from jaxkit._checks import check_axis, check_floating, check_int
from jaxkit._typing import Array, Float

__all__ = ["fft_conv", "fft_conv_bidirectional", "fft_size"]


@cache
def fft_size(least: int, *, power_of_two: bool = False) -> int:
    """The smallest transform size from `least` up whose only prime factors are 2, 3, 5, 7.

    Args:
      least: what the size must reach, at least 1.
      power_of_two: take the next power of two instead (the fast size on TPU).

    Returns:
      The size.

    Raises:
      TypeError: `least` is not an integer.
      ValueError: `least` is below 1.

    Example:
      >>> fft_size(2 * 1000 - 1), fft_size(1999, power_of_two=True)
      (2000, 2048)
    """
    least = check_int("least", least, least=1)
    best = 1 << (least - 1).bit_length()
    if power_of_two:
        return best
    seven = 1
    while seven < best:
        five = seven
        while five < best:
            three = five
            while three < best:
                two = three << max(0, -(-least // three) - 1).bit_length()
                best = min(best, two)
                three *= 3
            five *= 5
        seven *= 7
    return best


def _check(u: Array, kernels: dict[str, Array], skip: Array | None) -> None:
    check_floating("u", u)
    if u.ndim < 2 or u.shape[-2] < 1:
        raise ValueError(
            f"u must be [..., length, heads] with length at least 1; got shape {tuple(u.shape)}."
        )
    heads = u.shape[-1]
    for name, kernel in kernels.items():
        check_floating(name, kernel)
        if kernel.ndim != 2 or kernel.shape[0] != heads or kernel.shape[1] < 1:
            raise ValueError(
                f"{name} must be [heads, taps] with the {heads} heads of u and at least one tap; "
                f"got shape {tuple(kernel.shape)}."
            )
    if skip is not None:
        check_floating("skip", skip)
        if skip.ndim != 1:
            raise ValueError(f"skip must be [heads]; got shape {tuple(skip.shape)}.")
        check_axis("skip", skip, 0, heads, "heads")


def _compute_dtype(*arrays: Array | None):
    wide = any(x is not None and x.dtype == jnp.float64 for x in arrays)
    return jnp.float64 if wide else jnp.float32


def _convolve(u: Array, rows: Array, size: int, skip: Array | None) -> Array:
    """Circular convolution of size `size` along the length axis; `rows` is [heads, <= size]."""
    work = rows.dtype
    length = u.shape[-2]
    signal = u.astype(work)
    spectrum = jnp.fft.rfft(rows, size, axis=-1).T
    transform = jnp.fft.rfft(signal, size, axis=-2)
    product = transform * jnp.expand_dims(spectrum, range(u.ndim - 2))
    y = jnp.fft.irfft(product, size, axis=-2)[..., :length, :]
    if skip is not None:
        y = y + signal * jnp.expand_dims(skip.astype(work), range(u.ndim - 1))
    return y.astype(u.dtype)


def fft_conv(
    u: Float[Array, "*batch length heads"],
    kernel: Float[Array, "heads taps"],
    *,
    skip: Float[Array, "heads"] | None = None,
) -> Float[Array, "*batch length heads"]:
    """Causal convolution of every channel with its own kernel, in O(L log L).

    `y_k = Σ_{j≤k} K_{k-j} u_j + D u_k`, by transforms of size n ≥ 2L-1, so that nothing wraps.
    Taps from `length` on cannot reach the output and are left out; missing taps are zeros.

    Args:
      u: real inputs; any batch axes, then positions, then channels.
      kernel: impulse responses, one row for each channel.
      skip: direct term D, one number for each channel.

    Returns:
      Outputs, with the shape and dtype of `u`. The work is done in float32 (float64 if an argument
      is float64).

    Raises:
      TypeError: an argument is not an array of real floating-point numbers.
      ValueError: `u` has no positions, or the channels of `kernel` or `skip` are not those of `u`.

    Example:
      >>> import jax.numpy as jnp
      >>> u = jnp.asarray([[1.0], [0.0], [2.0]])
      >>> fft_conv(u, jnp.asarray([[1.0, 0.5, 0.25]]))[:, 0].round(3).tolist()
      [1.0, 0.5, 2.25]

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396), section 2.4; post 10162 on kexue.fm (whose
    `u_{L-k}` is off by one).
    """
    _check(u, {"kernel": kernel}, skip)
    work = _compute_dtype(u, kernel, skip)
    length = u.shape[-2]
    rows = kernel[:, :length].astype(work)
    size = fft_size(length + rows.shape[1] - 1, power_of_two=jax.default_backend() == "tpu")
    return _convolve(u, rows, size, skip)


def fft_conv_bidirectional(
    u: Float[Array, "*batch length heads"],
    kernel_forward: Float[Array, "heads taps"],
    kernel_backward: Float[Array, "heads taps"],
    *,
    skip: Float[Array, "heads"] | None = None,
) -> Float[Array, "*batch length heads"]:
    """Convolution with one kernel for the past and one for the future, in one pass of FFTs.

    `y_k = Σ_{j≤k} K_f[k-j] u_j + Σ_{j>k} K_b[j-k-1] u_j + D u_k`: the present belongs to the
    forward kernel alone, and the backward kernel starts at the next position.

    Args:
      u: real inputs; any batch axes, then positions, then channels.
      kernel_forward: responses to present and past, one row for each channel.
      kernel_backward: responses to the future, nearest first.
      skip: direct term D, one number for each channel.

    Returns:
      Outputs, with the shape and dtype of `u`.

    Raises:
      TypeError: an argument is not an array of real floating-point numbers.
      ValueError: `u` has no positions, or channel counts differ.

    Example:
      >>> import jax.numpy as jnp
      >>> u = jnp.asarray([[0.0], [1.0], [0.0]])
      >>> fft_conv_bidirectional(u, jnp.asarray([[1.0, 0.5]]), jnp.asarray([[0.25]]))[:, 0].round(
      ...     3
      ... ).tolist()
      [0.25, 1.0, 0.5]

    Source: Goel, Gu, Donahue, Ré 2022 (arXiv 2202.09729), section 4.
    """
    _check(u, {"kernel_forward": kernel_forward, "kernel_backward": kernel_backward}, skip)
    work = _compute_dtype(u, kernel_forward, kernel_backward, skip)
    length = u.shape[-2]
    forward = kernel_forward[:, :length].astype(work)
    # The farthest future position is length - 1 steps away, so that n ≥ 2L-1 leaves no overlap.
    backward = kernel_backward[:, : length - 1].astype(work)
    size = fft_size(2 * length - 1, power_of_two=jax.default_backend() == "tpu")
    gap = jnp.zeros((u.shape[-1], size - forward.shape[1] - backward.shape[1]), work)
    rows = jnp.concatenate([forward, gap, backward[:, ::-1]], axis=1)
    return _convolve(u, rows, size, skip)
