"""Softmax attention over vector-quantised keys: recent keys exactly, the rest by their codes."""

from jaxkit_kernels._blocks import (
    VqAttentionGpuBlocks,
    VqAttentionTpuBlocks,
    VqAttentionXlaBlocks,
)
from jaxkit_kernels.vq_attention.api import vq_attention, vq_attention_decode

__all__ = [
    "VqAttentionGpuBlocks",
    "VqAttentionTpuBlocks",
    "VqAttentionXlaBlocks",
    "vq_attention",
    "vq_attention_decode",
]
