"""Softmax attention over vector-quantised keys: exact in linear time, with a state of fixed size.

Source: Lingle 2023, "Transformer-VQ" (arXiv 2309.16354); kexue.fm posts 9844 and 9862.
"""

from jaxkit.attention.vq.biases import relative_sinusoids, rotate, xl_bias
from jaxkit.attention.vq.block import (
    REDUCTIONS,
    Cache,
    merge,
    reduce_blocks,
    summarize,
    vq_attention,
)
from jaxkit.attention.vq.codes import QuantizedKeys, nearest_codes, quantize_keys
from jaxkit.attention.vq.decode import VQState, absorb, init_state, prefill, step
from jaxkit.attention.vq.reference import quadratic_attention

__all__ = [
    "REDUCTIONS",
    "Cache",
    "QuantizedKeys",
    "VQState",
    "absorb",
    "init_state",
    "merge",
    "nearest_codes",
    "prefill",
    "quadratic_attention",
    "quantize_keys",
    "reduce_blocks",
    "relative_sinusoids",
    "rotate",
    "step",
    "summarize",
    "vq_attention",
    "xl_bias",
]
