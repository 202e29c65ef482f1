"""Kernels of diagonal state-space models: real parts of sums of geometric sequences."""

from jaxkit_kernels._blocks import (
    VandermondeGpuBlocks,
    VandermondeTpuBlocks,
    VandermondeXlaBlocks,
)
from jaxkit_kernels.vandermonde.api import vandermonde

__all__ = [
    "VandermondeGpuBlocks",
    "VandermondeTpuBlocks",
    "VandermondeXlaBlocks",
    "vandermonde",
]
