"""Attention as a recurrence: mergeable softmax states, and what memory costs in time.

`state` has the accumulators, `block` exact attention in tiles with a backward pass that knows the
log-sum-exp, `decode` and `parallel` what is read in pieces, `reference` the slow forms to read.
`modes` and `recompute` decode a stack of layers with more or less memory, `costs` says at what
price, and `page_turning` lends the same trade to any RNN.
"""

from jaxkit.attention.streaming import costs
from jaxkit.attention.streaming.block import blockwise_attention
from jaxkit.attention.streaming.decode import (
    KVCache,
    append,
    chunked_prefill,
    init_cache,
    prefill_chunk,
    split_decode,
)
from jaxkit.attention.streaming.modes import Decoder, DecodeState, layerwise
from jaxkit.attention.streaming.page_turning import page_turning
from jaxkit.attention.streaming.parallel import merge_over_devices, ring_attention
from jaxkit.attention.streaming.recompute import (
    AttentionModel,
    CostWarning,
    Counts,
    ModelParams,
    recompute,
)
from jaxkit.attention.streaming.reference import (
    naive_attention,
    prefix_attention,
    sequential_attention,
    sequential_states,
)
from jaxkit.attention.streaming.state import (
    Attended,
    SoftmaxState,
    finalize,
    from_scores,
    identity,
    merge,
    merge_all,
    merge_normalized,
    merge_normalized_all,
    sink,
    unfinalize,
    update,
)
from jaxkit.attention.streaming.toy import init_toy, toy_logits, toy_model

__all__ = [
    "Attended",
    "AttentionModel",
    "CostWarning",
    "Counts",
    "DecodeState",
    "Decoder",
    "KVCache",
    "ModelParams",
    "SoftmaxState",
    "append",
    "blockwise_attention",
    "chunked_prefill",
    "costs",
    "finalize",
    "from_scores",
    "identity",
    "init_cache",
    "init_toy",
    "layerwise",
    "merge",
    "merge_all",
    "merge_normalized",
    "merge_normalized_all",
    "merge_over_devices",
    "naive_attention",
    "page_turning",
    "prefill_chunk",
    "prefix_attention",
    "recompute",
    "ring_attention",
    "sequential_attention",
    "sequential_states",
    "sink",
    "split_decode",
    "toy_logits",
    "toy_model",
    "unfinalize",
    "update",
]
