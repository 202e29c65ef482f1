"""Optimizers that plug into optax, and the contract that they all pass."""

from jaxkit.optim import multitask
from jaxkit.optim.accumulation import (
    AccumulationState,
    accumulated_adam,
    accumulated_sgd,
    at_window_ends,
    micro_step_beta,
    scale_by_accumulated_adam,
    scale_by_accumulated_momentum,
)
from jaxkit.optim.contract import CONTRACT, check_optimizer
from jaxkit.optim.exponentiated import EGState, eg, exponentiated_gradient
from jaxkit.optim.lazy import (
    LazyRowsState,
    lazy_rows,
    split_embeddings,
    swap_halves,
    tied_logits,
)
from jaxkit.optim.rounding import stochastic_round
from jaxkit.optim.step_size import (
    EGDDState,
    EGStepSizeState,
    StepSizes,
    eg_sgd,
    eg_stepsize,
    egdd,
)
from jaxkit.optim.tiger import TigerState, is_update_step, scale_by_tiger, tiger
from jaxkit.optim.tiger_keras import keras_labels, piecewise_linear, tiger_keras

__all__ = [
    "AccumulationState",
    "CONTRACT",
    "LazyRowsState",
    "TigerState",
    "accumulated_adam",
    "accumulated_sgd",
    "at_window_ends",
    "check_optimizer",
    "is_update_step",
    "keras_labels",
    "lazy_rows",
    "micro_step_beta",
    "multitask",
    "piecewise_linear",
    "scale_by_accumulated_adam",
    "scale_by_accumulated_momentum",
    "scale_by_tiger",
    "split_embeddings",
    "stochastic_round",
    "swap_halves",
    "tied_logits",
    "tiger",
    "tiger_keras",
    "EGState",
    "eg",
    "exponentiated_gradient",
    "EGDDState",
    "EGStepSizeState",
    "StepSizes",
    "eg_sgd",
    "eg_stepsize",
    "egdd",
]
