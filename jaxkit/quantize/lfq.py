"""Look-up-free quantization: the code is the sign of every feature, K = 2^d.

Binary spherical quantization (`spherical.py`) is the same on the unit sphere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit._typing import Array, Bool, DType, Float, Int
from jaxkit.quantize._common import (
    across,
    check_index,
    check_mask,
    check_vectors,
    select_rows,
    wide_dtype,
)
from jaxkit.quantize._sharding import EVERYWHERE, automatic
from jaxkit.quantize.estimators import estimate
from jaxkit.quantize.losses import entropy, weighted_mean_rows

__all__ = ["LFQOutput", "lfq", "lfq_code", "lfq_entropies", "lfq_entropy_loss", "lfq_index"]

BIT_ORDERS = ("little", "big")
# 2^d of a group of bits is tabulated for H(E p).
_LARGEST_GROUP = 24


class LFQOutput(NamedTuple):
    """What `lfq` returns.

    Attributes:
      z_q: Codes in {±scale}, with a straight-through gradient to `z`.
      index: int32 in [0, 2^d); 2^d for vectors that are masked or NaN.
    """

    z_q: Float[Array, "*batch dim"]
    index: Int[Array, "*batch"]  # type: ignore[assignment]


def _check_bits(z: Array, num_codes: int | None = None, *, name: str = "z") -> int:
    dim = check_vectors(z, name=name)
    if dim > 30:
        raise ValueError(f"{name} must have at most 30 features (int32 indices); got {dim}.")
    if num_codes is not None and check_int("num_codes", num_codes, least=1) != 2**dim:
        raise ValueError(f"num_codes must be 2^{dim} = {2**dim}; got {num_codes}.")
    return dim


def _powers(dim: int, bit_order: str) -> np.ndarray:
    check_choice("bit_order", bit_order, BIT_ORDERS)
    powers = 2 ** np.arange(dim, dtype=np.int32)
    return powers if bit_order == "little" else powers[::-1]


def lfq(
    z: Float[Array, "*batch dim"],
    *,
    scale: float = 1.0,
    num_codes: int | None = None,
    bit_order: str = "little",
    mask: Bool[Array, "*batch"] | None = None,
) -> LFQOutput:
    """`code = a sign(z)`, with sign(0) = -1, straight-through.

    Args:
      z: Vectors of d ≤ 30 features.
      scale: a.
      num_codes: If given, checked to be 2^d.
      bit_order: Of the index: `little` (Σ 2^i 1[z_i > 0], the paper) or `big` (popular code).
      mask: False for vectors to leave out.

    Returns:
      `LFQOutput(z_q, index)`, `z_q` in the dtype of `z`. Masked vectors give zeros and the index
      2^d; a vector with NaN gives NaN in that place and 2^d.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape, a name or a number is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> out = lfq(jnp.array([[0.3, -0.2, 0.1, -0.4], [-0.5, 0.6, 0.7, 0.8]]))
      >>> print(out.z_q, out.index)
      [[ 1. -1.  1. -1.]
       [-1.  1.  1.  1.]] [ 5 14]

    Source: Yu et al. 2023 (arXiv 2310.05737).
    """
    _check_bits(z, num_codes)
    check_real("scale", scale, above=0)
    check_mask(mask, z.shape[:-1])
    size = jnp.asarray(scale, z.dtype)
    code = jnp.where(z > 0, size, -size)
    code = jnp.where(jnp.isnan(z), jnp.nan, code)  # a comparison with NaN is False, not unknown
    index = lfq_index(code, bit_order=bit_order)
    if mask is not None:
        index = jnp.where(mask, index, 2 ** z.shape[-1])
    return LFQOutput(select_rows(mask, estimate(z, code)), index)


def lfq_index(code: Float[Array, "*batch dim"], *, bit_order: str = "little") -> Array:
    """The index of a code, `Σ_i 2^i 1[code_i > 0]`.

    Args:
      code: Codes (or vectors: only signs count).
      bit_order: `little` or `big`.

    Returns:
      int32 in [0, 2^d); 2^d where there is a NaN.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or a name is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> code = jnp.array([1.0, -1.0, 1.0, -1.0])
      >>> print(lfq_index(code), lfq_index(code, bit_order="big"))
      5 10
    """
    dim = _check_bits(code, name="code")
    powers = across(jnp.asarray(_powers(dim, bit_order)), code)
    index = jnp.sum(jnp.where(code > 0, powers, 0), axis=-1, dtype=jnp.int32)
    return jnp.where(jnp.any(jnp.isnan(code), axis=-1), 2**dim, index)


def lfq_code(
    index: Int[Array, "*batch"],
    dim: int,
    *,
    scale: float = 1.0,
    bit_order: str = "little",
    dtype: DType = jnp.float32,
) -> Float[Array, "*batch dim"]:
    """The code of an index, the inverse of `lfq_index`.

    Args:
      index: Integers in [0, 2^d).
      dim: d.
      scale: a.
      bit_order: `little` or `big`.
      dtype: Of the result.

    Returns:
      Codes in {±a}; NaN for an index outside [0, 2^d).

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If an option is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> print(lfq_code(jnp.array(5), 4))
      [ 1. -1.  1. -1.]
    """
    dim = check_int("dim", dim, least=1)
    index = check_index(index)
    _check_bits(jnp.zeros(dim), name="dim")
    valid = ((index >= 0) & (index < 2**dim))[..., None]
    powers = _powers(dim, bit_order)
    index = jnp.where(valid, index[..., None], 0).astype(jnp.int32)
    bits = (index // across(jnp.asarray(powers), index)) % 2
    code = jnp.where(bits == 1, scale, -scale)
    return jnp.where(valid, code, jnp.nan).astype(dtype)


def _binary_entropy(logit: Array) -> Array:
    """h(σ(x)) = softplus(-|x|) + |x| σ(-|x|) in nats, without cancellation for large |x|."""
    # Long before the bound both terms are exactly 0; at infinity the second would be ∞ · 0.
    size = jnp.minimum(jnp.abs(logit), 1e4)
    return jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)


def _products(up: Array, down: Array) -> Array:
    """Probabilities [tokens, 2^bits] of all combinations of independent bits [tokens, bits]."""
    table = jnp.ones((up.shape[0], 1), up.dtype)
    for i in range(up.shape[1]):
        table = jnp.concatenate([table * down[:, i : i + 1], table * up[:, i : i + 1]], axis=1)
    return table


def _mean_table(up: Array, down: Array, mask: Array | None, axis_name) -> Array:
    """E p over 2^bits codes. Two halves of the bits are tabulated, and a matrix product over the
    tokens makes all pairs: O(T 2^(bits/2)) memory instead of O(T 2^bits)."""
    low = up.shape[1] // 2
    left, right = _products(up[:, low:], down[:, low:]), _products(up[:, :low], down[:, :low])
    if mask is None:
        rows = jnp.asarray(up.shape[0], up.dtype)
    else:
        left = jnp.where(mask[:, None], left, 0)
        right = jnp.where(mask[:, None], right, 0)
        rows = jnp.sum(mask).astype(up.dtype)
    total = jnp.dot(left.T, right, precision="highest").reshape(-1)
    if axis_name is not None:
        total, rows = jax.lax.psum((total, rows), axis_name)
    return total / jnp.maximum(rows, 1)


@automatic(EVERYWHERE)
def lfq_entropies(
    z: Float[Array, "*batch dim"],
    *,
    scale: float = 1.0,
    inv_temperature: float = 1.0,
    group_size: int | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(E H(p(·|z)), H(E p(·|z)))` in nats, p = softmax over codes c of 2τ⟨z, c⟩.

    p makes the bits independent, bit i being set with probability σ(4τ a z_i). So the first is
    `Σ_i h(σ(4τ a z_i))`, in O(d). The second does not factorise: O(T 2^d) time in one matrix
    product, O(T 2^(d/2) + 2^d) memory.

    Args:
      z: Vectors.
      scale: a.
      inv_temperature: τ.
      group_size: For many bits: the second entropy of every group of so many bits, summed over
        groups (an upper bound of H(E p), tight if groups are independent). Default: all bits.
      mask: False for vectors to leave out.
      axis_name: Mesh axes over which `z` is spread, inside `shard_map`.

    Returns:
      Two scalars in float32 (float64 for float64 `z`).

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or a number is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0.3, -0.2, 0.1, -0.4], [-0.5, 0.6, 0.7, 0.8]])
      >>> print([f"{value:.5f}" for value in lfq_entropies(z)])
      ['1.66150', '2.20715']

    Source: Yu et al. 2023 (arXiv 2310.05737, equation 4); Zhao et al. 2024 (arXiv 2406.07548) for
    the groups.
    """
    dim = _check_bits(z)
    check_real("scale", scale, above=0)
    check_real("inv_temperature", inv_temperature, above=0)
    group = dim if group_size is None else check_int("group_size", group_size, least=1)
    if min(group, dim) > _LARGEST_GROUP:
        raise ValueError(
            f"group_size must be at most {_LARGEST_GROUP} (2^bits probabilities are tabulated); "
            f"got {group}."
        )
    check_mask(mask, z.shape[:-1])
    wide = wide_dtype(z)
    rows = None if mask is None else mask.reshape(-1)
    logits = z.astype(wide).reshape(-1, dim) * (4 * inv_temperature * scale)
    if rows is not None:
        logits = jnp.where(rows[:, None], logits, 0)
    own = weighted_mean_rows(jnp.sum(_binary_entropy(logits), axis=1), rows, axis_name)
    up, down = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
    mean = jnp.zeros((), wide)
    for start in range(0, dim, group):
        part = slice(start, min(start + group, dim))
        mean = mean + entropy(_mean_table(up[:, part], down[:, part], rows, axis_name))
    return own, mean


def lfq_entropy_loss(
    z: Float[Array, "*batch dim"],
    *,
    scale: float = 1.0,
    inv_temperature: float = 1.0,
    diversity_weight: float = 1.0,
    group_size: int | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """`E H(p(·|z)) - ζ H(E p(·|z))`: every bit sure, all codes in use.

    Its weight needs tuning: without it, or with too little, codes collapse.

    Args:
      z: Vectors.
      scale: a.
      inv_temperature: τ.
      diversity_weight: ζ.
      group_size: As in `lfq_entropies`.
      mask: False for vectors to leave out.
      axis_name: Mesh axes over which `z` is spread, inside `shard_map`.

    Returns:
      A scalar in float32 (float64 for float64 `z`).

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or a number is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{lfq_entropy_loss(jnp.array([[9.0], [-9.0]])):.4f}")
      -0.6931

    Source: Yu et al. 2023 (arXiv 2310.05737, equation 4).
    """
    check_real("diversity_weight", diversity_weight, least=0)
    own, mean = lfq_entropies(
        z,
        scale=scale,
        inv_temperature=inv_temperature,
        group_size=group_size,
        mask=mask,
        axis_name=axis_name,
    )
    return own - diversity_weight * mean
