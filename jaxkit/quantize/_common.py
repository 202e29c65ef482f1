"""Checks and dtypes shared by the quantizers."""

import jax
import jax.numpy as jnp

from jaxkit._checks import check_floating
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Bool, DType

METRICS = ("euclidean", "cosine")


def wide_dtype(*arrays: Array) -> DType:
    """float64 if an array has it, else float32: where distances, sums and losses are computed."""
    return wide(*(x.dtype for x in arrays))


def check_codebook(codebook: Array) -> tuple[int, int]:
    """Return (K, d) of a codebook, or raise."""
    check_floating("codebook", codebook)
    if codebook.ndim != 2 or codebook.shape[0] < 1 or codebook.shape[1] < 1:
        raise ValueError(
            "codebook must be [codes, dim] with at least one code of one feature; got shape "
            f"{tuple(codebook.shape)}."
        )
    return codebook.shape[0], codebook.shape[1]


def check_vectors(z: Array, dim: int | None = None, *, name: str = "z") -> int:
    """Return the size of the last axis, or raise unless it is `dim` (at least 1 if not given)."""
    check_floating(name, z)
    if z.ndim < 1 or z.shape[-1] < 1:
        raise ValueError(f"{name} must be [..., dim] with dim ≥ 1; got shape {tuple(z.shape)}.")
    if dim is not None and z.shape[-1] != dim:
        raise ValueError(
            f"{name} must have {dim} features on its last axis; got shape {tuple(z.shape)}."
        )
    return z.shape[-1]


def check_mask(mask: Bool[Array, "..."] | None, shape: tuple[int, ...]) -> None:
    """Raise unless `mask` is None or boolean of this shape."""
    if mask is None:
        return
    dtype = getattr(mask, "dtype", None)
    if dtype != jnp.bool_:
        raise TypeError(f"mask must be a boolean array; got {dtype if dtype else repr(mask)}.")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"mask must have shape {tuple(shape)}, one entry a vector; got {tuple(mask.shape)}."
        )


def check_index(index: Array, name: str = "index") -> Array:
    """`index` in 32 bits at least, or raise unless it is an array of integers.

    Codes may be stored in 8 or 16 bits, into which the number of codes need not fit.
    """
    dtype = getattr(index, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integers; got {dtype if dtype else index!r}.")
    return index.astype(jnp.int32) if index.dtype.itemsize < 4 else index


def across(x: Array, like: Array) -> Array:
    """`x` [dim] with leading axes of size 1, so that it broadcasts against `like` [..., dim]."""
    return jnp.expand_dims(x, range(like.ndim - 1))


def select_rows(mask: Bool[Array, "..."] | None, z: Array) -> Array:
    """`z` [..., dim] with zeros in the rows that the mask excludes."""
    return z if mask is None else jnp.where(mask[..., None], z, jnp.zeros_like(z))


def psum(x: Array, axis_name) -> Array:
    """Sum over named axes, if any."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)
