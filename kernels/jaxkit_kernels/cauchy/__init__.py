"""Truncated generating function of diagonal-plus-low-rank state-space kernels."""

from jaxkit_kernels._blocks import CauchyGpuBlocks, CauchyTpuBlocks, CauchyXlaBlocks
from jaxkit_kernels.cauchy.api import dplr_generating_function

__all__ = ["CauchyGpuBlocks", "CauchyTpuBlocks", "CauchyXlaBlocks", "dplr_generating_function"]
