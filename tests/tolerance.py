"""The one table of tolerances: unit roundoff of the dtype times a factor for the work done."""

import jax.numpy as jnp
import numpy as np

# Units of roundoff granted to one rounding-error-free algorithm step.
_FACTOR = {"float64": 64.0, "float32": 16.0, "bfloat16": 4.0, "float16": 4.0}


def tol(dtype, length: int = 1) -> float:
    """Relative tolerance for a reduction over `length` terms in `dtype`.

    Rounding errors of a sum of n terms grow like sqrt(n) when they are independent.
    """
    name = jnp.dtype(dtype).name.replace("complex128", "float64").replace("complex64", "float32")
    return float(jnp.finfo(name).eps) * _FACTOR[name] * float(np.sqrt(max(length, 1)))
