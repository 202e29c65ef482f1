"""Sum, mean, normalised sum and MGDA: the point of least norm in the hull of the gradients."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_int
from jaxkit._typing import Array, ArrayLike, Float
from jaxkit.optim.multitask._gram import check_vector, pick, preference_vector, prepare
from jaxkit.optim.multitask.quadratic import quadratic

__all__ = ["frank_wolfe", "mean", "mgda", "normalized_sum", "total"]


def total(gram: Float[Array, "tasks tasks"]) -> Float[Array, " tasks"]:
    """Weights one: the gradient of the sum of the losses.

    Args:
      gram: G = J Jᵀ.

    Returns:
      w; zero for tasks whose gradient is zero or not finite.

    Example:
      >>> print(total(jnp.eye(2)))
      [1. 1.]

    Source: post 8870.
    """
    prepared = prepare(gram)
    return pick(jnp.ones_like(prepared.norms), prepared, gram)


def mean(
    gram: Float[Array, "tasks tasks"], *, preference: ArrayLike | None = None
) -> Float[Array, " tasks"]:
    """Weights a: the gradient of the (weighted) mean of the losses.

    Args:
      gram: G = J Jᵀ.
      preference: a, by default 1/n each.

    Returns:
      w; zero for tasks whose gradient is zero or not finite.

    Raises:
      ValueError: preference of wrong length, or negative.

    Example:
      >>> print(mean(jnp.eye(2)))
      [0.5 0.5]

    Source: post 8870.
    """
    prepared = prepare(gram)
    return pick(preference_vector(preference, prepared.G), prepared, gram)


def normalized_sum(gram: Float[Array, "tasks tasks"]) -> Float[Array, " tasks"]:
    r"""w_i = 1/‖g_i‖: the direction that neither scaling nor shifting a loss changes.

    Args:
      gram: G = J Jᵀ.

    Returns:
      w; zero for tasks whose gradient is zero or not finite.

    Example:
      >>> print(normalized_sum(jnp.diag(jnp.array([4.0, 16.0]))))
      [0.5  0.25]

    Source: post 8870.
    """
    prepared = prepare(gram)
    return pick(1 / (prepared.norms * jnp.sqrt(prepared.trace)), prepared, gram)


def mgda(
    gram: Float[Array, "tasks tasks"],
    *,
    normalize: Literal["none", "l2", "loss", "loss*l2"] = "none",
    losses: Float[Array, " tasks"] | None = None,
    solver: Literal["exact", "frank_wolfe"] = "exact",
    steps: int = 100,
) -> Float[Array, " tasks"]:
    r"""Multiple-gradient descent: min over the simplex of wᵀG w, the hull's point of least norm.

    At the optimum (Gw)_i ≥ wᵀG w, with equality wherever w_i > 0: every task falls at least as fast
    as ‖u‖², or u = 0 and no direction helps all. Where gradients are affinely dependent w is not
    unique, u is.

    Args:
      gram: G = J Jᵀ.
      normalize: rows are first divided by s = 1, r_i, L_i or r_i L_i; w is then w'/s.
      losses: L, where `normalize` needs it.
      solver: the exact one, or Frank-Wolfe, which comes slowly near.
      steps: of Frank-Wolfe.

    Returns:
      w; on the simplex if rows are not normalised. Zero for tasks whose gradient is zero or not
      finite.

    Raises:
      ValueError: unknown option; losses are needed and missing, or not positive.

    Example:
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> print(jnp.array_str(mgda(J @ J.T), precision=4))
      [0.6 0.4]

    Source: Sener & Koltun 2018 (arXiv 1810.04650); Désidéri 2012; post 8896.
    """
    check_choice("normalize", normalize, ("none", "l2", "loss", "loss*l2"))
    check_choice("solver", solver, ("exact", "frank_wolfe"))
    prepared = prepare(gram)
    G, _, norms, trace = prepared
    tasks = len(G)
    scale = jnp.ones_like(norms)
    if "l2" in normalize:
        scale = scale * norms * jnp.sqrt(trace)
    if "loss" in normalize:
        if losses is None:
            raise ValueError(f"losses must be given for normalize={normalize!r}; got None.")
        check_vector("losses", losses, tasks, positive=True)
        scale = scale * jax.lax.stop_gradient(losses).astype(G.dtype)
    rows = prepare(G * trace / jnp.outer(scale, scale))
    if solver == "frank_wolfe":
        weights, _ = frank_wolfe(rows.G, steps=steps)
    elif tasks == 2:
        weights = _two(rows.G, rows.alive)
    else:
        weights = quadratic(rows.G, jnp.zeros_like(norms), rows.alive, simplex=tuple(range(tasks)))
    return pick(weights / jnp.where(rows.alive, scale, 1), prepared, gram)


def _two(G: Array, alive: Array) -> Array:
    """The closed form for two tasks; equal weights for equal gradients."""
    gap = G[0, 0] + G[1, 1] - 2 * G[0, 1]
    x = jnp.where(gap > 0, (G[1, 1] - G[0, 1]) / jnp.where(gap > 0, gap, 1), 0.5)
    x = jnp.where(jnp.all(alive), jnp.clip(x, 0, 1), alive[0].astype(G.dtype))
    return jnp.stack([x, 1 - x])


def frank_wolfe(
    gram: Float[Array, "tasks tasks"], *, steps: int = 100, line_search: bool = True
) -> tuple[Float[Array, " tasks"], Float[Array, ""]]:
    r"""Come near the point of least norm by moving to one task at a time: w += γ(e_k − w).

    k = argmin (Gw)_i, γ by exact line search, or 1/(t + 2) in step t from uniform weights, which
    averages the tasks that were worst off. Slow: after 1000 steps an error of 7e-3 is usual when
    gradients are nearly opposed. Here for comparison; `mgda` is exact.

    Args:
      gram: G = J Jᵀ.
      steps: how many.
      line_search: exact steps rather than open ones.

    Returns:
      w, and the gap wᵀG w − min (Gw)_i, which bounds how far ½‖u‖² is from its minimum.

    Raises:
      ValueError: steps below 1.

    Example:
      >>> w, gap = frank_wolfe(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), steps=1)
      >>> print(jnp.array_str(w, precision=4), bool(gap < 1e-5))
      [0.6 0.4] True

    Source: Sener & Koltun 2018 (arXiv 1810.04650); Jaggi 2013; post 8896.
    """
    check_int("steps", steps, least=1)
    prepared = prepare(gram)
    G, alive, _, trace = prepared
    index = jnp.arange(len(G))

    def step(t: Array, w: Array) -> Array:
        Gw = jnp.where(alive, G @ w, jnp.inf)
        vertex = (index == jnp.argmin(Gw)) & alive
        gap = w @ G @ w - jnp.min(Gw)
        toward = jnp.where(vertex, 1, 0) - w
        if line_search:
            curvature = toward @ G @ toward
            rate = jnp.clip(gap / jnp.where(curvature > 0, curvature, 1), 0, 1)
        else:
            rate = 1 / (t + 2).astype(G.dtype)
        return w + rate * toward

    start = jnp.where(alive, 1, 0).astype(G.dtype)
    start = start / jnp.maximum(jnp.sum(start), 1)
    w = jax.lax.fori_loop(0, steps, step, start)
    gap = w @ G @ w - jnp.min(jnp.where(alive, G @ w, jnp.inf))
    return pick(w, prepared, gram), (jnp.where(jnp.any(alive), gap, 0) * trace).astype(gram.dtype)
