"""Convex losses: the inequality that makes them so, and their minimum over a convex set."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkit._checks import check_int, check_real
from jaxkit._dtypes import wide
from jaxkit._typing import Array, ArrayLike
from jaxkit.theory.domains import Domain, subtract

__all__ = ["convexity_slack", "sampled_convexity", "solve_comparator"]


def convexity_slack(
    loss: ArrayLike, grads: Any, params: Any, other_loss: ArrayLike, other: Any
) -> Array:
    """L(y) - L(x) - g·(y - x), which is at least 0 if L is convex and g a subgradient at x.

    Args:
      loss: L(x).
      grads: g, a pytree.
      params: x.
      other_loss: L(y).
      other: y.

    Returns:
      A scalar, in float32 at least.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array(1.0), jnp.array(3.0)
      >>> print(convexity_slack(x**2, 2 * x, x, y**2, y))  # (x - y)²
      4.0
    """
    dtype = jnp.result_type(float)
    cast = lambda x: jnp.asarray(x).astype(dtype)
    dot = lambda g, x, y: jnp.sum(cast(g) * (cast(y) - cast(x)))
    slope = sum(jax.tree.leaves(jax.tree.map(dot, grads, params, other)), jnp.zeros((), dtype))
    return cast(other_loss) - cast(loss) - slope


def sampled_convexity(loss: Callable[[Any], Array], points: Any) -> Array:
    """The least `convexity_slack` over all ordered pairs of some points; negative: not convex.

    Args:
      loss: Of parameters, a scalar; `jax.grad` is applied to it.
      points: A pytree of parameters with a leading axis n.

    Returns:
      A scalar. At least 0, up to rounding, is evidence of convexity and no proof.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.linspace(-2.0, 2.0, 5)
      >>> print(sampled_convexity(jnp.square, x), sampled_convexity(jnp.sin, x) < 0)
      0.0 True
    """
    values, grads = jax.vmap(jax.value_and_grad(loss))(points)
    from_x = lambda value, g, x: jax.vmap(lambda v, y: convexity_slack(value, g, x, v, y))(
        values, points
    )
    return jnp.min(jax.lax.map(lambda of: from_x(*of), (values, grads, points)))


def solve_comparator(
    loss: Callable[[Any], Array],
    params: Any,
    domain: Domain,
    *,
    step_size: ArrayLike,
    steps: int = 1500,
) -> Any:
    """θ* of a small convex problem, by accelerated projected gradient steps on the whole loss.

    Nesterov's momentum, started anew when it points uphill.

    Args:
      loss: Of parameters, a scalar; its gradient should be Lipschitz.
      params: Where to start.
      domain: Θ.
      step_size: 1/Lipschitz constant, or less.
      steps: How many.

    Returns:
      A point of Θ.

    Raises:
      ValueError: `steps` below 1, or `step_size` not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda x: jnp.sum((x - jnp.array([3.0, 4.0])) ** 2)
      >>> from jaxkit.theory import ball
      >>> print(solve_comparator(loss, jnp.zeros(2), ball(1.0), step_size=0.5, steps=10))
      [0.6 0.8]

    Source: Beck, Teboulle 2009 (FISTA); O'Donoghue, Candès 2015 (arXiv 1204.3982).
    """
    steps = check_int("steps", steps, least=1)
    check_real("step_size", step_size, above=0)
    gradient = jax.grad(loss)

    def step(_: Any, carry: Any) -> Any:
        x, y, t = carry
        rate = lambda g: jnp.asarray(step_size).astype(g.dtype) * g
        new = domain.project(jax.tree.map(lambda a, g: a - rate(g), y, gradient(y)))
        moved = subtract(new, x)
        uphill = sum(
            jax.tree.leaves(
                jax.tree.map(lambda a, b: jnp.sum(a * b).astype(t.dtype), subtract(y, new), moved)
            ),
            jnp.zeros((), t.dtype),
        )
        t = jnp.where(uphill > 0, 1, t)
        t_next = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        momentum = (t - 1) / t_next
        y = jax.tree.map(
            lambda a, d: (a.astype(d.dtype) + momentum.astype(d.dtype) * d).astype(a.dtype),
            new,
            moved,
        )
        return new, y, t_next

    start = domain.project(params)
    dtype = wide(*(leaf.dtype for leaf in jax.tree.leaves(start)))
    return jax.lax.fori_loop(0, steps, step, (start, start, jnp.ones((), dtype)))[0]
