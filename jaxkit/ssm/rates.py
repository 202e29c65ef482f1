"""Labels that let optax train the dynamics of state-space layers at a rate of their own."""

from typing import Any

import jax

__all__ = ["DYNAMICS", "ssm_labels"]

# Λ, P, B and the steps; in one dict (or module) with `log_step`, so that an equally named
# parameter of another layer keeps the regular rate.
DYNAMICS = frozenset({"log_neg_re", "im", "p", "b", "log_step"})


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The path as strings, without the last key of a variable's own."""
    names = []
    for key in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
    return tuple(names[:-1]) if names and names[-1] == "value" else tuple(names)


def ssm_labels(params: Any) -> Any:
    """Label every parameter `"ssm"` (Λ, P, B, log ε) or `"regular"` (everything else).

    Meant for `optax.multi_transform`: the dynamics at a learning rate of 1e-3 without weight decay,
    the rest as the model wants. Works on parameter dicts, on `nnx.State` and on any pytree of them.

    Args:
      params: Parameters (arrays or shape structs).

    Returns:
      A pytree of the same structure with strings as leaves.

    Example:
      >>> import jax, optax
      >>> from jaxkit.ssm import s4
      >>> params = {"ssm": s4.init_params(jax.random.key(0), 2, 4, l_max=8)}
      >>> labels = ssm_labels(params)
      >>> print(labels["ssm"]["log_step"], labels["ssm"]["c"])
      ssm regular
      >>> transforms = {"ssm": optax.adam(1e-3), "regular": optax.adamw(4e-3, weight_decay=0.01)}
      >>> optimizer = optax.multi_transform(transforms, ssm_labels)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396, app. D); experiments of post 10162.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [_names(path) for path, _ in leaves]
    homes = {path[:-1] for path in paths if path and path[-1] == "log_step"}
    labels = [
        "ssm" if path and path[-1] in DYNAMICS and path[:-1] in homes else "regular"
        for path in paths
    ]
    return jax.tree_util.tree_unflatten(treedef, labels)
