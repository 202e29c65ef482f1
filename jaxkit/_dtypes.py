"""In which type to compute."""

from typing import Any

import jax.numpy as jnp

__all__ = ["wide"]


def wide(*dtypes: Any) -> Any:
    """The dtype of sums, statistics and distances: float64 if any of them is, else float32."""
    found = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if found else jnp.float32)
