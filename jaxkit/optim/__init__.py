"""Optimizers that plug into optax, and the contract that they all pass."""

from jaxkit.optim.contract import CONTRACT, check_optimizer
from jaxkit.optim.lazy import (
    LazyRowsState,
    lazy_rows,
    split_embeddings,
    swap_halves,
    tied_logits,
)
from jaxkit.optim.rounding import stochastic_round
from jaxkit.optim.tiger import TigerState, is_update_step, scale_by_tiger, tiger
from jaxkit.optim.tiger_keras import keras_labels, piecewise_linear, tiger_keras

__all__ = [
    "CONTRACT",
    "LazyRowsState",
    "TigerState",
    "check_optimizer",
    "is_update_step",
    "keras_labels",
    "lazy_rows",
    "piecewise_linear",
    "scale_by_tiger",
    "split_embeddings",
    "stochastic_round",
    "swap_halves",
    "tied_logits",
    "tiger",
    "tiger_keras",
]
