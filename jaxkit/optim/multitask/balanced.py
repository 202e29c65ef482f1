"""Directions that treat tasks alike: IMTL-G, Aligned-MTL and ConFIG."""

from typing import Literal

import jax.numpy as jnp

from jaxkit._checks import check_choice
from jaxkit._typing import Array, ArrayLike, Float
from jaxkit.optim.multitask._gram import pick, preference_vector, prepare

__all__ = ["aligned", "config", "imtl_g"]


def imtl_g(gram: Float[Array, "tasks tasks"]) -> Float[Array, " tasks"]:
    r"""Σ w = 1 and equal projections u·g_i/‖g_i‖ on all tasks. Weights may be negative.

    With h = g/r and g_1 the shortest gradient, M_ij = (g_1 − g_i)·(h_1 − h_j) and
    b_j = g_1·(h_1 − h_j): w_{2..} = M^{-T} b, w_1 = 1 − Σ; least squares where M is singular.

    Args:
      gram: G = J Jᵀ.

    Returns:
      w; zero for tasks whose gradient is zero or not finite.

    Example:
      >>> J = jnp.array([[1.0, 0.0], [-2.0, 0.0]])
      >>> print(jnp.array_str(imtl_g(J @ J.T), precision=4))  # opposed tasks: u = 0
      [0.6667 0.3333]

    Source: Liu et al. 2021 (IMTL, ICLR).
    """
    prepared = prepare(gram)
    G, alive, norms, _ = prepared
    tasks = len(G)
    first = jnp.argmin(jnp.where(alive, norms, jnp.inf))
    cosine = G / norms[None, :]  # g_i · h_j
    b = cosine[first, first] - cosine[first]
    M = b[None, :] - (cosine[:, first][:, None] - cosine)
    # Rows and columns of the first task are zero, and so must be those of tasks left out.
    # In units of r_i the differences g_1 - g_i are of one size, whatever the losses' scales: a long
    # gradient does not make M look singular.
    M = jnp.where(jnp.outer(alive, alive), M / norms[:, None], 0)
    eps = jnp.finfo(G.dtype).eps
    w = jnp.linalg.pinv(M.T, rtol=tasks * eps) @ jnp.where(alive, b, 0) / norms
    return pick(w.at[first].set(1 - jnp.sum(w) + w[first]), prepared, gram)


def aligned(
    gram: Float[Array, "tasks tasks"],
    *,
    scale: Literal["min", "median", "mean"] = "min",
    preference: ArrayLike | None = None,
) -> Float[Array, " tasks"]:
    r"""Aligned-MTL: the nearest orthogonal gradients of equal length take the place of the rows.

    With G = V Λ Vᵀ, w = √s V Λ^{-1/2} Vᵀ a over the eigenvalues above n ε λ_max.

    Args:
      gram: G = J Jᵀ.
      scale: s, the least, median or mean eigenvalue of those.
      preference: a, by default 1/n each (LibMTL has 1).

    Returns:
      w; zero for tasks whose gradient is zero or not finite.

    Raises:
      ValueError: unknown scale, preference of wrong length or negative.

    Example:
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> print(jnp.array_str(aligned(J @ J.T), precision=4))
      [0.5591 0.4083]

    Source: Senushkin et al. 2023 (arXiv 2305.19000).
    """
    check_choice("scale", scale, ("min", "median", "mean"))
    prepared = prepare(gram)
    values, V = jnp.linalg.eigh(prepared.G)
    kept = values > len(values) * jnp.finfo(values.dtype).eps * values[-1]
    known = jnp.where(kept, values, jnp.nan)
    s = getattr(jnp, f"nan{scale}")(known)
    a = preference_vector(preference, prepared.G)
    inverse = jnp.where(kept, jnp.sqrt(s / jnp.where(kept, values, 1)), 0)
    return pick(V @ (inverse * (V.T @ a)), prepared, gram)


def config(
    gram: Float[Array, "tasks tasks"], *, preference: ArrayLike | None = None
) -> Float[Array, " tasks"]:
    r"""ConFIG: cosines with all tasks in the ratio of a, and as long as all tasks' projections.

    With C the Gram matrix of h = g/r and q = C⁺(na): d = Σ q_i h_i normalised, u = (Σ g_i·d) d.

    Args:
      gram: G = J Jᵀ.
      preference: a, by default 1/n each.

    Returns:
      w; zero for tasks whose gradient is zero or not finite.

    Raises:
      ValueError: preference of wrong length or negative.

    Example:
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> print(jnp.array_str(config(J @ J.T) @ J, precision=4))
      [0.1588 2.0706 2.0706]

    Source: Liu et al. 2024 (arXiv 2408.11104).
    """
    prepared = prepare(gram)
    G, alive, norms, _ = prepared
    tasks = len(G)
    C = G / jnp.outer(norms, norms)
    a = jnp.where(alive, tasks * preference_vector(preference, G), 0)
    rtol = tasks * jnp.finfo(G.dtype).eps
    q = jnp.linalg.pinv(C, rtol=rtol, hermitian=True) @ a
    square = q @ C @ q
    lengths = jnp.where(alive, norms, 0) @ (C @ q)
    return pick(q / norms * lengths / jnp.where(square > 0, square, 1), prepared, gram)
