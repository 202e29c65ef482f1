"""Kernels for JAX: each operation as a definition, a fast pure-JAX form, and Pallas kernels.

Every operation takes `implementation="auto" | "reference" | "xla" | "pallas_tpu" | "pallas_gpu"`.
"""

from jaxkit_kernels.cauchy import dplr_generating_function
from jaxkit_kernels.vandermonde import vandermonde

__all__ = ["dplr_generating_function", "vandermonde"]
