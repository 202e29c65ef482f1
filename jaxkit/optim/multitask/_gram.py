"""What every rule on a Gram matrix does first: check it, scale it, leave out useless tasks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_floating, is_traced
from jaxkit._dtypes import wide
from jaxkit._typing import Array, ArrayLike, Bool, Float

__all__ = ["Prepared", "check_vector", "pick", "preference_vector", "prepare"]


class Prepared(NamedTuple):
    """A Gram matrix of trace one in float32 at least, with zeros for the tasks left out.

    Attributes:
      G: `[tasks, tasks]`, divided by `trace`.
      alive: the tasks that take part: finite, and not (nearly) zero.
      norms: r_i = √G_ii of the scaled matrix; 1 for tasks left out, so that it divides.
      trace: what G was divided by.
    """

    G: Float[Array, "tasks tasks"]
    alive: Bool[Array, " tasks"]
    norms: Float[Array, " tasks"]
    trace: Float[Array, ""]


def prepare(gram: Float[Array, "tasks tasks"]) -> Prepared:
    """Check and scale a Gram matrix. Tasks with r_i < 1e-12 √(tr G) or not finite are left out."""
    check_floating("gram", gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square matrix; got shape {gram.shape}.")
    if gram.shape[0] < 2:
        raise ValueError(f"gram must be of at least 2 tasks; got shape {gram.shape}.")
    gram = jax.lax.stop_gradient(gram).astype(wide(gram.dtype))
    squares = jnp.diagonal(gram)
    finite = jnp.isfinite(squares)
    trace = jnp.sum(jnp.where(finite, squares, 0))
    trace = jnp.where(trace > 0, trace, 1)
    squares = jnp.where(finite, squares, 0) / trace
    alive = squares >= 1e-24
    G = jnp.where(jnp.outer(alive, alive), gram / trace, 0)
    return Prepared(G, alive, jnp.where(alive, jnp.sqrt(jnp.where(alive, squares, 1)), 1), trace)


def pick(
    weights: Float[Array, " tasks"], prepared: Prepared, gram: Float[Array, "tasks tasks"]
) -> Float[Array, " tasks"]:
    """The weights of the tasks that take part, zero for the others, in the dtype of `gram`."""
    return jnp.where(prepared.alive, weights, 0).astype(gram.dtype)


def check_vector(name: str, value: Any, tasks: int, *, positive: bool = False) -> Any:
    """Raise unless `value` is `[tasks]` and (where it is known) non-negative, or positive."""
    shape = np.shape(value)
    if shape != (tasks,):
        raise ValueError(f"{name} must have shape ({tasks},), one entry a task; got {shape}.")
    if not is_traced(value):
        known = np.asarray(value, np.float64)
        if positive and not (known > 0).all():
            raise ValueError(f"{name} must be positive; got {known}.")
        if not positive and not ((known >= 0) & np.isfinite(known)).all():
            raise ValueError(f"{name} must be non-negative and finite; got {known}.")
    return value


def preference_vector(
    preference: ArrayLike | None, like: Float[Array, "tasks tasks"]
) -> Float[Array, " tasks"]:
    """a: uniform 1/n unless given."""
    tasks = like.shape[0]
    if preference is None:
        return jnp.full(tasks, 1 / tasks, like.dtype)
    given = jnp.asarray(check_vector("preference", preference, tasks)).astype(like.dtype)
    return jax.lax.stop_gradient(given)
