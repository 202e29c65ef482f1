"""Layer norm and root-mean-square norm whose statistics float16 cannot spoil."""

import jax
import jax.numpy as jnp

from jaxkit._checks import check_floating, check_real
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Float

__all__ = ["layer_norm", "rms_norm"]


def layer_norm(
    x: Float[Array, "*batch dim"],
    scale: Float[Array, "dim"] | None = None,
    bias: Float[Array, "dim"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Array, "*batch dim"]:
    """(x − mean) / √(variance + ε) · scale + bias over the last axis, statistics in float32.

    Args:
      x: Any dtype; ε is added in float32, where it does not vanish.
      scale: Default 1.
      bias: Default 0.
      eps: ε.

    Returns:
      The dtype of `x`.

    Raises:
      TypeError: `x` is not real floating point.
      ValueError: `eps` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> print(layer_norm(jnp.full((2, 3), 300.0, jnp.float16)))
      [[0. 0. 0.]
       [0. 0. 0.]]

    Source: Ba et al. 2016 (arXiv 1607.06450).
    """
    check_floating("x", x)
    check_real("eps", eps, above=0.0)
    y = x.astype(wide(x.dtype))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return _normed(y, scale, bias, eps).astype(x.dtype)


def rms_norm(
    x: Float[Array, "*batch dim"],
    scale: Float[Array, "dim"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Array, "*batch dim"]:
    """x / √(mean x² + ε) · scale over the last axis, computed in float32.

    Args:
      x: Any dtype.
      scale: Default 1.
      eps: ε.

    Returns:
      The dtype of `x`.

    Raises:
      TypeError: `x` is not real floating point.
      ValueError: `eps` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> print(rms_norm(jnp.asarray([300.0, -300.0], jnp.float16)))  # 300² is inf in float16
      [ 1. -1.]

    Source: Zhang, Sennrich 2019 (arXiv 1910.07467).
    """
    check_floating("x", x)
    check_real("eps", eps, above=0.0)
    return _normed(x.astype(wide(x.dtype)), scale, None, eps).astype(x.dtype)


def _normed(y: Array, scale: Array | None, bias: Array | None, eps: float) -> Array:
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    ones = (1,) * (y.ndim - 1)
    if scale is not None:
        y = y * scale.astype(y.dtype).reshape(*ones, -1)
    return y if bias is None else y + bias.astype(y.dtype).reshape(*ones, -1)
