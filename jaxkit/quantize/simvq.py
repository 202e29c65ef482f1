"""SimVQ: a frozen codebook seen through one learned linear map.

The effective codebook is CW (+ b). A gradient step on W moves all codes, those that no vector is
near to as well, so that codes do not die.
"""

import jax
import jax.numpy as jnp

from jaxkit._checks import check_int
from jaxkit._typing import Array, DType, Float, Key
from jaxkit.quantize._common import across, check_codebook, wide_dtype

__all__ = ["simvq_codebook", "simvq_init"]


def simvq_init(
    key: Key, num_codes: int, dim: int, *, dtype: DType = jnp.float32
) -> tuple[Float[Array, "codes dim"], Float[Array, "dim dim"]]:
    """A frozen codebook C ~ N(0, 1/d) and W = I.

    Args:
      key: Random key.
      num_codes: K.
      dim: d.
      dtype: Of both.

    Returns:
      `(frozen, weight)`.

    Raises:
      ValueError: If a size is below 1.

    Example:
      >>> import jax
      >>> frozen, weight = simvq_init(jax.random.key(0), 8, 2)
      >>> print(frozen.shape, weight.shape)
      (8, 2) (2, 2)

    Source: Zhu et al. 2024 (arXiv 2411.02038).
    """
    num_codes = check_int("num_codes", num_codes, least=1)
    dim = check_int("dim", dim, least=1)
    scale = jnp.asarray(dim**-0.5, dtype)
    return scale * jax.random.normal(key, (num_codes, dim), dtype), jnp.eye(dim, dtype=dtype)


def simvq_codebook(
    frozen: Float[Array, "codes dim"],
    weight: Float[Array, "dim dim"],
    *,
    bias: Float[Array, "dim"] | None = None,
) -> Float[Array, "codes dim"]:
    """The effective codebook `sg(C) W (+ b)`.

    Pass it as the codebook of a `VQState` with `codebook="loss"`: the codebook loss then trains W.

    Args:
      frozen: C; gets no gradient.
      weight: W.
      bias: b; the paper has none, the authors' code does.

    Returns:
      The codes, in the dtype of `frozen`.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> print(simvq_codebook(jnp.array([[1.0, 2.0]]), 2 * jnp.eye(2)))
      [[2. 4.]]

    Source: Zhu et al. 2024 (arXiv 2411.02038).
    """
    _, dim = check_codebook(frozen)
    if tuple(weight.shape) != (dim, dim):
        raise ValueError(f"weight must have shape {(dim, dim)}; got {tuple(weight.shape)}.")
    wide = wide_dtype(frozen, weight)
    fixed = jax.lax.stop_gradient(frozen).astype(wide)
    codes = jnp.dot(fixed, weight.astype(wide), precision="highest")
    if bias is not None:
        if tuple(bias.shape) != (dim,):
            raise ValueError(f"bias must have shape {(dim,)}; got {tuple(bias.shape)}.")
        codes = codes + across(bias.astype(wide), codes)
    return codes.astype(frozen.dtype)
