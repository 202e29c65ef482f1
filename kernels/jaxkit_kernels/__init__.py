"""Kernels for JAX: each operation as a definition, a fast pure-JAX form, and Pallas kernels.

Every operation takes `implementation="auto" | "reference" | "xla" | "pallas_tpu" | "pallas_gpu"`.
"""

from jaxkit_kernels.cauchy import dplr_generating_function
from jaxkit_kernels.nearest_code import NearestCode, nearest_code
from jaxkit_kernels.vandermonde import vandermonde
from jaxkit_kernels.vq_attention import vq_attention, vq_attention_decode

__all__ = [
    "NearestCode",
    "dplr_generating_function",
    "nearest_code",
    "vandermonde",
    "vq_attention",
    "vq_attention_decode",
]
