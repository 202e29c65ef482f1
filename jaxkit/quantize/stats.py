"""How much of a codebook is used.

Both numbers depend on the set they are taken over: the paper reports usage a batch; usage of a
whole evaluation set is higher. Add up the counts of batches first for the latter.
"""

import jax.numpy as jnp

from jaxkit._checks import check_int
from jaxkit._typing import Array, Bool, Float, Int
from jaxkit.quantize._common import check_index, check_mask, psum
from jaxkit.quantize._sharding import EVERYWHERE, automatic
from jaxkit.quantize.losses import entropy

__all__ = ["code_counts", "perplexity", "usage"]


@automatic(EVERYWHERE, like="index")
def code_counts(
    index: Int[Array, "*batch"],
    num_codes: int,
    *,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Int[Array, "codes"]:
    """How often every code occurs; the sentinel K and anything else outside [0, K) is not counted.

    Args:
      index: Codes.
      num_codes: K.
      mask: False for entries to leave out.
      axis_name: Mesh axes to sum over, inside `shard_map`.

    Returns:
      int32 counts.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or `num_codes` is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> print(code_counts(jnp.array([0, 2, 2, 3]), 3))
      [1 0 2]
    """
    num_codes = check_int("num_codes", num_codes, least=1)
    index = check_index(index)
    check_mask(mask, index.shape)
    inside = (index >= 0) & (index < num_codes)
    inside = inside if mask is None else inside & mask
    rows = jnp.where(inside, index, num_codes).reshape(-1)
    return psum(jnp.zeros(num_codes, jnp.int32).at[rows].add(1, mode="drop"), axis_name)


def _frequencies(counts: Array) -> Array:
    wide = jnp.float64 if counts.dtype == jnp.float64 else jnp.float32
    counts = counts.astype(wide)
    return counts / jnp.sum(counts, axis=-1, keepdims=True)


def perplexity(counts: Int[Array, "*batch codes"] | Float[Array, "*batch codes"]) -> Array:
    """`exp(-Σ p ln p)` of the frequencies p: the effective number of codes, in [1, K].

    Args:
      counts: Counts or frequencies, at least 0.

    Returns:
      float32 (float64 for float64 counts); NaN if all counts are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{perplexity(jnp.array([4, 2, 1, 1])):.4f}")
      3.3636
    """
    return jnp.exp(entropy(_frequencies(counts)))


def usage(counts: Int[Array, "*batch codes"] | Float[Array, "*batch codes"]) -> Array:
    """`#{n_k > 0}/K`, the share of codes that occur.

    Args:
      counts: Counts or frequencies.

    Returns:
      float32, in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> print(usage(jnp.array([4, 0, 1, 1])))
      0.75
    """
    return jnp.mean((counts > 0).astype(jnp.float32), axis=-1)
