"""Remedies for parameters with sparse gradients, such as embeddings, under any optimizer.

A sign optimizer moves the embedding of a token that no batch contains as far as that of any other:
its momentum keeps the sign of the last gradient, until the weights stand at ±1/λ. The remedies: do
not move such rows (`lazy_rows`), train them by another optimizer (`split_embeddings`), or tie them
to the output layer with its halves swapped, which makes the gradients dense (`tied_logits`).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxkit._checks import check_choice
from jaxkit._typing import Array, Float
from jaxkit.optim._leaves import class_of, flatten, path_name, row_masks

__all__ = ["LazyRowsState", "lazy_rows", "split_embeddings", "swap_halves", "tied_logits"]

IsRows = Callable[[tuple[Any, ...], Any], bool]


class LazyRowsState(NamedTuple):
    """The state of the optimizer inside."""

    inner_state: Any


def _is_embedding(path: tuple[Any, ...], leaf: Any) -> bool:
    return class_of(path, leaf) == "embedding"


def lazy_rows(
    inner: optax.GradientTransformation,
    *,
    mode: Literal["param", "full"] = "full",
    is_rows: IsRows | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer, made to leave alone the rows of embeddings that no gradient touches.

    A row (all indices but the last) counts as touched when an element of its gradient is not zero.
    Where gradients are dense, as those of embeddings tied to the output layer, the extra argument
    `touched_rows={path: bool[rows]}` of `update` says it instead, `path` being the leaf's, such as
    `"embed/embedding"`.

    In the mode "param" the update of untouched rows is zero, weight decay included, while the
    optimizer's moments go on decaying. In the mode "full" the rows of its moments stay as they are
    too: what the optimizer remembers of a token is what it was when the token was last seen. What
    the optimizer keeps by step rather than by row, such as the exponent of Adam's bias correction,
    goes on in both. Of Lion, both modes stop the decay and the steps of constant sign; "full" keeps
    the momentum as well, so that the first step of a token that returns is led by its own history.

    With accumulation put this inside: `optax.MultiSteps(lazy_rows(inner), k)`, whose mean gradients
    touch the rows that any of the k did.

    Args:
      inner: An optax optimizer with its learning rate and decay. Moments are found by their path
        and shape: those whose path ends in the parameter's, and whose axes are the parameter's or
        all of them but the last.
      mode: "param" or "full".
      is_rows: Function of (key path, leaf) that tells which leaves are made of rows; by default
        those called `embedding` or `embeddings`.

    Returns:
      An optax transformation. A parameter without axes is never lazy.

    Raises:
      ValueError: Unknown mode; a `touched_rows` that fits no such leaf, in name, dtype or shape.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = lazy_rows(optax.lion(1e-2, weight_decay=0.1))
      >>> params = {"embedding": jnp.ones((3, 2))}
      >>> grads = {"embedding": jnp.array([[1.0, -1.0], [0.0, 0.0], [0.0, 2.0]])}
      >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
      >>> print(updates["embedding"])
      [[-0.011  0.009]
       [ 0.     0.   ]
       [-0.001 -0.011]]

    Source: posts 9736 (remedies) and 6869 (LazyOptimizer).
    """
    check_choice("mode", mode, ("param", "full"))
    chosen = _is_embedding if is_rows is None else is_rows
    wide = optax.with_extra_args_support(inner)

    def init(params: Any) -> LazyRowsState:
        return LazyRowsState(wide.init(params))

    def update(
        grads: Any,
        state: LazyRowsState,
        params: Any = None,
        *,
        touched_rows: Mapping[Any, Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, LazyRowsState]:
        paths, leaves, treedef = flatten(grads)
        lazy = [
            leaf.ndim > 0 and bool(chosen(p, leaf)) for p, leaf in zip(paths, leaves, strict=True)
        ]
        masks = row_masks(paths, leaves, lazy, touched_rows, grads)
        if touched_rows is not None:
            extra_args["touched_rows"] = touched_rows
        updates, new = wide.update(grads, state.inner_state, params, **extra_args)
        kept = [
            u if mask is None else jnp.where(mask, u, jnp.zeros_like(u))
            for u, mask in zip(treedef.flatten_up_to(updates), masks, strict=True)
        ]
        if mode == "full":
            names = [path_name(path) for path in paths]
            new = _keep_rows(state.inner_state, new, names, leaves, masks)
        return treedef.unflatten(kept), LazyRowsState(new)

    return optax.GradientTransformationExtraArgs(init, update)


def _keep_rows(old: Any, new: Any, names: list[str], grads: list[Any], masks: list[Any]) -> Any:
    """The new state with the old one's rows wherever the mask of their parameter is false."""

    def keep(path: tuple[Any, ...], before: Any, after: Any) -> Any:
        place = "/" + path_name(path)
        # An empty name is that of parameters that are one array.
        owners = [i for i, name in enumerate(names) if not name or place.endswith("/" + name)]
        if not owners:
            return after
        owner = max(owners, key=lambda i: len(names[i]))  # "a/b" rather than "b"
        mask, shape = masks[owner], grads[owner].shape
        if mask is not None and after.shape == shape:
            return jnp.where(mask, after, before)
        if mask is not None and after.shape == shape[:-1]:  # one statistic a row
            return jnp.where(jnp.squeeze(mask, -1), after, before)
        return after

    return jax.tree_util.tree_map_with_path(keep, old, new)


def split_embeddings(
    embeddings: optax.GradientTransformation,
    others: optax.GradientTransformation,
    *,
    is_embedding: IsRows | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for embeddings and another for the rest, e.g. Adam and a sign optimizer.

    Adam's step for a token that is no longer seen dies out with its momentum, where that of a sign
    optimizer does not; this is what Lion's authors do.

    Args:
      embeddings: Optimizer of the embeddings.
      others: Optimizer of all other parameters.
      is_embedding: Function of (key path, leaf); by default leaves called `embedding` or
        `embeddings`.

    Returns:
      `optax.multi_transform` of the two.

    Example:
      >>> import optax
      >>> from jaxkit.optim import tiger
      >>> optimizer = split_embeddings(optax.adam(1e-3), tiger(1e-3))

    Source: post 9736; Chen et al. 2023 (arXiv 2302.06675).
    """
    chosen = _is_embedding if is_embedding is None else is_embedding

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "embeddings" if chosen(path, leaf) else "others", params
        )

    return optax.multi_transform({"embeddings": embeddings, "others": others}, labels)


def swap_halves(x: Float[Array, "*shape"], *, axis: int = -1) -> Float[Array, "*shape"]:
    """Exchange the first and the second half of an axis; its own inverse.

    Args:
      x: Array with an even number of elements on `axis`.
      axis: The axis.

    Returns:
      The array with the halves exchanged.

    Raises:
      ValueError: No such axis, or an odd number of elements on it.

    Example:
      >>> import jax.numpy as jnp
      >>> print(swap_halves(jnp.array([1.0, 2.0, 3.0, 4.0])))
      [3. 4. 1. 2.]

    Source: post 9736.
    """
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be one of the {x.ndim} axes of x; got {axis}.")
    if x.shape[axis] % 2:
        raise ValueError(f"x must have an even size on axis {axis}; got shape {x.shape}.")
    return jnp.roll(x, x.shape[axis] // 2, axis)


def tied_logits(
    hidden: Float[Array, "*batch dim"], embedding: Float[Array, "codes dim"], *, swap: bool = True
) -> Float[Array, "*batch codes"]:
    """Logits from the transposed embedding, its features' halves swapped.

    Tied to the output layer an embedding has a dense gradient. Swapped, the logit of a token for
    its own embedding is no longer the square of a norm, which at initialisation would predict the
    token that was just read. Tokens that are never targets are still pushed one way at every step.

    Args:
      hidden: The last layer's outputs.
      embedding: The input embedding, tokens by features.
      swap: Whether to swap the halves.

    Returns:
      The logits, in the inputs' dtype.

    Raises:
      ValueError: `hidden` and `embedding` have different numbers of features, or an odd one.

    Example:
      >>> import jax.numpy as jnp
      >>> embedding = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> print(tied_logits(embedding, embedding))
      [[0. 2.]
       [2. 0.]]

    Source: post 9736.
    """
    if embedding.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != embedding.shape[-1]:
        raise ValueError(
            "embedding must be (tokens, features) with the features of hidden;"
            f" got {embedding.shape} and {hidden.shape}."
        )
    return hidden @ (swap_halves(embedding) if swap else embedding).T
