"""Checks shared by all forms of the attention, and the axis sizes they work with."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_floating, check_int

__all__ = [
    "HIGHEST",
    "MASKED",
    "Sizes",
    "check_bias",
    "check_codes",
    "check_mask",
    "finite_rows",
    "nan_where",
    "sizes",
]

# The score of what a query does not see: finite, since (-inf) - (-inf) is not a number.
MASKED = -1e30
# Accelerators multiply float32 matrices in fewer bits unless told otherwise.
HIGHEST = jax.lax.Precision.HIGHEST


class Sizes(NamedTuple):
    """Axis sizes: query heads H and key/value groups G, G dividing H."""

    batch: int
    heads: int
    groups: int
    length: int
    key_dim: int
    value_dim: int
    codes: int

    @property
    def share(self) -> int:
        """Query heads of one group."""
        return self.heads // self.groups


def finite_rows(*arrays: Any) -> Any:
    """Whether all numbers along the last axis are finite, in all of the arrays."""
    rows = [jnp.all(jnp.isfinite(x), axis=-1) for x in arrays]
    return functools.reduce(jnp.logical_and, rows)


def nan_where(spoiled: Any, dtype: Any) -> Any:
    """NaN or 0, to be added to an output, so that its gradients show it too."""
    return jnp.where(spoiled, jnp.full((), jnp.nan, dtype), jnp.zeros((), dtype))


def sizes(q: Any, k: Any, v: Any, codebook: Any, *, axes: int = 4) -> Sizes:
    """Check the operands against each other. `axes` is 3 for one position, without a length."""
    layout = "[batch, {}, length, {}]" if axes == 4 else "[batch, {}, {}]"
    for name, value, words in (
        ("q", q, ("heads", "key_dim")),
        ("k", k, ("groups", "key_dim")),
        ("v", v, ("groups", "value_dim")),
    ):
        check_floating(name, value)
        if value.ndim != axes:
            raise ValueError(f"{name} must be {layout.format(*words)}; got shape {value.shape}.")
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}; got {value.dtype}.")
    check_floating("codebook", codebook)
    if codebook.ndim != 3:
        raise ValueError(f"codebook must be [groups, codes, key_dim]; got shape {codebook.shape}.")
    batch, heads, key_dim = q.shape[0], q.shape[1], q.shape[-1]
    groups, length = k.shape[1], k.shape[2] if axes == 4 else 1
    if groups < 1 or heads % groups:
        raise ValueError(
            f"q must have a number of heads that k's groups divide; "
            f"got {heads} heads and {groups} groups."
        )
    if k.shape[-1] != key_dim:
        raise ValueError(f"k must have q's key_dim {key_dim}; got {k.shape[-1]}.")
    same = (batch, groups, length) if axes == 4 else (batch, groups)
    for name, value in (("k", k), ("v", v)):
        if value.shape[:-1] != same:
            raise ValueError(f"{name} must have shape {(*same, '…')}; got {value.shape}.")
    if axes == 4 and q.shape[2] != length:
        raise ValueError(f"q must have k's length {length}; got {q.shape[2]}.")
    if codebook.shape[0] != groups or codebook.shape[2] != key_dim:
        raise ValueError(
            f"codebook must be [{groups}, codes, {key_dim}] for these keys; "
            f"got shape {codebook.shape}."
        )
    if codebook.shape[1] < 1:
        raise ValueError(f"codebook must hold at least one code; got shape {codebook.shape}.")
    return Sizes(batch, heads, groups, length, key_dim, v.shape[-1], codebook.shape[1])


def check_codes(codes: Any, shape: tuple[int, ...]) -> None:
    """Refuse codes that are no integers, or of another shape."""
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes must be integers; got dtype {codes.dtype}.")
    if codes.shape != shape:
        raise ValueError(f"codes must have shape {shape}; got {codes.shape}.")


def check_mask(mask: Any, shape: tuple[int, ...]) -> None:
    """Refuse a mask that is not boolean, or of another shape."""
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean; got dtype {mask.dtype}.")
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {shape}; got {mask.shape}.")


def check_bias(bias: Any, q: Any, window: int | None) -> int | None:
    """Refuse a bias of the wrong shape; return the window W that it or `window` says."""
    if window is not None:
        window = check_int("window", window, least=0)
    if bias is None:
        return window
    check_floating("bias", bias)
    if bias.dtype != q.dtype:
        raise TypeError(f"bias must have q's dtype {q.dtype}; got {bias.dtype}.")
    lags = bias.shape[-1] if window is None and bias.ndim else (window or 0) + 1
    table, rows = (q.shape[1], lags), (*q.shape[:-1], lags)
    if bias.shape not in (table, rows):
        raise ValueError(
            f"bias must have shape {table}, or {rows} (one row a query); got {bias.shape}. "
            "Its last axis holds the lags 0 … window."
        )
    return lags - 1
