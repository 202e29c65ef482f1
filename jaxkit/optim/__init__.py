"""Optimizers that plug into optax, and the contract that they all pass.

A file that holds a function of its own name begins with an underscore, so that the name is always
the function.
"""

from jaxkit.optim import multitask
from jaxkit.optim._tiger import TigerState, is_update_step, scale_by_tiger, tiger
from jaxkit.optim._tiger_keras import keras_labels, piecewise_linear, tiger_keras
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
from jaxkit.optim.loss_scaling import (
    LossScaleState,
    all_finite,
    dynamic_loss_scale,
    loss_scale,
    loss_scale_state,
    scale_cotangent,
    scaled_value_and_grad,
    static_loss_scale,
)
from jaxkit.optim.precision import (
    LeafReport,
    Policy,
    layer_norm,
    mask_value,
    masked_softmax,
    precision_report,
    rms_norm,
    safe_eps,
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

__all__ = [
    "CONTRACT",
    "AccumulationState",
    "EGDDState",
    "EGState",
    "EGStepSizeState",
    "LazyRowsState",
    "LeafReport",
    "LossScaleState",
    "Policy",
    "StepSizes",
    "TigerState",
    "accumulated_adam",
    "accumulated_sgd",
    "all_finite",
    "at_window_ends",
    "check_optimizer",
    "dynamic_loss_scale",
    "eg",
    "eg_sgd",
    "eg_stepsize",
    "egdd",
    "exponentiated_gradient",
    "is_update_step",
    "keras_labels",
    "layer_norm",
    "lazy_rows",
    "loss_scale",
    "loss_scale_state",
    "mask_value",
    "masked_softmax",
    "micro_step_beta",
    "multitask",
    "piecewise_linear",
    "precision_report",
    "rms_norm",
    "safe_eps",
    "scale_by_accumulated_adam",
    "scale_by_accumulated_momentum",
    "scale_by_tiger",
    "scale_cotangent",
    "scaled_value_and_grad",
    "split_embeddings",
    "static_loss_scale",
    "stochastic_round",
    "swap_halves",
    "tied_logits",
    "tiger",
    "tiger_keras",
]
