"""What a score may add for the lag i − j: Transformer-XL's terms, and rotation up to a window."""

import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_floating, check_int, check_real
from jaxkit._dtypes import wide
from jaxkit._typing import Array, DType, Float

__all__ = ["relative_sinusoids", "rotate", "xl_bias"]


def relative_sinusoids(
    count: int, dim: int, *, wavelength: float = 1e5, start: int = 0, dtype: DType = jnp.float32
) -> Float[Array, "count dim"]:
    """φ(l) = [sin(l ω), cos(l ω)], ω_m = λ^(−2m/dim): all sines, then all cosines.

    Computed on the host in float64.

    Args:
      count: How many lags (or positions).
      dim: Width, even.
      wavelength: λ.
      start: The first lag.
      dtype: Of the result.

    Returns:
      φ(start), …, φ(start + count − 1).

    Raises:
      ValueError: If `dim` is odd or a size out of range.

    Example:
      >>> relative_sinusoids(2, 4).tolist()[0]
      [0.0, 0.0, 1.0, 1.0]

    Source: Dai et al. 2019 (arXiv 1901.02860).
    """
    count, dim = check_int("count", count, least=1), check_int("dim", dim, least=2)
    if dim % 2:
        raise ValueError(f"dim must be even: half sines, half cosines; got {dim}.")
    check_real("wavelength", wavelength, above=0.0)
    frequency = wavelength ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    phase = (start + np.arange(count, dtype=np.float64))[:, None] * frequency
    return jnp.asarray(np.concatenate([np.sin(phase), np.cos(phase)], axis=-1), dtype)


def xl_bias(
    q: Float[Array, "batch heads length key_dim"],
    r: Float[Array, "heads lags key_dim"],
    w: Float[Array, "heads key_dim"],
) -> Float[Array, "batch heads length lags"]:
    """b(i, l) = (q_i + w) · r_l, the content-dependent bias of Transformer-XL.

    Args:
      q: Queries `[batch, heads, (length,) key_dim]`, scaled as the attention's.
      r: r_l = W_r φ(l) for the lags 0 … W, scaled as the keys.
      w: Its own offset of the query.

    Returns:
      The `bias` argument of the attention functions.

    Raises:
      ValueError: If shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> xl_bias(jnp.ones((1, 2, 3, 4)), jnp.ones((2, 5, 4)), jnp.zeros((2, 4))).shape
      (1, 2, 3, 5)

    Source: Dai et al. 2019 (arXiv 1901.02860); Lingle 2023 (2309.16354).
    """
    heads, width = q.shape[1], q.shape[-1]
    if r.ndim != 3 or r.shape[0] != heads or r.shape[2] != width:
        raise ValueError(f"r must be [{heads}, lags, {width}]; got shape {r.shape}.")
    if w.shape != (heads, width):
        raise ValueError(f"w must have shape {(heads, width)}; got {w.shape}.")
    rows = "bhd" if q.ndim == 3 else "bhtd"
    shifted = q + w.reshape(1, heads, *(1,) * (q.ndim - 3), width)
    return jnp.einsum(f"{rows},hld->{rows[:-1]}l", shifted, r)


def rotate(
    x: Float[Array, "*batch length dim"], positions: Array, *, base: float = 1e4
) -> Float[Array, "*batch length dim"]:
    """R_p x: turns the plane (x_m, x_{m + dim/2}) by the angle p · base^(−2m/dim).

    (R_i q) · (R_j k) depends on i − j alone.

    Args:
      x: Real.
      positions: p, `[length]` or a scalar, integer or real.
      base: Of the frequencies.

    Returns:
      The rotated vectors, in the dtype of `x`.

    Raises:
      TypeError: If `x` is not real.
      ValueError: If `dim` is odd.

    Example:
      >>> import jax.numpy as jnp
      >>> [f"{a:.4f}" for a in rotate(jnp.asarray([[1.0, 0.0]]), 1)[0]]
      ['0.5403', '0.8415']

    Source: Su et al. 2021 (arXiv 2104.09864); windowed: ReRoPE, post 9708.
    """
    check_floating("x", x)
    dim = x.shape[-1]
    if dim % 2:
        raise ValueError(f"x must have an even last axis to be rotated; got {dim}.")
    dtype = wide(x.dtype)
    frequency = jnp.asarray(base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim), dtype)
    angle = jnp.asarray(positions).astype(dtype)[..., None] * frequency.reshape(
        (1,) * jnp.ndim(positions) + (-1,)
    )
    angle = angle.reshape((1,) * (x.ndim - angle.ndim) + angle.shape)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1).astype(
        x.dtype
    )
