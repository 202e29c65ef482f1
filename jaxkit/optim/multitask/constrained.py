"""No task gets worse: DualProj, UPGrad, and a main task with auxiliaries."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit._checks import check_int
from jaxkit._typing import Array, ArrayLike, Float
from jaxkit.optim.multitask._gram import pick, preference_vector, prepare
from jaxkit.optim.multitask.jacobian import combine, gram_matrix
from jaxkit.optim.multitask.quadratic import quadratic

__all__ = ["decoupled_auxiliary", "dual_proj", "primary", "upgrad"]


def dual_proj(
    gram: Float[Array, "tasks tasks"], *, preference: ArrayLike | None = None
) -> Float[Array, " tasks"]:
    r"""The direction nearest to the mean gradient that makes no task worse: min vᵀG v over v ≥ a.

    Args:
      gram: G = J Jᵀ.
      preference: a, by default 1/n each.

    Returns:
      w, with Gw ≥ 0; zero for tasks whose gradient is zero or not finite.

    Raises:
      ValueError: preference of wrong length or negative.

    Example:
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> print(jnp.array_str(dual_proj(J @ J.T), precision=4))
      [0.6111 0.5   ]

    Source: Lopez-Paz & Ranzato 2017 (GEM, arXiv 1706.08840); Quinton & Rey 2024 (2406.16232).
    """
    prepared = prepare(gram)
    G, alive, _, _ = prepared
    a = jnp.where(alive, preference_vector(preference, G), 0)
    return pick(a + quadratic(G, -(G @ a), alive), prepared, gram)


def upgrad(
    gram: Float[Array, "tasks tasks"], *, preference: ArrayLike | None = None
) -> Float[Array, " tasks"]:
    r"""Project every task's gradient so that it makes no task worse, and take the mean of them.

    Σ_i argmin vᵀG v over v ≥ a_i e_i.

    Args:
      gram: G = J Jᵀ.
      preference: a, by default 1/n each.

    Returns:
      w, with Gw ≥ 0; zero for tasks whose gradient is zero or not finite.

    Raises:
      ValueError: preference of wrong length or negative.

    Example:
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> print(jnp.array_str(upgrad(J @ J.T), precision=4))
      [1.1111 0.7895]

    Source: Quinton & Rey 2024 (arXiv 2406.16232).
    """
    prepared = prepare(gram)
    G, alive, _, _ = prepared
    rows = jnp.diag(jnp.where(alive, preference_vector(preference, G), 0))
    changes = jax.vmap(lambda a: quadratic(G, -(G @ a), alive))(rows)
    return pick(jnp.sum(rows + changes, axis=0), prepared, gram)


def primary(
    gram: Float[Array, "tasks tasks"], *, mains: int | Sequence[int] = 0
) -> Float[Array, " tasks"]:
    r"""Follow the main task, as far as that makes no auxiliary worse.

        max ⟨u, g_0⟩ − ½‖u‖²  subject to  ⟨u, g_i⟩ ≥ 0,

    whose dual is min over λ ≥ 0 of ‖g_0 + Σ λ_i g_i‖²; w = (1, λ). With one auxiliary
    λ = relu(−g_0·g_1)/‖g_1‖². Several main tasks share a simplex. The main task never gets worse:
    ⟨u, g_0⟩ ≥ ‖u‖².

    Args:
      gram: G = J Jᵀ.
      mains: which task is the main one, or several.

    Returns:
      w; zero for tasks whose gradient is zero or not finite, and all zero when no main task is
      left.

    Raises:
      ValueError: mains name no task, one twice, or none.

    Example:
      >>> J = jnp.array([[3.0, -3.0, -2.0], [-1.0, 1.0, 1.0], [-1.0, 2.0, 0.0]])
      >>> print(jnp.array_str(primary(J @ J.T), precision=4))
      [1.     2.1667 0.5   ]

    Source: post 8907 (whose iteration stalls: on this example at λ = (13/15, 9/5)).
    """
    prepared = prepare(gram)
    G, alive, _, _ = prepared
    tasks = len(G)
    chosen = tuple(np.atleast_1d(np.asarray(mains)).tolist())
    for main in chosen:
        check_int("mains", main, least=0)
    if not chosen or max(chosen) >= tasks or len(set(chosen)) < len(chosen):
        raise ValueError(f"mains must be distinct indices below {tasks}; got {mains!r}.")
    return pick(quadratic(G, jnp.zeros_like(G[0]), alive, simplex=chosen), prepared, gram)


def decoupled_auxiliary() -> optax.GradientTransformationExtraArgs:
    r"""Correct an optimizer's update, rather than its gradient, for the auxiliary tasks.

    The update −u is that of the main loss alone; it becomes −u − Σ λ_i g_i with the λ ≥ 0 of
    `primary`, so that ⟨update, g_i⟩ ≤ 0, whatever the optimizer made of the gradient. Compare
    AdamW, whose decay does not pass through Adam. Chained after the optimizer; `update` takes
    `auxiliary`, a pytree of leaves `[m, ...]` with the auxiliary gradients. With the parameters as
    the gradient of ½‖θ‖² it is a decay that acts only on updates that would make ‖θ‖ grow.

    Returns:
      An optax transformation without state.

    Raises:
      ValueError: `auxiliary` is missing.

    Example:
      >>> optimizer = optax.chain(optax.sgd(1.0), decoupled_auxiliary())
      >>> params = jnp.array([-2.0, 1.0, 0.5])
      >>> grads = jnp.array([1.0, -2.0, 3.0])
      >>> updates, _ = optimizer.update(
      ...     grads, optimizer.init(params), params, auxiliary=params[None]
      ... )
      >>> print(jnp.array_str(updates, precision=4))
      [-0.0476  1.5238 -3.2381]

    Source: post 8907; Loshchilov & Hutter 2017 (arXiv 1711.05101).
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, auxiliary: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del params, extra_args
        if auxiliary is None:
            raise ValueError("auxiliary must be given to the update of decoupled_auxiliary.")
        rows = jax.tree.map(
            lambda u, g: jnp.concatenate([-u[None], g.astype(u.dtype)]), updates, auxiliary
        )
        if not jax.tree.leaves(rows):
            return updates, state
        # An update that is not finite stays so: what is to be done with it is not decided here.
        weights = primary(gram_matrix(rows)).at[0].set(1)
        return jax.tree.map(lambda u: -u, combine(rows, weights)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
