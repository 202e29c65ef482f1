"""Finite scalar quantization: every feature is squashed and rounded to one of L levels.

The codebook is the grid of all combinations, K = ΠL, and is never stored. A feature z becomes a
level n and a code in [-1, 1], by one of three conventions:

| convention  | level n                                           | h             | code       |
|-------------|---------------------------------------------------|---------------|------------|
| `default`   | round(h tanh(z + artanh(o/h)) - o)                | (L-1)(1+ε)/2  | n/⌊L/2⌋    |
| `paper`     | round(h tanh(z + tan(o/h)) - o)                   | (L-1)(1-ε)/2  | n/⌊L/2⌋    |
| `symmetric` | ⌊h tanh(z) + L/2⌋ - h                             | (L-1)/2       | n/h        |

with o = ½ for even L and 0 for odd L. `default` is that of popular code, `paper` that of the
paper's own code; they agree except near rounding boundaries. For L = 2 they have next to no
gradient at z = 0 (1e-3): use `symmetric` there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

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
from jaxkit.quantize.estimators import estimate

__all__ = ["RECOMMENDED_LEVELS", "FSQOutput", "fsq", "fsq_code", "fsq_codebook", "fsq_index"]

CONVENTIONS = ("default", "paper", "symmetric")

RECOMMENDED_LEVELS: dict[int, tuple[int, ...]] = {
    8: (8, 6, 5),
    10: (8, 5, 5, 5),
    12: (7, 5, 5, 5, 5),
    14: (8, 8, 8, 6, 5),
    16: (8, 8, 8, 5, 5, 5),
}
"""The paper's levels for codebooks of about 2^bits codes."""


class FSQOutput(NamedTuple):
    """What `fsq` returns.

    Attributes:
      z_q: Codes in [-1, 1], with a gradient to `z`.
      index: int32 in [0, K); K for vectors that are masked or NaN.
    """

    z_q: Float[Array, "*batch dim"]
    index: Int[Array, "*batch"]  # type: ignore[assignment]


def _check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    levels = tuple(check_int("levels", level, least=2) for level in levels)
    if not levels:
        raise ValueError("levels must hold at least one number; got none.")
    if math.prod(levels) >= 2**31:
        raise ValueError(
            f"levels must have a product below 2^31, so that indices are int32; got {levels}."
        )
    return levels


def _check_conventions(convention: str | Sequence[str], dims: int) -> tuple[str, ...]:
    names = (convention,) * dims if isinstance(convention, str) else tuple(convention)
    for name in names:
        check_choice("convention", name, CONVENTIONS)
    if len(names) != dims:
        raise ValueError(f"convention must be one name or one a level ({dims}); got {names}.")
    return names


def _squash(
    levels: tuple[int, ...], names: tuple[str, ...], eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """shift, half, offset of every feature, in float64."""
    rows = []
    for level, name in zip(levels, names, strict=True):
        if name == "symmetric":
            rows.append((0.0, (level - 1) / 2, 0.0))
            continue
        if (level - 1) * eps >= 1:
            raise ValueError(
                f"levels must be at most 1/eps = {1 / eps:g} for {name!r}, which else rounds to "
                f"another number of levels; got {level}."
            )
        offset = 0.5 if level % 2 == 0 else 0.0
        half = (level - 1) * (1 + (eps if name == "default" else -eps)) / 2
        if offset >= half and name == "default":
            raise ValueError(f"eps must be above 0 for 2 levels; got {eps!r}.")
        shift = math.atanh(offset / half) if name == "default" else math.tan(offset / half)
        rows.append((shift, half, offset))
    shift, half, offset = np.asarray(rows).T
    return shift, half, offset


def _units(levels: tuple[int, ...], names: tuple[str, ...]) -> np.ndarray:
    """The level whose code is 1: codes are n/unit, and n + unit counts from 0 to L - 1."""
    size = np.asarray(levels)
    return np.where(_symmetric(names), (size - 1) / 2, size // 2)


def _symmetric(names: tuple[str, ...]) -> np.ndarray:
    return np.asarray([name == "symmetric" for name in names])


def _basis(levels: tuple[int, ...]) -> np.ndarray:
    """Π_{j<i} L_j: the first feature changes fastest."""
    return np.concatenate([[1], np.cumprod(levels[:-1])]).astype(np.int32)


def fsq(
    z: Float[Array, "*batch dim"],
    levels: Sequence[int],
    *,
    convention: str | Sequence[str] = "default",
    eps: float = 1e-3,
    mask: Bool[Array, "*batch"] | None = None,
) -> FSQOutput:
    """Round the squashed features to L levels each, straight-through on the rounding only.

    `b = tanh(z + shift)·half - offset`, n = round(b) (half to even), code = n/⌊L/2⌋, with
    `∂code/∂z = (1 - tanh²(z + shift))·half/⌊L/2⌋`. See the module for the conventions.

    Args:
      z: Vectors, one feature a level.
      levels: L of every feature, at least 2 each.
      convention: `default`, `paper` or `symmetric`, for all features or one name a feature.
      eps: ε of the first two.
      mask: False for vectors to leave out.

    Returns:
      `FSQOutput(z_q, index)`, `z_q` in the dtype of `z` (computed in float32 at least). Masked
      vectors give zeros and the index K = ΠL; a vector with NaN gives NaN in that place and K.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If `z` has another number of features than there are levels, or an option is
        out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> out = fsq(jnp.array([-2.0, -0.3, 0.0, 0.4]), (8, 5, 5, 5))
      >>> print(out.z_q, out.index)
      [-1.  -0.5  0.   0.5] 688

    Source: Mentzer et al. 2023 (arXiv 2309.15505); post 10489.
    """
    levels = _check_levels(levels)
    names = _check_conventions(convention, len(levels))
    check_real("eps", eps, least=0)
    check_vectors(z, len(levels))
    check_mask(mask, z.shape[:-1])
    wide = wide_dtype(z)
    row = lambda value: across(jnp.asarray(value, wide), z)
    shift, half, offset = map(row, _squash(levels, names, eps))
    unit = row(_units(levels, names))
    bounded = jnp.tanh(select_rows(mask, z).astype(wide) + shift) * half - offset
    half_up = jnp.floor(bounded + row(np.asarray(levels) / 2)) - half
    symmetric = across(jnp.asarray(_symmetric(names)), z)
    level = jnp.where(symmetric, half_up, jnp.round(bounded))
    z_q = (estimate(bounded, level) / unit).astype(z.dtype)
    index = _pack(level + unit, levels)
    if mask is not None:
        index = jnp.where(mask, index, math.prod(levels))
    return FSQOutput(select_rows(mask, z_q), index)


def _pack(digits: Array, levels: tuple[int, ...]) -> Array:
    """Index of digits; K where one is no digit."""
    top = across(jnp.asarray([level - 1 for level in levels], digits.dtype), digits)
    valid = jnp.all((digits >= 0) & (digits <= top), axis=-1)
    whole = jnp.where(valid[..., None], digits, 0).astype(jnp.int32)
    index = jnp.sum(whole * across(jnp.asarray(_basis(levels)), whole), axis=-1, dtype=jnp.int32)
    return jnp.where(valid, index, math.prod(levels))


def fsq_index(
    code: Float[Array, "*batch dim"],
    levels: Sequence[int],
    *,
    convention: str | Sequence[str] = "default",
) -> Int[Array, "*batch"]:
    """The index of a code, `Σ_i (n_i + ⌊L_i/2⌋) Π_{j<i} L_j`: the first feature is the fastest.

    Args:
      code: Codes (rounded to the grid if they are slightly off it).
      levels: L of every feature.
      convention: As in `fsq`.

    Returns:
      int32 in [0, K); K where a code is NaN or outside the grid.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or an option is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> print(fsq_index(jnp.array([0.0, 1.0, -1.0, 1.0]), (8, 5, 5, 5)))
      836
    """
    levels = _check_levels(levels)
    names = _check_conventions(convention, len(levels))
    check_vectors(code, len(levels), name="code")
    wide = wide_dtype(code)
    unit = across(jnp.asarray(_units(levels, names), wide), code)
    return _pack(jnp.round(code.astype(wide) * unit + unit), levels)


def fsq_code(
    index: Int[Array, "*batch"],
    levels: Sequence[int],
    *,
    convention: str | Sequence[str] = "default",
    dtype: DType = jnp.float32,
) -> Float[Array, "*batch dim"]:
    """The code of an index, the inverse of `fsq_index`.

    Args:
      index: Integers in [0, K).
      levels: L of every feature.
      convention: As in `fsq`.
      dtype: Of the result.

    Returns:
      Codes in [-1, 1]; NaN for an index outside [0, K).

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If an option is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> print(fsq_code(jnp.array(688), (8, 5, 5, 5)))
      [-1.  -0.5  0.   0.5]
    """
    levels = _check_levels(levels)
    names = _check_conventions(convention, len(levels))
    index = check_index(index)
    valid = (index >= 0) & (index < math.prod(levels))
    index = jnp.where(valid, index, 0).astype(jnp.int32)[..., None]
    basis = across(jnp.asarray(_basis(levels)), index)
    size = across(jnp.asarray(levels, jnp.int32), index)
    digits = (index // basis) % size
    wide = wide_dtype(jnp.zeros((), dtype))
    unit = across(jnp.asarray(_units(levels, names), wide), index)
    code = (digits.astype(wide) - unit) / unit
    return jnp.where(valid[..., None], code, jnp.nan).astype(dtype)


def fsq_codebook(
    levels: Sequence[int],
    *,
    convention: str | Sequence[str] = "default",
    dtype: DType = jnp.float32,
) -> Float[Array, "codes dim"]:
    """All K codes in the order of their indices.

    Args:
      levels: L of every feature.
      convention: As in `fsq`.
      dtype: Of the result.

    Returns:
      The implied codebook.

    Raises:
      ValueError: If an option is wrong.

    Example:
      >>> fsq_codebook((3, 2)).tolist()
      [[-1.0, -1.0], [0.0, -1.0], [1.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    """
    index = jnp.arange(math.prod(_check_levels(levels)), dtype=jnp.int32)
    return fsq_code(index, levels, convention=convention, dtype=dtype)
