"""What a parameter is, told from its place in the tree: names, classes, rows that were touched."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit._checks import check_choice, check_real, is_traced

__all__ = [
    "CLASSES",
    "LabelFn",
    "check_count",
    "check_decay",
    "class_of",
    "flatten",
    "path_name",
    "row_masks",
    "rows_like",
]

CLASSES = ("vector", "gamma", "embedding", "matrix")

LabelFn = Callable[[tuple[Any, ...], Any], str | None]

_NAMES = {
    "bias": "vector",
    "beta": "vector",
    "scale": "gamma",
    "gamma": "gamma",
    "embedding": "embedding",
    "embeddings": "embedding",
}


def path_name(path: tuple[Any, ...]) -> str:
    """`"encoder/embed/embedding"` for a key path; the `value` of an nnx variable is left out."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def class_of(path: tuple[Any, ...], leaf: Any, label_fn: LabelFn | None = None) -> str:
    """The class of a parameter: by `label_fn`, then by its last name, then by its axes."""
    label = None if label_fn is None else label_fn(path, leaf)
    if label is not None:
        check_choice(f"label_fn at {path_name(path)!r}", label, CLASSES)
        return label
    # The names of list elements are numbers: the list's own name counts there.
    names = [name for name in path_name(path).split("/") if not name.isdigit()]
    name = names[-1].lower() if names else ""
    return _NAMES.get(name, "vector" if leaf.ndim <= 1 else "matrix")


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """`ValueError` unless `value` is an integer of at least `least`; it may be traced."""
    number = isinstance(value, (int, np.number, np.ndarray, jax.Array))
    whole = number and jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.integer)
    if not whole or (not is_traced(value) and int(value) < least):
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")


def check_decay(name: str, value: Any) -> None:
    """`ValueError` unless `value` is in [0, 1); it may be traced."""
    check_real(name, value, least=0)
    if not is_traced(value) and float(value) >= 1:
        raise ValueError(f"{name} must be at least 0 and less than 1; got {value!r}.")


def flatten(params: Any) -> tuple[list[tuple[Any, ...]], list[Any], Any]:
    """Paths, leaves and structure; `ValueError` for a leaf that cannot be trained."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in pairs:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                "params must have real floating-point leaves;"
                f" got {dtype or repr(leaf)} at {path_name(path)!r}."
            )
    return [path for path, _ in pairs], [leaf for _, leaf in pairs], treedef


def rows_like(leaf: Any) -> Any:
    """False for every row of a parameter, the last axis kept with size one."""
    if isinstance(leaf, jax.Array):
        return jnp.zeros_like(leaf[..., :1], dtype=bool)  # sharded as the parameter is
    return jnp.zeros((*leaf.shape[:-1], 1), bool)


def row_masks(
    paths: list[tuple[Any, ...]],
    grads: list[Any],
    lazy: list[bool],
    touched_rows: Mapping[Any, Any] | None,
    params: Any,
) -> list[Any]:
    """For every lazy leaf the rows that count as touched, `None` for every other leaf.

    A row is touched when `touched_rows` says so for its leaf, or, where that does not name the
    leaf, when an element of its gradient is not zero.
    """
    given = {} if touched_rows is None else {_key(key): rows for key, rows in touched_rows.items()}
    masks: list[Any] = []
    for path, grad, is_lazy in zip(paths, grads, lazy, strict=True):
        name = path_name(path)
        if not is_lazy:
            masks.append(None)
            continue
        if name not in given:
            masks.append(jnp.any(grad != 0, axis=-1, keepdims=True))
            continue
        rows = jnp.asarray(given[name])
        if rows.dtype != jnp.bool_ or rows.shape != grad.shape[:-1]:
            raise ValueError(
                f"touched_rows[{name!r}] must be bool of shape {grad.shape[:-1]};"
                f" got {rows.dtype} of shape {rows.shape}."
            )
        masks.append(jnp.expand_dims(rows, -1))
    # Under optax.masked and multi_transform other optimizers' leaves are left out of the tree.
    masked = any(
        isinstance(x, optax.MaskedNode)
        for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    )
    known = [path_name(path) for path, is_lazy in zip(paths, lazy, strict=True) if is_lazy]
    for name in given:
        if not masked:
            check_choice("a key of touched_rows", name, known)
    return masks


def _key(key: Any) -> str:
    return key if isinstance(key, str) else path_name(tuple(key))
