r"""Gradients of every task, their Gram matrix, and directions made of them.

A Jacobian is a pytree like the parameters whose leaves have a leading axis for the tasks; it is
never flattened into one matrix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkit._checks import check_floating
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Float

__all__ = [
    "Pullback",
    "combine",
    "finite_entries",
    "gram_matrix",
    "inner_products",
    "jacobian",
    "pullback",
    "recomputed_gram",
    "rows_of",
    "weighted_pullback",
]

Pullback = Callable[[Array], Any]


def pullback(
    losses_fn: Callable[[Any], Any], params: Any, *, has_aux: bool = False
) -> tuple[Array, Pullback, Any]:
    """Losses, the function from cotangents `[tasks]` to gradients, and what else was returned."""
    if has_aux:
        losses, pull, aux = jax.vjp(losses_fn, params, has_aux=True)
    else:
        losses, pull = jax.vjp(losses_fn, params)
        aux = None
    if getattr(losses, "ndim", None) != 1:
        got = getattr(losses, "shape", type(losses).__name__)
        raise ValueError(f"losses_fn must return a vector of losses; got {got}.")
    if len(losses) < 2:
        raise ValueError(f"losses_fn must return at least 2 losses; got {len(losses)}.")
    check_floating("losses", losses)
    return losses, lambda cotangent: pull(cotangent)[0], aux


def jacobian(
    losses_fn: Callable[[Any], Float[Array, " tasks"]],
    params: Any,
    *,
    batched: bool = True,
    has_aux: bool = False,
) -> Any:
    """Losses and the gradient of each, from one forward pass and a backward pass for each task.

    Args:
      losses_fn: from parameters to the losses `[tasks]`; with `has_aux`, also to something else.
      params: pytree of real floating-point arrays.
      batched: all backward passes side by side (vmap), or one after the other, which holds one
        pass's intermediates at a time.
      has_aux: whether `losses_fn` returns a pair.

    Returns:
      losses, the Jacobian (leaves `[tasks, ...]`), and with `has_aux` the something else.

    Raises:
      ValueError: the losses are not a vector of two or more.

    Example:
      >>> losses, J = jacobian(lambda x: jnp.stack([x @ x, x[0]]), jnp.array([1.0, 2.0]))
      >>> print(J)
      [[2. 4.]
       [1. 0.]]

    Source: Sener & Koltun 2018 (arXiv 1810.04650).
    """
    losses, pull, aux = pullback(losses_fn, params, has_aux=has_aux)
    rows = rows_of(pull, losses, batched=batched)
    return (losses, rows, aux) if has_aux else (losses, rows)


def rows_of(pull: Pullback, losses: Array, *, batched: bool) -> Any:
    """The Jacobian from its pullback."""
    basis = jnp.eye(len(losses), dtype=losses.dtype)
    return jax.vmap(pull)(basis) if batched else jax.lax.map(pull, basis)


def _inner(x: Array, y: Array) -> Array:
    """`[n, ...]` and `[m, ...]` to the products `[n, m]`, in float32 at least."""
    axes = tuple(range(1, x.ndim))
    return jax.lax.dot_general(
        x,
        y,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,  # TF32 would ruin small angles
        preferred_element_type=wide(x.dtype),
    )


def gram_matrix(
    jacobian: Any, *, axis_name: str | tuple[str, ...] | None = None
) -> Float[Array, "tasks tasks"]:
    """G = J Jᵀ, summed over all leaves in float32 at least.

    Args:
      jacobian: pytree of leaves `[tasks, ...]`.
      axis_name: inside `shard_map`, the mesh axes over which parameters are split.

    Returns:
      G, in float64 if any leaf is and else in float32.

    Raises:
      ValueError: there are no leaves, or their numbers of tasks differ.

    Example:
      >>> print(gram_matrix({"a": jnp.eye(2), "b": jnp.ones((2, 3))}))
      [[4. 3.]
       [3. 4.]]
    """
    leaves = jax.tree.leaves(jacobian)
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "jacobian must have leaves with one leading axis for the tasks;"
            f" got shapes {[leaf.shape for leaf in leaves]}."
        )
    dtype = wide(*(leaf.dtype for leaf in leaves))
    gram = jnp.sum(jnp.stack([_inner(leaf, leaf).astype(dtype) for leaf in leaves]), axis=0)
    return gram if axis_name is None else jax.lax.psum(gram, axis_name)


def inner_products(
    x: list[Array], y: list[Array], groups: list[list[int]], *, axis_name: Any = None
) -> Float[Array, " groups"]:
    """Products of two gradients, summed over the leaves of each group."""
    dtype = wide(*(leaf.dtype for leaf in x))
    zero = jnp.zeros((), dtype)
    products = [
        sum((_inner(x[i][None], y[i][None])[0, 0].astype(dtype) for i in group), start=zero)
        for group in groups
    ]
    both = jnp.stack(products)
    return both if axis_name is None else jax.lax.psum(both, axis_name)


def recomputed_gram(pull: Pullback, losses: Array, gram_of: Callable[[Any, Any], Array]) -> Array:
    """Products of all pairs of gradients, holding two gradients at a time.

    n + n(n − 1)/2 backward passes. `gram_of` takes two gradients to what is kept of the pair.
    """
    tasks = len(losses)
    basis = jnp.eye(tasks, dtype=losses.dtype)
    kept = jax.eval_shape(lambda: gram_of(pull(basis[0]), pull(basis[0])))

    def row(i: Array) -> Array:
        g = pull(basis[i])
        products = jnp.zeros((tasks, *kept.shape), kept.dtype).at[i].set(gram_of(g, g))
        return jax.lax.fori_loop(
            0, i, lambda j, out: out.at[j].set(gram_of(g, pull(basis[j]))), products
        )

    lower = jnp.moveaxis(jax.lax.map(row, jnp.arange(tasks)), (0, 1), (-2, -1))
    return jnp.where(jnp.tri(tasks, dtype=bool), lower, jnp.swapaxes(lower, -2, -1))


def combine(jacobian: Any, weights: Any) -> Any:
    """u = Jᵀw. A row of weight zero is left out, even if it is not finite.

    Args:
      jacobian: pytree of leaves `[tasks, ...]`.
      weights: `[tasks]`, or a pytree of such that is a prefix of `jacobian`.

    Returns:
      Pytree of leaves `[...]` in the dtypes of `jacobian`; sums are in float32 at least.

    Example:
      >>> print(combine({"a": jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])}, jnp.array([2.0, 0.0])))
      {'a': Array([2., 4.], dtype=float32)}
    """

    def summed(weight: Array, rows: Array) -> Array:
        dtype = wide(rows.dtype)
        w = weight.astype(dtype)
        # One pass over the rows: the terms are fused, where a product of matrices would copy.
        terms = [jnp.where(w[i] == 0, 0, w[i] * rows[i].astype(dtype)) for i in range(len(rows))]
        return sum(terms[1:], start=terms[0]).astype(rows.dtype)

    part = lambda weight, rows: jax.tree.map(lambda leaf: summed(weight, leaf), rows)
    return jax.tree.map(part, weights, jacobian)


def finite_entries(leaves: list[Array], *, keep: int = 0, axis_name: Any = None) -> Array:
    """Whether all entries are finite, for each index along the first `keep` axes."""
    flag = jnp.asarray(True)
    for leaf in leaves:
        flag = flag & jnp.all(jnp.isfinite(leaf), axis=tuple(range(keep, leaf.ndim)))
    return flag if axis_name is None else jax.lax.pmin(flag.astype(jnp.int32), axis_name) > 0


def weighted_pullback(
    pull: Callable[[Array], list[Array]],
    weights: Array,
    losses: Array,
    finite: Array,
    *,
    axis_name: Any = None,
) -> tuple[list[Array], Array]:
    """u = Jᵀw of the tasks whose loss and gradient are finite, and which these are.

    From one backward pass; where that is not finite, from one for each task, since a weight of zero
    does not cancel a gradient that is not finite.
    """
    basis = jnp.eye(len(losses), dtype=losses.dtype)

    def each(whole: list[Array]) -> tuple[list[Array], Array]:
        def add(totals: list[Array], i: Array) -> tuple[list[Array], Array]:
            gradient = pull(basis[i])
            used = finite[i] & finite_entries(gradient, axis_name=axis_name)
            more = [
                t + jnp.where(used, weights[i].astype(t.dtype) * g.astype(t.dtype), 0)
                for t, g in zip(totals, gradient, strict=True)
            ]
            return more, used

        zeros = [jnp.zeros_like(x, wide(x.dtype)) for x in whole]
        totals, used = jax.lax.scan(add, zeros, jnp.arange(len(losses)))
        return [t.astype(x.dtype) for t, x in zip(totals, whole, strict=True)], used

    whole = pull(weights.astype(losses.dtype))
    good = jnp.all(finite) & finite_entries(whole, axis_name=axis_name)
    # All are finite if this is: inside `shard_map` the mask has to vary as the other branch's does.
    return jax.lax.cond(good, lambda whole: (whole, finite & good), each, whole)
