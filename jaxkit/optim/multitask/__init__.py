"""Several losses on shared parameters: weights from losses, directions from gradients.

    grads, aux = multitask.aggregate(losses_fn, params, method="upgrad")

The methods themselves are functions of a Gram matrix G = J Jᵀ, or of the losses, to weights.
"""

from jaxkit.optim.multitask.aggregate import (
    METHODS,
    Aggregation,
    Method,
    MultitaskState,
    aggregate,
    aggregate_encoder,
    aggregate_rows,
    init_state,
)
from jaxkit.optim.multitask.balanced import aligned, config, imtl_g
from jaxkit.optim.multitask.cagrad import cagrad
from jaxkit.optim.multitask.constrained import decoupled_auxiliary, dual_proj, primary, upgrad
from jaxkit.optim.multitask.gradnorm import GradNormState, gradnorm, gradnorm_init
from jaxkit.optim.multitask.jacobian import combine, gram_matrix, jacobian
from jaxkit.optim.multitask.losses import (
    DWAState,
    FAMOState,
    LogScaleState,
    dwa,
    dwa_init,
    equal,
    famo,
    famo_init,
    imtl_l,
    imtl_l_loss,
    inverse_reference,
    log_scale_init,
    power_mean,
    power_mean_weights,
    random_weights,
    real_time,
    uncertainty,
    uncertainty_loss,
)
from jaxkit.optim.multitask.mgda import frank_wolfe, mean, mgda, normalized_sum, total
from jaxkit.optim.multitask.nash import fairgrad, nash
from jaxkit.optim.multitask.quadratic import quadratic
from jaxkit.optim.multitask.surgery import (
    GradVacState,
    graddrop,
    gradvac,
    gradvac_init,
    pcgrad,
)

__all__ = [
    "METHODS",
    "Aggregation",
    "DWAState",
    "FAMOState",
    "GradNormState",
    "GradVacState",
    "LogScaleState",
    "Method",
    "MultitaskState",
    "aggregate",
    "aggregate_encoder",
    "aggregate_rows",
    "aligned",
    "cagrad",
    "combine",
    "config",
    "decoupled_auxiliary",
    "dual_proj",
    "dwa",
    "dwa_init",
    "equal",
    "fairgrad",
    "famo",
    "famo_init",
    "frank_wolfe",
    "graddrop",
    "gradnorm",
    "gradnorm_init",
    "gradvac",
    "gradvac_init",
    "gram_matrix",
    "imtl_g",
    "imtl_l",
    "imtl_l_loss",
    "init_state",
    "inverse_reference",
    "jacobian",
    "log_scale_init",
    "mean",
    "mgda",
    "nash",
    "normalized_sum",
    "pcgrad",
    "power_mean",
    "power_mean_weights",
    "primary",
    "quadratic",
    "random_weights",
    "real_time",
    "total",
    "uncertainty",
    "uncertainty_loss",
    "upgrad",
]
