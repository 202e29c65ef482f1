"""Shapes and dtypes shared by the HiPPO functions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_floating, is_traced
from jaxkit._typing import Array

HIGHEST = jax.lax.Precision.HIGHEST


def signal(u: Any) -> Array:
    """`u` as a JAX array `[..., length]` of real floating-point numbers, with some samples."""
    u = jnp.asarray(u)
    check_floating("u", u)
    if u.ndim < 1 or u.shape[-1] < 1:
        raise ValueError(
            f"u must be [..., length] with length at least 1; got shape {tuple(u.shape)}."
        )
    return u


def check_increasing(name: str, times: Any, length: int, *, above: float, meaning: str) -> Any:
    """Times `[length]` that increase strictly from above `above`; float64 where they are known."""
    if not is_traced(times):
        times = np.asarray(times)
        if not (np.issubdtype(times.dtype, np.floating) or np.issubdtype(times.dtype, np.integer)):
            raise TypeError(f"{name} must be real numbers; got dtype {times.dtype}.")
        times = times.astype(np.float64)
    if times.shape != (length,):
        raise ValueError(
            f"{name} must be [{length}], one for each sample; got shape {tuple(times.shape)}."
        )
    if is_traced(times) or is_traced(above):
        return times
    if not np.isfinite(times).all():
        raise ValueError(f"{name} must be finite; got {times[~np.isfinite(times)][0]}.")
    if not times[0] > above:
        raise ValueError(f"{name} must start after {meaning} {above}; got {times[0]}.")
    falls = np.flatnonzero(np.diff(times) <= 0)
    if falls.size:
        k = int(falls[0])
        raise ValueError(
            f"{name} must increase strictly; got {times[k]} followed by {times[k + 1]}."
        )
    return times
