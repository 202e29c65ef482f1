"""From keys to codes, and back to quantised keys with a gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxkit_kernels as kernels

from jaxkit._dtypes import wide
from jaxkit._typing import Array, Bool, Float, Int
from jaxkit.attention.vq._operands import check_codes, check_mask

__all__ = ["QuantizedKeys", "find_codes", "lookup", "nearest_codes", "quantize_keys"]


class QuantizedKeys(NamedTuple):
    """Keys replaced by their codewords.

    Attributes:
      keys: k̂, `[batch, groups, length, key_dim]`; zero where the code is the sentinel.
      codes: z, int32 `[batch, groups, length]`; the number of codes S marks padding, S + 1 a key
        that is not finite, which could be any code.
      valid: Bool `[batch, length]`, False at padding.
    """

    keys: Array
    codes: Array
    valid: Array


def nearest_codes(
    k: Float[Array, "batch groups length key_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    mask: Bool[Array, "batch length"] | None = None,
    implementation: Any = "auto",
) -> Int[Array, "batch groups length"]:
    """z = argmin_s ‖k − C_s‖², the lowest index on ties; the number of codes where `mask` is False.

    Computed in float32 at least, in full precision. No gradient. A key that is not finite gets the
    number of codes as well.

    Args:
      k: Keys.
      codebook: C, one for each group.
      mask: True where the position counts.
      implementation: Of the kernel; see `jaxkit_kernels.nearest_code`.

    Returns:
      Codes, int32.

    Example:
      >>> import jax.numpy as jnp
      >>> codebook = jnp.asarray([[[0.0], [1.0], [3.0]]])
      >>> nearest_codes(jnp.asarray([[[[0.4], [0.5], [2.5]]]]), codebook).tolist()
      [[[0, 0, 2]]]

    Source: Lingle 2023 (arXiv 2309.16354); post 9844.
    """
    codes = find_codes(k, codebook, mask=mask, implementation=implementation)
    return jnp.minimum(codes, jnp.int32(codebook.shape[1]))


def find_codes(
    k: Array, codebook: Array, *, mask: Array | None = None, implementation: Any = "auto"
) -> Array:
    """As `nearest_codes`, but S + 1 for a key that is not finite: unlike padding, it is seen."""
    if mask is not None:
        check_mask(mask, (k.shape[0], k.shape[2]))
    batch, groups, length, width = k.shape
    rows = jnp.moveaxis(k, 1, 0).reshape(groups, batch * length, width)
    counted = None if mask is None else mask.reshape(-1)

    def of_group(rows: Array, codebook: Array) -> Array:
        return kernels.nearest_code(
            rows, codebook, mask=counted, implementation=implementation
        ).index

    dtype = wide(k.dtype)
    index = jax.vmap(of_group)(
        jax.lax.stop_gradient(rows).astype(dtype), jax.lax.stop_gradient(codebook).astype(dtype)
    )
    codes = jnp.moveaxis(index.reshape(groups, batch, length), 0, 1)
    none = jnp.int32(codebook.shape[1])
    lost = codes == none if mask is None else (codes == none) & mask[:, None]
    return jnp.where(lost, none + 1, codes)


def quantize_keys(
    k: Float[Array, "batch groups length key_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    codes: Int[Array, "batch groups length"] | None = None,
    mask: Bool[Array, "batch length"] | None = None,
) -> QuantizedKeys:
    """k̂ = sg(C_z) + (k − sg(k)): bitwise C_z forward, the identity backward (straight-through).

    Args:
      k: Keys.
      codebook: C, rounded to the dtype of `k` first; no gradient to it.
      codes: z, if known; what is out of range marks padding (in every group of a position).
      mask: True where the position counts.

    Returns:
      Quantised keys, codes, and which positions count.

    Raises:
      TypeError: If `codes` are no integers or `mask` is not boolean.
      ValueError: If shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> codebook = jnp.asarray([[[0.0], [1.0], [3.0]]])
      >>> quantize_keys(jnp.asarray([[[[0.4], [2.5]]]]), codebook).keys.tolist()
      [[[[0.0], [3.0]]]]

    Source: Lingle 2023 (arXiv 2309.16354); van den Oord et al. 2017 (1711.00937); post 9844.
    """
    # One rounding of C for the codes, the recent keys and the cache: else the forms would differ.
    codebook = jax.lax.stop_gradient(codebook).astype(k.dtype)
    sentinel = codebook.shape[1]
    if codes is None:
        codes = find_codes(k, codebook, mask=mask)
    else:
        check_codes(codes, k.shape[:-1])
        known = (codes >= 0) & (codes <= sentinel + 1)
        if mask is not None:
            check_mask(mask, (k.shape[0], k.shape[2]))
            known = known & mask[:, None]
        codes = jnp.where(known, codes.astype(jnp.int32), jnp.int32(sentinel))
    valid = jnp.any(codes != sentinel, axis=1)
    # Whatever stands in the padding, NaN included, goes nowhere.
    k = jnp.where(valid[:, None, :, None], k, jnp.zeros_like(k))
    return QuantizedKeys(lookup(codebook, codes) + (k - jax.lax.stop_gradient(k)), codes, valid)


def lookup(codebook: Array, codes: Array) -> Array:
    """C_z for `codes` [batch, groups, ...]: zero for S, which is padding, and NaN for S + 1."""

    def of_group(table: Array, index: Array) -> Array:
        return table.at[index].get(mode="fill", fill_value=0)

    found = jax.vmap(of_group, in_axes=(0, 1), out_axes=1)(codebook, codes)
    lost = (codes > codebook.shape[1])[..., None]
    return jnp.where(lost, jnp.full((), jnp.nan, found.dtype), found)
