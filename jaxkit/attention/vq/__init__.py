"""Softmax attention over vector-quantised keys: exact in linear time, with a state of fixed size.

Forms: `quadratic_attention` is the definition, `vq_attention` runs in blocks, `step` and `prefill`
decode; `bidirectional_attention` and `soft_attention` are the variants. `VQAttention` and
`VQTransformer` are the layer and the language model over them.

Source: Lingle 2023, "Transformer-VQ" (arXiv 2309.16354); kexue.fm posts 9844 and 9862.
"""

from jaxkit.attention.vq.biases import relative_sinusoids, rotate, xl_bias
from jaxkit.attention.vq.bidirectional import bidirectional_attention
from jaxkit.attention.vq.block import (
    REDUCTIONS,
    Cache,
    merge,
    reduce_blocks,
    summarize,
    vq_attention,
)
from jaxkit.attention.vq.codebook import (
    CodeStatistics,
    code_statistics,
    codebook_from_keys,
    codebook_of,
    init_codebook,
    update_codebook,
    update_codebooks,
)
from jaxkit.attention.vq.codes import QuantizedKeys, nearest_codes, quantize_keys
from jaxkit.attention.vq.cost import Costs, attention_costs
from jaxkit.attention.vq.decode import VQState, absorb, init_state, prefill, step
from jaxkit.attention.vq.layers import CodebookVariable, VQAttention, rms_norm
from jaxkit.attention.vq.model import (
    LanguageModelLoss,
    VQBlock,
    VQModelState,
    VQTransformer,
    bits_per_byte,
    next_token_loss,
    sample_token,
)
from jaxkit.attention.vq.reference import quadratic_attention
from jaxkit.attention.vq.soft import (
    soft_assignment,
    soft_attention,
    soft_init_state,
    soft_prefill,
    soft_step,
)

__all__ = [
    "REDUCTIONS",
    "Cache",
    "CodeStatistics",
    "CodebookVariable",
    "Costs",
    "LanguageModelLoss",
    "QuantizedKeys",
    "VQAttention",
    "VQBlock",
    "VQModelState",
    "VQState",
    "VQTransformer",
    "absorb",
    "attention_costs",
    "bidirectional_attention",
    "bits_per_byte",
    "code_statistics",
    "codebook_from_keys",
    "codebook_of",
    "init_codebook",
    "init_state",
    "merge",
    "nearest_codes",
    "next_token_loss",
    "prefill",
    "quadratic_attention",
    "quantize_keys",
    "reduce_blocks",
    "relative_sinusoids",
    "rms_norm",
    "rotate",
    "sample_token",
    "soft_assignment",
    "soft_attention",
    "soft_init_state",
    "soft_prefill",
    "soft_step",
    "step",
    "summarize",
    "update_codebook",
    "update_codebooks",
    "vq_attention",
    "xl_bias",
]
