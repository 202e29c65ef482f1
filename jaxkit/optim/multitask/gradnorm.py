"""GradNorm: learn weights so that all tasks train at the same rate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxkit._checks import check_real
from jaxkit._typing import Array, Float
from jaxkit.optim.multitask._gram import check_vector, pick, prepare

__all__ = ["GradNormState", "gradnorm", "gradnorm_init"]


class GradNormState(NamedTuple):
    """The weights of the coming step, the losses of the first, and the number of steps seen."""

    weights: Array
    initial: Array
    steps: Array


def gradnorm_init(tasks: int) -> GradNormState:
    """w = 1.

    Example:
      >>> print(gradnorm_init(2).weights)
      [1. 1.]
    """
    return GradNormState(jnp.ones(tasks), jnp.ones(tasks), jnp.zeros([], jnp.int32))


def gradnorm(
    gram: Float[Array, "tasks tasks"],
    state: GradNormState,
    *,
    losses: Float[Array, " tasks"],
    alpha: float = 1.5,
    learning_rate: float = 0.025,
) -> tuple[Float[Array, " tasks"], GradNormState]:
    r"""One gradient step in w on Σ |w_i r_i − mean(w r) ρ_i^α|, the second term held constant.

    ρ_i = (L_i/L_i(0)) over its mean: a task that has fallen less than others is to have a longer
    gradient. Weights are kept at or above zero and their sum at n.

    Args:
      gram: G = J Jᵀ, of the last shared layer only (`measured` of `aggregate`).
      state: from `gradnorm_init`, or the step before.
      losses: L; those of the first step are L(0).
      alpha: how strongly rates are to be evened out.
      learning_rate: of w.

    Returns:
      w of this step, and the new state.

    Raises:
      ValueError: a loss is not positive; an option is negative.

    Example:
      >>> w, state = gradnorm(jnp.diag(jnp.array([1.0, 9.0])), gradnorm_init(2), losses=jnp.ones(2))
      >>> print(jnp.array_str(state.weights, precision=4))  # the longer gradient gets less
      [1.0513 0.9487]

    Source: Chen et al. 2018 (arXiv 1711.02257).
    """
    check_real("alpha", alpha, least=0)
    check_real("learning_rate", learning_rate, least=0)
    prepared = prepare(gram)
    G, alive, norms, trace = prepared
    tasks = len(G)
    check_vector("losses", losses, tasks, positive=True)
    values = jax.lax.stop_gradient(losses).astype(G.dtype)
    initial = jnp.where(state.steps == 0, values, state.initial.astype(G.dtype))
    w = state.weights.astype(G.dtype)
    r = jnp.where(alive, norms * jnp.sqrt(trace), 0)
    relative = values / initial
    target = jnp.mean(w * r) * (relative / jnp.mean(relative)) ** alpha
    new = jnp.maximum(w - learning_rate * jnp.sign(w * r - target) * r, 0)
    sum_ = jnp.sum(new)
    new = jnp.where(sum_ > 0, tasks * new / jnp.where(sum_ > 0, sum_, 1), w)
    state = GradNormState(
        new.astype(state.weights.dtype),
        initial.astype(state.initial.dtype),
        optax.safe_increment(state.steps),
    )
    return pick(w, prepared, gram), state
