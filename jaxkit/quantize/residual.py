"""Residual quantization: every stage codes what the stages before it left over."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_int
from jaxkit._typing import Array, Bool, Float, Int, Key
from jaxkit.quantize._common import check_mask, check_vectors, select_rows
from jaxkit.quantize._sharding import EVERYWHERE, VECTORS, automatic
from jaxkit.quantize.estimators import ESTIMATORS, estimate
from jaxkit.quantize.init import data_init, kmeans
from jaxkit.quantize.search import lookup, nearest_code
from jaxkit.quantize.vq import VQOutput, VQState, vector_quantize, vq_init

__all__ = ["residual_init", "residual_quantize"]


@automatic(VQOutput._make((VECTORS, VECTORS, EVERYWHERE, EVERYWHERE)))
def residual_quantize(
    states: Sequence[VQState],
    z: Float[Array, "*batch dim"],
    *,
    estimator: str = "ste",
    per_stage: bool = False,
    stages: int | Int[Array, "..."] | None = None,
    key: Key | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    **options: Any,
) -> VQOutput:
    """`r_0 = z, q_l = Q_l(r_{l-1}), r_l = r_{l-1} - sg(q_l)`; the result is Σ_l q_l.

    The estimator is applied once, to (z, Σ q_l). With `per_stage` it is applied to every
    (r_{l-1}, q_l), as in popular code: all of these carry a gradient to z, and with
    straight-through it is the number of stages times as large.

    Args:
      states: One `VQState` a stage; the numbers of codes may differ.
      z: Vectors.
      estimator: Of `estimate`.
      per_stage: Apply it at every stage.
      stages: Use the first so many stages only (quantizer dropout): a number, or one for every
        vector, possibly traced. Stages left out give the index K, no loss, and keep their state.
      key: As in `vector_quantize`.
      mask: False for vectors to leave out.
      **options: Of `vector_quantize`; the metric must be Euclidean.

    Returns:
      `VQOutput`: index `[..., stages]`; losses summed over stages; the new states, a tuple.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If there is no stage, or as `vector_quantize`.

    Example:
      >>> import jax.numpy as jnp
      >>> states = [vq_init(jnp.array([[0.0], [4.0]])), vq_init(jnp.array([[-1.0], [1.0]]))]
      >>> out = residual_quantize(states, jnp.array([[2.9]]))
      >>> print(out.z_q, out.index)
      [[3.]] [[1 0]]

    Source: Zeghidour et al. 2021 (arXiv 2107.03312).
    """
    states = tuple(states)
    if not states:
        raise ValueError("states must hold at least one stage; got none.")
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("metric", options.get("metric", "euclidean"), ("euclidean",))
    check_vectors(z)
    check_mask(mask, z.shape[:-1])
    if stages is not None and not isinstance(stages, jax.Array):
        stages = check_int("stages", stages, least=0)
    keys = [None] * len(states) if key is None else list(jax.random.split(key, len(states)))

    residual, total = z, jnp.zeros_like(z)
    indices, losses, new_states = [], [], []
    for stage, (state, stage_key) in enumerate(zip(states, keys, strict=True)):
        used = mask
        if stages is not None:
            used = jnp.broadcast_to(jnp.asarray(stage < stages), z.shape[:-1])
            used = used if mask is None else used & mask
        out = vector_quantize(
            state,
            residual,
            estimator=estimator if per_stage else "none",
            key=stage_key,
            mask=used,
            **options,
        )
        total = total + out.z_q
        residual = residual - jax.lax.stop_gradient(out.z_q)
        new_state = out.state
        if stages is not None and jnp.ndim(stages) == 0:
            choose = partial(jnp.where, jnp.asarray(stage < stages))
            new_state = jax.tree.map(choose, new_state, state)
        indices.append(out.index)
        losses.append(out.losses)
        new_states.append(new_state)

    z_q = total
    if not per_stage:
        z_q = select_rows(mask, estimate(z, total, estimator=estimator))
    summed = {name: sum(loss[name] for loss in losses) for name in losses[0]}
    return VQOutput(z_q, jnp.stack(indices, axis=-1), summed, tuple(new_states))  # type: ignore


@automatic(EVERYWHERE)
def residual_init(
    key: Key,
    z: Float[Array, "*batch dim"],
    num_codes: int | Sequence[int],
    *,
    stages: int | None = None,
    method: str = "kmeans",
    steps: int = 20,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[VQState, ...]:
    """States whose codebooks are fitted to data one after the other, each to what is left over.

    Args:
      key: Random key; the same on all devices.
      z: Vectors.
      num_codes: K, or one for every stage.
      stages: Number of stages, if `num_codes` is one number.
      method: `kmeans` or `data`.
      steps: Most updates of `kmeans`.
      mask: False for vectors to leave out.
      axis_name: Mesh axes over which `z` is spread, inside `shard_map`.

    Returns:
      One `VQState` a stage.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a number, a shape or a name is wrong.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> z = jnp.array([[0.0], [1.0], [10.0], [11.0]])
      >>> states = residual_init(jax.random.key(0), z, 2, stages=2)
      >>> print(residual_quantize(states, z).z_q[:, 0])
      [ 0.  1. 10. 11.]
    """
    check_choice("method", method, ("kmeans", "data"))
    if isinstance(num_codes, Sequence):
        sizes = tuple(num_codes)
        if stages is not None and stages != len(sizes):
            raise ValueError(f"stages must be {len(sizes)} for num_codes {sizes}; got {stages}.")
    else:
        sizes = (num_codes,) * check_int("stages", stages, least=1)
    if not sizes:
        raise ValueError("num_codes must hold at least one stage; got none.")
    residual, states = jax.lax.stop_gradient(z), []
    for size, stage_key in zip(sizes, jax.random.split(key, len(sizes)), strict=True):
        common: dict[str, Any] = {"mask": mask, "axis_name": axis_name}
        if method == "kmeans":
            codebook = kmeans(stage_key, residual, size, steps=steps, **common).codebook
        else:
            codebook = data_init(stage_key, residual, size, **common)
        index = nearest_code(residual, codebook, mask=mask)
        residual = residual - lookup(codebook, index).astype(z.dtype)
        states.append(vq_init(codebook))
    return tuple(states)
