r"""Exact solution of the small quadratic programs behind the min-norm and projection methods.

    minimise ½ xᵀG x − bᵀx   over   x ≥ 0,   Σ_{i ∈ S} x_i = 1

with G positive semi-definite, possibly singular. S = all tasks and b = 0 is the point of least norm
in the convex hull of the gradients; S empty is non-negative least squares.

Going round the coordinates and solving one at a time, as post 8907 does, can stall: a multiplier
that has become too large is never lowered. Here every face of the feasible set is tried at once
(up to 8 tasks), or faces are walked by an active set (above).
"""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._typing import Array, Bool, Float

__all__ = ["ENUMERATED", "face_minimum", "quadratic", "solve_small"]

# The largest number of tasks for which all 2ⁿ faces are tried: one batched solve.
ENUMERATED = 8


@partial(jax.jit, static_argnames="simplex")
def quadratic(
    G: Float[Array, "tasks tasks"],
    b: Float[Array, " tasks"],
    alive: Bool[Array, " tasks"],
    *,
    simplex: tuple[int, ...] = (),
) -> Float[Array, " tasks"]:
    """Solve the program above.

    Cost: one batched solve of 2ⁿ systems of n + 1 equations for n ≤ 8; above, about n to 2n
    systems one after the other.

    Args:
      G: positive semi-definite, rows and columns of tasks that are not alive zero.
      b: linear term.
      alive: tasks that may have a weight.
      simplex: the indices S whose weights sum to one; none leaves them free.

    Returns:
      x; zeros where no task of `simplex` is alive.

    Example:
      >>> G = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> print(
      ...     jnp.array_str(
      ...         quadratic(G, jnp.zeros(2), jnp.array([True, True]), simplex=(0, 1)), precision=4
      ...     )
      ... )
      [0.6 0.4]
    """
    # In the units y_i = r_i x_i the matrix has a unit diagonal, so that violations of the
    # conditions on x and on the gradient are lengths, and can be compared.
    squares = jnp.diagonal(G)
    r = jnp.sqrt(jnp.where(alive & (squares > 0), squares, 1))
    C = G / jnp.outer(r, r)
    member = jnp.asarray(np.isin(np.arange(len(b)), simplex)) & alive
    shortest = jnp.min(jnp.where(member, r, jnp.inf), initial=jnp.inf)
    total = jnp.where(jnp.isfinite(shortest), shortest, 0) if simplex else None
    e = jnp.where(member, (1 if total is None else total) / r, 0)
    solve = _enumerate if len(b) <= ENUMERATED else _active_set
    y = solve(C, jnp.where(alive, b / r, 0), e, total, alive, simplex)
    x = jnp.where(alive, jnp.maximum(y, 0), 0) / r
    if not simplex:
        return x
    total = jnp.sum(jnp.where(member, x, 0))
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1), 0)


def solve_small(K: Float[Array, "n n"], rhs: Float[Array, " n"]) -> Float[Array, " n"]:
    """Kx = rhs by Gauss and Jordan's elimination with row pivots; not finite if K is singular.

    For batches of a few equations: the library's triangular solves take minutes to compile there.
    """
    index = jnp.arange(len(rhs))

    def eliminate(i: Array, A: Array) -> Array:
        pivot = jnp.argmax(jnp.where(index >= i, jnp.abs(A[:, i]), -1))
        A = A[jnp.where(index == i, pivot, jnp.where(index == pivot, i, index))]
        row = A[i] / A[i, i]
        rest = A - A[:, i][:, None] * row[None]
        return jnp.where((index == i)[:, None], row[None], rest)

    A = jnp.concatenate([K, rhs[:, None]], axis=1)
    return jax.lax.fori_loop(0, len(rhs), eliminate, A)[:, -1]


def face_minimum(
    C: Float[Array, "tasks tasks"],
    b: Float[Array, " tasks"],
    e: Float[Array, " tasks"],
    total: Any,
    on: Bool[Array, " tasks"],
) -> tuple[Float[Array, " tasks"], Float[Array, " tasks"]]:
    """Minimiser over x with x_i = 0 off the face `on` and eᵀx = total, signs left free.

    Returns:
      x, and the gradient Cx − b + λe of the Lagrangian; not finite where the face has no single
      minimiser.
    """
    n = len(b)
    K = jnp.where(jnp.outer(on, on), C, jnp.eye(n, dtype=C.dtype) * jnp.where(on, 0, 1)[:, None])
    rhs = jnp.where(on, b, 0)
    if total is None:
        x = solve_small(K, rhs)
        return x, C @ x - b
    border = jnp.where(on, e, 0)
    K = jnp.block([[K, border[:, None]], [border[None, :], jnp.zeros((1, 1), C.dtype)]])
    solution = solve_small(K, jnp.append(rhs, jnp.asarray(total, C.dtype)))
    x, multiplier = solution[:-1], solution[-1]
    return x, C @ x - b + multiplier * e


def _enumerate(
    C: Array, b: Array, e: Array, total: Any, alive: Array, simplex: tuple[int, ...]
) -> Array:
    """The minimiser of the face that comes nearest to the optimality conditions."""
    faces = np.array(list(itertools.product((False, True), repeat=len(b))))
    if simplex:
        faces = faces[faces[:, list(simplex)].any(axis=1)]

    def candidate(on: Array) -> tuple[Array, Array]:
        x, gradient = face_minimum(C, b, e, total, on)
        slope = jnp.where(on, jnp.abs(gradient), -gradient)
        violation = jnp.max(jnp.where(alive, jnp.maximum(slope, -x), 0))
        if total is not None:
            violation = jnp.maximum(violation, jnp.abs(e @ x - total))
        good = jnp.isfinite(violation) & ~jnp.any(on & ~alive)
        return x, jnp.where(good, violation, jnp.inf)

    xs, violations = jax.vmap(candidate)(jnp.asarray(faces))
    return xs[jnp.argmin(violations)]


def _active_set(
    C: Array, b: Array, e: Array, total: Any, alive: Array, simplex: tuple[int, ...]
) -> Array:
    """Walk from face to face, downhill: Lawson and Hanson's method, and Wolfe's on a simplex.

    x is always feasible. A step goes to the minimiser of the face, or as far towards it as signs
    allow, leaving the face of what has become zero; from a minimiser, the task with the steepest
    descent joins.
    """
    n = len(b)
    index = jnp.arange(n)
    eps = jnp.finfo(C.dtype).eps

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, on, joined, barred, count, _ = state
        z, _ = face_minimum(C, b, e, total, on)
        z = jnp.where(on, z, 0)
        solved = jnp.all(jnp.isfinite(z))
        inside = solved & jnp.all(jnp.where(on, z > 0, True))
        # As far as the signs allow; a singular face is left by the task that joined it last.
        back = on & (z <= 0)
        reach = jnp.where(back, x / jnp.where(back, x - z, 1), jnp.inf)
        share = jnp.where(solved, jnp.minimum(jnp.min(reach), 1), 0)
        leaves = jnp.where(solved, back & (reach <= share), index == joined)
        moved = jnp.where(leaves, 0, x + share * jnp.where(solved, z - x, 0))
        # Rounding may send a task back that has just joined: it must wait for progress.
        barred = jnp.where(inside, False, barred | (leaves & (index == joined)))
        x, on = jnp.where(inside, z, moved), jnp.where(inside, on, on & ~leaves)

        gradient = C @ x - b
        weight = jnp.where(on, e, 0)
        size = weight @ weight
        gradient = gradient - e * (weight @ gradient) / jnp.where(size > 0, size, 1)
        steepest = jnp.where(alive & ~on & ~barred, gradient, jnp.inf)
        best = jnp.argmin(steepest)
        # A task that was barred leaves a face whose minimiser is x already.
        ready = inside | jnp.any(leaves & (index == joined) & (share == 0))
        rounding = 10 * eps * (jnp.sum(jnp.abs(x)) + jnp.max(jnp.abs(b)))
        joins = ready & (steepest[best] < -rounding)
        on, joined = on | (joins & (index == best)), jnp.where(joins, best, joined)
        return x, on, joined, barred, count + 1, ready & ~joins

    if simplex:
        corner = total / jnp.where(e > 0, e, 1)
        value = jnp.where(e > 0, corner * (corner / 2 - b), jnp.inf)
        on = (index == jnp.argmin(value)) & (e > 0)
        x = jnp.where(on, corner, 0)
    else:
        on, x = jnp.zeros(n, bool), jnp.zeros_like(b)
    state = (x, on, jnp.asarray(-1), jnp.zeros(n, bool), jnp.asarray(0), jnp.asarray(False))
    return jax.lax.while_loop(lambda s: ~s[-1] & (s[-2] < 10 * n), step, state)[0]
