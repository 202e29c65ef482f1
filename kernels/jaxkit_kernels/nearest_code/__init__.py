"""Search of a codebook: the nearest code of every vector, without the matrix of distances."""

from jaxkit_kernels._blocks import (
    NearestCodeGpuBlocks,
    NearestCodeTpuBlocks,
    NearestCodeXlaBlocks,
)
from jaxkit_kernels.nearest_code.api import NearestCode, nearest_code

__all__ = [
    "NearestCode",
    "NearestCodeGpuBlocks",
    "NearestCodeTpuBlocks",
    "NearestCodeXlaBlocks",
    "nearest_code",
]
