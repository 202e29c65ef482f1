"""Nash-MTL and FairGrad: fairness between the falls of the losses, by Newton's method."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkit._checks import check_real, is_traced
from jaxkit._typing import Array, Float
from jaxkit.optim.multitask._gram import pick, prepare
from jaxkit.optim.multitask.quadratic import solve_small

__all__ = ["fairgrad", "nash"]

# They need some 12 and 15 to 70; without a solution w grows in every step, and had better end.
NEWTON_STEPS, PRIMAL_DUAL_STEPS = 50, 200


def nash(
    gram: Float[Array, "tasks tasks"], *, max_norm: float | None = None
) -> Float[Array, " tasks"]:
    r"""Nash-MTL: w > 0 with (Gw)_i = 1/w_i, the bargaining solution.

    The minimiser of ½ wᵀG w − Σ log w; ‖u‖² = n always, and u does not change when losses are
    scaled. Where the hull of the gradients contains zero inside there is no solution: w then grows
    until the step limit, and u means nothing.

    Args:
      gram: G = J Jᵀ.
      max_norm: shorten u to this length, as the authors' code does (with 1).

    Returns:
      w; zero for tasks whose gradient is zero or not finite.

    Raises:
      ValueError: max_norm not positive.

    Example:
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> print(jnp.array_str(nash(J @ J.T), precision=4))
      [0.5915 0.4071]

    Source: Navon et al. 2022 (arXiv 2202.01017).
    """
    weights = fairgrad(gram, alpha=1.0)
    if max_norm is None:
        return weights
    check_real("max_norm", max_norm, above=0)
    prepared = prepare(gram)
    w = weights.astype(prepared.G.dtype)
    length = jnp.sqrt(jnp.maximum(w @ prepared.G @ w, 0) * prepared.trace)
    return pick(w * jnp.minimum(1, max_norm / jnp.maximum(length, max_norm)), prepared, gram)


def fairgrad(gram: Float[Array, "tasks tasks"], *, alpha: float = 2.0) -> Float[Array, " tasks"]:
    r"""FairGrad: w > 0 with (Gw)_i = w_i^{−1/α}, α-fairness of the falls of the losses.

    α = 1 is Nash-MTL; towards infinity the least fall is made as large as it can be.

    Args:
      gram: G = J Jᵀ.
      alpha: α, static.

    Returns:
      w; zero for tasks whose gradient is zero or not finite.

    Raises:
      ValueError: alpha not positive.

    Example:
      >>> print(jnp.array_str(fairgrad(jnp.diag(jnp.array([1.0, 4.0])), alpha=1.0), precision=4))
      [1.  0.5]

    Source: Ban & Ji 2024 (FairGrad, arXiv 2402.15638).
    """
    check_real("alpha", alpha, above=0)
    if is_traced(alpha):
        raise TypeError("alpha must be a static number; got a traced one.")
    prepared = prepare(gram)
    G, alive, norms, trace = prepared
    # In z = r w the matrix has a unit diagonal, whatever the losses' scales:
    # (Cz)_i = k_i z_i^{-p} with k = r^{p-1}.
    p = 1 / float(alpha)
    C = G / jnp.outer(norms, norms)
    log_z = jnp.log(_newton(C, alive))
    if p != 1:
        log_z = _primal_dual(C, (p - 1) * jnp.log(norms), p, log_z, alive)
    return pick(jnp.exp(log_z) / norms * trace ** (-1 / (1 + p)), prepared, gram)


def _newton(C: Array, alive: Array) -> Array:
    """Damped Newton for ½ zᵀCz − Σ log z, whose minimum has Cz = 1/z.

    The function is self-concordant: with step 1/(1 + δ) until δ ≤ ¼, δ being the Newton step's
    length in the local norm, it always falls.
    """
    identity = jnp.eye(len(C), dtype=C.dtype)
    tolerance = 4 * jnp.finfo(C.dtype).eps

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        z, _, count = state
        gradient = jnp.where(alive, C @ z - 1 / z, 0)
        curvature = jnp.where(alive, z**-2, 1)
        direction = -solve_small(C + identity * curvature[:, None], gradient)
        delta = jnp.sqrt(jnp.maximum(-direction @ gradient, 0))
        rate = jnp.where(delta <= 0.25, 1, 1 / (1 + delta))
        # z stays positive whatever the rounding: no entry loses more than four fifths.
        new = z + jnp.minimum(rate, 0.8 / jnp.maximum(jnp.max(-direction / z), 0.8)) * direction
        good = jnp.all(jnp.isfinite(new))  # without a solution z grows until it overflows
        moves = jnp.max(jnp.abs(direction / z)) > tolerance
        return jnp.where(good, new, z), good & moves, count + 1

    state = (jnp.ones(len(C), C.dtype), jnp.asarray(True), jnp.asarray(0))
    return jax.lax.while_loop(lambda s: s[1] & (s[2] < NEWTON_STEPS), step, state)[0]


def _primal_dual(C: Array, log_k: Array, p: float, log_z: Array, alive: Array) -> Array:
    """log z with (Cz)_i = k_i z_i^{-p}, from that of Nash-MTL.

    The falls v are unknowns of their own, as in an interior-point method: Newton's method on
    Cz = v and p log z + log v = log k. Either of z and v may be too small for Cz to tell it from
    zero, or for its type: both are kept as logarithms, and no entry loses more than nine tenths in
    a step. Some 15 steps, where α is small and losses differ by 1e8, some 70.
    """
    identity = jnp.eye(len(C), dtype=C.dtype)
    eps, most = jnp.finfo(C.dtype).eps, 0.4 * jnp.log(jnp.finfo(C.dtype).max)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        log_z, log_v, last, _, count = state
        # Row i is divided by the larger of z_i and v_i; the unknown is the relative step.
        scale = jnp.maximum(log_z, log_v)
        A = C * jnp.exp(log_z[None] - scale[:, None])
        v = jnp.exp(log_v - scale)
        excess = p * log_z + log_v - log_k
        rhs = jnp.where(alive, v * (1 - excess) - jnp.sum(A, axis=1), 0)
        change_z = solve_small(A + identity * (p * v)[:, None], rhs)
        change_v = jnp.where(alive, -excess - p * change_z, 0)
        change = jnp.stack([change_z, change_v])
        rate = 0.9 / jnp.maximum(jnp.max(-change), 0.9)
        new = jnp.stack([log_z, log_v]) + jnp.log1p(rate * change)
        good = jnp.all(jnp.isfinite(new)) & jnp.all(new[0] < most)  # or there is no solution
        size = jnp.max(jnp.abs(change))
        # At the end of quadratic convergence steps are rounding, and stop falling.
        rounding = (size <= 4 * eps) | ((size > last / 2) & (last < jnp.sqrt(eps)))
        log_z, log_v = jnp.where(good, new, jnp.stack(state[:2]))
        return log_z, log_v, size, good & ~rounding, count + 1

    start = jnp.where(alive, log_z, 0)
    state = (start, -start, jnp.asarray(jnp.inf, C.dtype), jnp.asarray(True), jnp.asarray(0))
    return jax.lax.while_loop(lambda s: s[3] & (s[4] < PRIMAL_DUAL_STEPS), step, state)[0]
