"""Vector quantization: codes for vectors, gradients through them, and codebooks that stay alive.

The functions take and return explicit state; `jaxkit.quantize.layers` has `flax.nnx` modules.
"""

from jaxkit.quantize.ema import (
    EMAState,
    batch_statistics,
    ema_codebook,
    ema_init,
    ema_update,
    revive,
)
from jaxkit.quantize.estimators import ESTIMATORS, estimate, gumbel_softmax_code
from jaxkit.quantize.fsq import (
    RECOMMENDED_LEVELS,
    FSQOutput,
    fsq,
    fsq_code,
    fsq_codebook,
    fsq_index,
)
from jaxkit.quantize.init import KMeans, data_init, kmeans, uniform_init
from jaxkit.quantize.layers import FSQ, LFQ, CodebookState, ResidualVQ, VectorQuantizer
from jaxkit.quantize.lfq import (
    LFQOutput,
    lfq,
    lfq_code,
    lfq_entropies,
    lfq_entropy_loss,
    lfq_index,
)
from jaxkit.quantize.losses import (
    code_entropies,
    codebook_loss,
    commitment_loss,
    entropy_loss,
    orthogonality_loss,
)
from jaxkit.quantize.product import merge_heads, product_quantize, split_heads
from jaxkit.quantize.residual import residual_init, residual_quantize
from jaxkit.quantize.search import (
    lookup,
    nearest_code,
    normalize,
    sample_code,
    squared_distances,
)
from jaxkit.quantize.simvq import simvq_codebook, simvq_init
from jaxkit.quantize.spherical import spherical, spherical_entropies
from jaxkit.quantize.stats import code_counts, perplexity, usage
from jaxkit.quantize.vq import VQOutput, VQState, vector_quantize, vq_init

__all__ = [
    "ESTIMATORS",
    "FSQ",
    "LFQ",
    "RECOMMENDED_LEVELS",
    "CodebookState",
    "EMAState",
    "FSQOutput",
    "KMeans",
    "LFQOutput",
    "ResidualVQ",
    "VQOutput",
    "VQState",
    "VectorQuantizer",
    "batch_statistics",
    "code_counts",
    "code_entropies",
    "codebook_loss",
    "commitment_loss",
    "data_init",
    "ema_codebook",
    "ema_init",
    "ema_update",
    "entropy_loss",
    "estimate",
    "fsq",
    "fsq_code",
    "fsq_codebook",
    "fsq_index",
    "gumbel_softmax_code",
    "kmeans",
    "lfq",
    "lfq_code",
    "lfq_entropies",
    "lfq_entropy_loss",
    "lfq_index",
    "lookup",
    "merge_heads",
    "nearest_code",
    "normalize",
    "orthogonality_loss",
    "perplexity",
    "product_quantize",
    "residual_init",
    "residual_quantize",
    "revive",
    "sample_code",
    "simvq_codebook",
    "simvq_init",
    "spherical",
    "spherical_entropies",
    "split_heads",
    "squared_distances",
    "uniform_init",
    "usage",
    "vector_quantize",
    "vq_init",
]
