"""Tiger step by step as its reference code in Keras, schedule and naming rules included."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxkit._checks import check_real
from jaxkit._typing import Array
from jaxkit.optim._leaves import check_count, path_name
from jaxkit.optim._tiger import Rate, _Tiger

__all__ = ["keras_labels", "piecewise_linear", "tiger_keras"]


def tiger_keras(
    learning_rate: Rate = 1e-3,
    beta: float = 0.965,
    weight_decay: float = 0.01,
    grad_accum_steps: int = 1,
    lr_schedule: Mapping[int, float] | None = None,
    shrink_ratio: float = 0.99,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the reference code, step by step, under its own argument names.

    It differs from `tiger`: classes come from names alone (`keras_labels`), a matrix of zeros
    never moves, the rate follows `piecewise_linear`, and only NaN counts as a bad gradient. An Inf
    makes the momentum infinite, which a later Inf of the other sign turns into NaN.

    Args:
      learning_rate: Peak of the relative rate; a schedule of the 0-based micro-step is multiplied
        by `lr_schedule` as well.
      beta: Decay of the momentum.
      weight_decay: λ.
      grad_accum_steps: Micro-steps to an update.
      lr_schedule: Knots of the factor on the rate, `{0: 1}` by default.
      shrink_ratio: Factor on a parameter whose gradient has NaN.

    Returns:
      An optax transformation.

    Raises:
      ValueError: As for `tiger`.

    Example:
      >>> optimizer = tiger_keras(1.76e-3, grad_accum_steps=4, lr_schedule={40000: 1, 160000: 0.5})

    Source: post 9512; reference code bojone/tiger.
    """
    if not callable(learning_rate):
        check_real("learning_rate", learning_rate, least=0)
    factor = piecewise_linear({0: 1.0} if lr_schedule is None else lr_schedule)

    def rate(count: Any) -> Array:
        peak = learning_rate(count) if callable(learning_rate) else learning_rate
        return jnp.asarray(peak, jnp.float32) * factor(count)

    return _Tiger(
        learning_rate=rate,
        beta=beta,
        weight_decay=weight_decay,
        accumulation_steps=grad_accum_steps,
        shrink=shrink_ratio,
        rms_floor=0.0,
        label_fn=keras_labels,
        is_bad=jnp.isnan,
    ).transformation()


def piecewise_linear(knots: Mapping[int, float], *, peak: float = 1.0) -> optax.Schedule:
    """Schedule through the given knots: linear between them, constant after the last.

    From 0 at step 0 unless there is a knot there, so that the first update may be zero.

    Args:
      knots: Factor by 0-based micro-step; `{1000: 1, 2000: 0.1}` warms up for 1000 micro-steps and
        falls to a tenth in the next 1000.
      peak: Factor on all of them.

    Returns:
      A function of the step, in float32.

    Raises:
      ValueError: No knots, or a step that is no integer from 0.

    Example:
      >>> schedule = piecewise_linear({1000: 1, 2000: 0.1}, peak=2e-3)
      >>> print(schedule(0), schedule(500), schedule(1000), schedule(5000))
      0.0 0.001 0.002 0.0002

    Source: reference code of post 9512.
    """
    if not knots:
        raise ValueError(f"knots must have at least one step; got {knots!r}.")
    for step in knots:
        check_count("a step of knots", step, least=0)
    points = sorted((int(step), float(value) * peak) for step, value in knots.items())
    if points[0][0] != 0:
        points.insert(0, (0, 0.0))
    steps, values = np.asarray(points, np.float32).T

    def schedule(count: Any) -> Array:
        return jnp.interp(jnp.asarray(count, jnp.float32), steps, values)

    return schedule


def keras_labels(path: tuple[Any, ...], leaf: Any) -> str:
    """The class of a parameter as the reference code has it: by names, whatever the axes.

    `bias`, `beta` or `gamma` anywhere in the path, then `embeddings`; everything else is a matrix,
    a vector by another name included. Flax's `scale` and `embedding` count as `gamma` and
    `embeddings`.

    Args:
      path: Key path of the leaf.
      leaf: The parameter; not looked at.

    Returns:
      One of "vector", "gamma", "embedding", "matrix".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(jax.tree_util.tree_map_with_path(keras_labels, {"gain": jnp.ones(3)}))
      {'gain': 'matrix'}

    Source: reference code of post 9512.
    """
    del leaf
    name = path_name(path)
    last = name.rsplit("/", 1)[-1]
    if "gamma" in name or last == "scale":
        return "gamma"
    if re.search("bias|beta", name):
        return "vector"
    return "embedding" if "embeddings" in name or last == "embedding" else "matrix"
