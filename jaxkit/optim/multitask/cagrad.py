"""CAGrad: near the mean gradient, the direction that is best for the worst-off task."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_real, is_traced
from jaxkit._typing import Array, ArrayLike, Float
from jaxkit.optim.multitask._gram import pick, preference_vector, prepare
from jaxkit.optim.multitask.quadratic import face_minimum, quadratic

__all__ = ["cagrad"]


def cagrad(
    gram: Float[Array, "tasks tasks"],
    *,
    c: float = 0.5,
    rescale: Literal["none", "1+c2", "1+c"] = "none",
    preference: ArrayLike | None = None,
) -> Float[Array, " tasks"]:
    r"""max over u of min_i ⟨g_i, u⟩, with ‖u − g_0‖ ≤ c‖g_0‖ and g_0 = Jᵀa the mean gradient.

    By duality, with φ = c‖g_0‖,

        v = argmin over the simplex of  vᵀG a + φ √(vᵀG v),    w = a + φ v / √(vᵀG v),

    so that ‖u − g_0‖ = c‖g_0‖. For a given T = √(vᵀG v) the minimiser is that of a quadratic
    program, and on the face where it lies it is linear in T: v = α + Tβ. T is therefore found in
    closed form once the face is known, as a rule after two or three programs.

    Where the tasks' hull contains zero and no direction is better than that for the worst-off task,
    u = g_0 less its part in the face of zero: the limit of T → 0.

    Args:
      gram: G = J Jᵀ.
      c: in [0, 1); 0 gives the mean gradient.
      rescale: "none", or w/(1 + c²) (LibMTL), or w/(1 + c) (the toy code of the authors).
      preference: a, by default 1/n each.

    Returns:
      w; zero for tasks whose gradient is zero or not finite.

    Raises:
      ValueError: c outside [0, 1), unknown rescale, preference of wrong length or negative.

    Example:
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> print(jnp.array_str(cagrad(J @ J.T), precision=4))
      [0.7041 0.5   ]

    Source: Liu et al. 2021 (arXiv 2110.14048).
    """
    check_real("c", c, least=0)
    if not is_traced(c) and float(c) >= 1:
        raise ValueError(f"c must be at least 0 and less than 1; got {c!r}.")
    check_choice("rescale", rescale, ("none", "1+c2", "1+c"))
    prepared = prepare(gram)
    G, alive, norms, _ = prepared
    a = preference_vector(preference, G)
    Ga = G @ a
    ratio = jax.lax.stop_gradient(jnp.asarray(c, G.dtype))
    phi = ratio * jnp.sqrt(jnp.maximum(a @ Ga, 0))
    moves = phi > 0
    slope = -Ga / jnp.where(moves, phi, 1)
    simplex = tuple(range(len(G)))
    eps = jnp.finfo(G.dtype).eps
    least = jnp.min(jnp.where(alive, norms, 1)) * jnp.sqrt(eps)

    def face(T: Array) -> tuple[Array, Array, Array]:
        """At T: the face, its point α of least norm, and vᵀG v."""
        v = quadratic(G, T * slope, alive, simplex=simplex)
        alpha, _ = face_minimum(G, jnp.zeros_like(v), jnp.ones_like(v), 1, v > 0)
        return v > 0, jnp.where(jnp.isfinite(alpha), alpha, v), v @ G @ v

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        low, high, T, _, count = state
        _, alpha, square = face(T)
        low, high = jnp.where(square > T**2, T, low), jnp.where(square > T**2, high, T)
        # On this face vᵀG v = A + B T²; where it has no root beside the bracket, halve that.
        A = alpha @ G @ alpha
        B = (square - A) / T**2
        root = jnp.sqrt(jnp.maximum(A, 0) / jnp.where(B < 1, 1 - B, 1))
        inside = (B < 1) & (root >= low) & (root <= high)
        new = jnp.where(inside, root, jnp.sqrt(low * high))
        return low, high, new, jnp.abs(new - T) <= 4 * eps * T, count + 1

    start = (least, jnp.ones_like(least), jnp.sqrt(least), jnp.asarray(False), jnp.asarray(0))
    T = jax.lax.while_loop(lambda s: ~s[3] & (s[4] < 60), step, start)[2]
    on, alpha, _ = face(T)
    beta, _ = face_minimum(G, slope, jnp.ones_like(slope), 0, on)
    beta = jnp.where(jnp.isfinite(beta), beta, 0)
    added = jnp.where(2 * least < T, alpha / T, 0) + beta
    w = a + jnp.where(moves, phi * added, 0)
    scale = 1 + {"none": 0 * ratio, "1+c2": ratio**2, "1+c": ratio}[rescale]
    return pick(w / scale, prepared, gram)
