"""Nash-MTL and FairGrad: every task's fall times its weight the same, by Newton's method."""

import jax
import jax.numpy as jnp

from jaxkit._checks import check_real, is_traced
from jaxkit._typing import Array, Float
from jaxkit.optim.multitask._gram import pick, prepare
from jaxkit.optim.multitask.quadratic import solve_small

__all__ = ["fairgrad", "nash"]

# Nash-MTL needs some 12; without a solution the steps double w, and had better end.
NEWTON_STEPS, OTHER_STEPS = 50, 200


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
    p = 1 / float(alpha)
    prepared = prepare(gram)
    G, alive, norms, trace = prepared
    # In z = r w the matrix has a unit diagonal, whatever the losses' scales:
    # (Cz)_i = k_i z_i^{-p} with k = r^{p-1}.
    C = G / jnp.outer(norms, norms)
    z = _newton(C, norms ** (p - 1), p, alive)
    return pick(z / norms * trace ** (-1 / (1 + p)), prepared, gram)


def _newton(C: Array, k: Array, p: float, alive: Array) -> Array:
    """Damped Newton for the convex ½ zᵀCz − Σ k z^{1−p}/(1−p) over z > 0.

    With step 1/(1 + δ), δ being the Newton step's length in the local norm, until δ ≤ ¼. That is
    for p = 1, where the function is self-concordant; δ is otherwise multiplied by half the constant
    |f'''|/f''^{3/2} that the function has at z.
    """
    identity = jnp.eye(len(k), dtype=C.dtype)
    tolerance = 4 * jnp.finfo(C.dtype).eps

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        z, _, count = state
        gradient = jnp.where(alive, C @ z - k * z ** (-p), 0)
        curvature = jnp.where(alive, k * p * z ** (-p - 1), 1)
        direction = -solve_small(C + identity * curvature[:, None], gradient)
        bend = jnp.max(jnp.where(alive, (p + 1) / (2 * z * jnp.sqrt(curvature)), 0))
        delta = bend * jnp.sqrt(jnp.maximum(-direction @ gradient, 0))
        # z stays positive: no entry loses more than four fifths.
        fall = jnp.max(-direction / z)
        rate = jnp.where(delta <= 0.25, 1, 1 / (1 + delta))
        new = z + jnp.minimum(rate, 0.8 / jnp.maximum(fall, 0.8)) * direction
        good = jnp.all(jnp.isfinite(new))  # without a solution z grows until it overflows
        moves = jnp.max(jnp.abs(direction / z)) > tolerance
        return jnp.where(good, new, z), good & moves, count + 1

    start = jnp.where(alive, k ** (1 / (1 + p)), 1)
    state = (start, jnp.asarray(True), jnp.asarray(0))
    most = NEWTON_STEPS if p == 1 else OTHER_STEPS
    return jax.lax.while_loop(lambda s: s[1] & (s[2] < most), step, state)[0]
