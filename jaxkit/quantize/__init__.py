"""Vector quantization: codes for vectors, gradients through them, and codebooks that stay alive."""

from jaxkit.quantize.ema import (
    EMAState,
    batch_statistics,
    ema_codebook,
    ema_init,
    ema_update,
    revive,
)
from jaxkit.quantize.estimators import estimate, gumbel_softmax_code
from jaxkit.quantize.init import KMeans, data_init, kmeans, uniform_init
from jaxkit.quantize.losses import (
    code_entropies,
    codebook_loss,
    commitment_loss,
    entropy_loss,
    orthogonality_loss,
)
from jaxkit.quantize.search import (
    lookup,
    nearest_code,
    normalize,
    sample_code,
    squared_distances,
)
from jaxkit.quantize.stats import code_counts, perplexity, usage

__all__ = [
    "EMAState",
    "KMeans",
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
    "gumbel_softmax_code",
    "kmeans",
    "lookup",
    "nearest_code",
    "normalize",
    "orthogonality_loss",
    "perplexity",
    "revive",
    "sample_code",
    "squared_distances",
    "uniform_init",
    "usage",
]
