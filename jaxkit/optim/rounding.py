"""Stochastic rounding: low-precision weights that small steps still move, on average."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkit._checks import check_floating
from jaxkit._dtypes import wide
from jaxkit._typing import Array, DType, Float, Key

__all__ = ["stochastic_round"]

_BITS: dict[str, Any] = {"float16": jnp.int16, "bfloat16": jnp.int16, "float32": jnp.int32}


def stochastic_round(
    x: Float[Array, "*shape"], dtype: DType, *, key: Key
) -> Float[Array, "*shape"]:
    r"""Round to one of the two neighbours in `dtype`, at random, so that the mean is exact.

    With neighbours `a <= x <= b`: `b` with probability `(x - a) / (b - a)`, else `a`. A number that
    `dtype` holds exactly stays as it is, NaN and infinities too; beyond the largest finite number
    the rounding is the usual one. Subnormal results are rounded to the spacing of subnormals. The
    derivative is that of the mean, which is 1.

    Args:
      x: Numbers of any shape. What `dtype` holds exactly is only cast.
      dtype: `float16`, `bfloat16` or `float32`.
      key: Random key.

    Returns:
      The rounded numbers in `dtype`.

    Raises:
      TypeError: `x` is not real floating point.
      ValueError: `dtype` is none of the three.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.full(10_000, 1.001)  # between 1 and 1.0078 in bfloat16
      >>> rounded = stochastic_round(x, jnp.bfloat16, key=jax.random.key(0))
      >>> bool(abs(rounded.astype(jnp.float32).mean() - 1.001) < 2e-4)
      True

    Source: Gupta et al. 2015 (arXiv 1502.02551).
    """
    check_floating("x", x)
    dtype = jnp.dtype(dtype)
    if dtype.name not in _BITS:
        raise ValueError(f"dtype must be one of {', '.join(_BITS)}; got {dtype.name}.")
    x = x.astype(wide(x.dtype))
    if x.dtype == dtype:
        return x
    near = x.astype(dtype)
    back = near.astype(x.dtype)
    # The neighbour on the other side of x. Ordered as integers, floats of one sign are consecutive
    # from zero, which keeps the sign of x: one more is one further out.
    integer = _BITS[dtype.name]
    step = jnp.where(jnp.abs(back) <= jnp.abs(x), 1, -1).astype(integer)
    bits = jax.lax.bitcast_convert_type(near, integer) + step
    other = jax.lax.bitcast_convert_type(bits, dtype).astype(x.dtype)
    gap = jnp.abs(other - back)
    share = jnp.abs(x - back) / jnp.where(gap == 0, 1, gap)
    # The share of an exact number is 0, of one beyond the range 0 or NaN: these never move.
    moves = jax.random.uniform(key, x.shape, x.dtype) < share
    # As a sum, which is exact, so that the derivative is that of `back` on either side.
    return jnp.where(moves, back + jax.lax.stop_gradient(other - back), back).astype(dtype)
