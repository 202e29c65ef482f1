"""Codebooks of keys: first codes, and the moving average that a training step calls.

They are no parameters: the task's loss has no gradient to them. A step sums keys by code over the
whole batch, on all devices, and mixes the sums into the state; under `jit` with sharded arrays the
sums are global by themselves, inside `shard_map` pass `axis_name`.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Bool, DType, Float, Int, Key
from jaxkit.attention.vq._operands import check_mask
from jaxkit.attention.vq.biases import relative_sinusoids
from jaxkit.quantize import (
    EMAState,
    batch_statistics,
    data_init,
    ema_codebook,
    ema_init,
    ema_update,
    kmeans,
    revive,
)
from jaxkit.quantize._common import psum

__all__ = [
    "CODEBOOK_INITS",
    "CodeStatistics",
    "code_statistics",
    "codebook_from_keys",
    "codebook_of",
    "init_codebook",
    "update_codebook",
    "update_codebooks",
]

CODEBOOK_INITS = ("keys", "normal", "sinusoids")
METHODS = ("data", "kmeans")


class CodeStatistics(NamedTuple):
    """What one layer tells about its keys in one batch.

    Attributes:
      commitment: Mean over tokens of Σ_groups ‖k − sg(C_z)‖², with its gradient to k.
      sums: Σ_{z = s} k, `[groups, codes, key_dim]`.
      counts: #{z = s}, int32 `[groups, codes]`.
      keys: k, `[groups, tokens, key_dim]`: for revival.
      codes: z, `[groups, tokens]`; the number of codes marks padding.
    """

    commitment: Array
    sums: Array
    counts: Array
    keys: Array
    codes: Array


def init_codebook(
    key: Key,
    groups: int,
    num_codes: int,
    key_dim: int,
    *,
    init: str = "keys",
    wavelength: float = 1e5,
    dtype: DType = jnp.float32,
) -> EMAState:
    """The state (m, n = 1) of first codes that no data has been seen for.

    | init        | codes                                                          | norm       |
    |-------------|----------------------------------------------------------------|------------|
    | `keys`      | random directions of the length that the layer's keys have     | dk^(1/4)   |
    | `normal`    | N(0, 1/(G S)), as the paper's code: far shorter than the keys  | √(dk/GS)   |
    | `sinusoids` | [sin(s ω), cos(s ω)] at that length, for a fixed codebook      | dk^(1/4)   |

    Args:
      key: A random key.
      groups: G.
      num_codes: S.
      key_dim: dk.
      init: `keys`, `normal` or `sinusoids`.
      wavelength: λ of `sinusoids`.
      dtype: float32 or float64.

    Returns:
      `EMAState(sums [groups, codes, key_dim], counts [groups, codes])`.

    Raises:
      ValueError: If `init` is unknown or a size out of range.

    Example:
      >>> import jax
      >>> state = init_codebook(jax.random.key(0), 1, 8, 16)
      >>> norms = jnp.linalg.norm(codebook_of(state), axis=-1)
      >>> print(state.sums.shape, bool(abs(norms - 2.0).max() < 1e-5))
      (1, 8, 16) True

    Source: Lingle 2023 (arXiv 2309.16354).
    """
    check_choice("init", init, CODEBOOK_INITS)
    for name, size in (("groups", groups), ("num_codes", num_codes), ("key_dim", key_dim)):
        check_int(name, size, least=1)
    shape = (groups, num_codes, key_dim)
    if init == "sinusoids":
        rows = relative_sinusoids(num_codes, key_dim, wavelength=wavelength, dtype=dtype)
        codebook = jnp.broadcast_to(rows[None], shape)
    else:
        codebook = jax.random.normal(key, shape, dtype)
    if init == "normal":
        codebook = codebook / jnp.sqrt(jnp.asarray(groups * num_codes, dtype))
    else:
        norm = jnp.linalg.norm(codebook, axis=-1, keepdims=True)
        codebook = codebook / norm * jnp.asarray(key_dim**0.25, dtype)
    return jax.vmap(ema_init)(codebook)


def codebook_of(state: EMAState, *, floor: float = 0.01) -> Float[Array, "groups codes key_dim"]:
    """C = m / max(n, floor).

    A code that is no longer used keeps its place until n < floor, and then shrinks to 0.

    Args:
      state: Of all groups.
      floor: Least count.

    Returns:
      Codebooks, one for each group.

    Example:
      >>> import jax.numpy as jnp
      >>> state = EMAState(jnp.asarray([[[3.0], [1.0]]]), jnp.asarray([[1.5, 0.001]]))
      >>> codebook_of(state).ravel().tolist()
      [2.0, 100.0]
    """
    return jax.vmap(partial(ema_codebook, smoothing="clip", floor=floor))(state)


def code_statistics(
    k: Float[Array, "batch groups length key_dim"],
    codes: Int[Array, "batch groups length"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    mask: Bool[Array, "batch length"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> CodeStatistics:
    """Sums and counts of the keys of every code, and the commitment loss.

    Args:
      k: Keys.
      codes: z.
      codebook: C.
      mask: True where a position counts.
      axis_name: Mesh axes over which the batch is spread, inside `shard_map`: sums and counts are
        added up over them, and the commitment is the mean over the tokens of all devices.

    Returns:
      The statistics; `commitment` alone has a gradient.

    Raises:
      ValueError: If shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> k = jnp.asarray([1.0, 2.0, 5.0]).reshape(1, 1, 3, 1)
      >>> found = code_statistics(k, jnp.asarray([[[0, 0, 1]]]), jnp.asarray([[[1.0], [4.0]]]))
      >>> found.counts.tolist(), found.sums.ravel().tolist(), round(float(found.commitment), 4)
      ([[2, 1]], [3.0, 5.0], 0.6667)

    Source: Lingle 2023 (arXiv 2309.16354).
    """
    batch, groups, length, width = k.shape
    if codes.shape != k.shape[:-1]:
        raise ValueError(f"codes must have shape {k.shape[:-1]}; got {codes.shape}.")
    num_codes = codebook.shape[1]
    valid = jnp.any(codes < num_codes, axis=1)
    if mask is not None:
        check_mask(mask, (batch, length))
        valid = valid & mask
    rows = jnp.moveaxis(k, 1, 0).reshape(groups, batch * length, width).astype(wide(k.dtype))
    counted = valid.reshape(-1)
    index = jnp.moveaxis(codes, 1, 0).reshape(groups, batch * length)
    index = jnp.where(counted[None], index, jnp.asarray(num_codes, index.dtype))

    def of_group(rows: Array, index: Array, codebook: Array) -> tuple[Array, Array, Array]:
        sums, counts = batch_statistics(rows, index, num_codes, axis_name=axis_name)
        near = codebook.at[index].get(mode="fill", fill_value=0).astype(rows.dtype)
        gap = jnp.where(counted[:, None], rows - jax.lax.stop_gradient(near), 0)
        return sums, counts, jnp.sum(gap**2)

    sums, counts, squares = jax.vmap(of_group)(rows, index, codebook)
    total = jnp.maximum(psum(jnp.sum(counted, dtype=jnp.int32), axis_name), 1)
    commitment = psum(jnp.sum(squares), axis_name) / total.astype(squares.dtype)
    return CodeStatistics(commitment, sums, counts, jax.lax.stop_gradient(rows), index)


def update_codebook(
    state: EMAState,
    statistics: CodeStatistics,
    *,
    decay: float = 0.99,
    key: Key | None = None,
    threshold: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> EMAState:
    """m ← γ m + (1 − γ) Σ_{z=s} k, n ← γ n + (1 − γ) #{z=s}, with sums over the whole batch.

    Args:
      state: Of all groups of one layer.
      statistics: Of the batch. Several devices or steps add their `sums` and `counts`.
      decay: γ in [0, 1).
      key: A random key, for revival; the same on all devices.
      threshold: Codes whose n falls below it become random keys of the batch. None: never.
      axis_name: Mesh axes over which the batch is spread, inside `shard_map`, for revival alone
        (`code_statistics` has summed over them already).

    Returns:
      The new state.

    Raises:
      ValueError: If `decay` is out of range, or `threshold` is given without a `key`.

    Example:
      >>> import jax.numpy as jnp
      >>> state = EMAState(jnp.ones((1, 2, 1)), jnp.ones((1, 2)))
      >>> k, codes = jnp.full((1, 1, 3, 1), 5.0), jnp.zeros((1, 1, 3), int)
      >>> found = code_statistics(k, codes, codebook_of(state))
      >>> state = update_codebook(state, found, decay=0.5)
      >>> codebook_of(state).ravel().tolist(), state.counts.tolist()
      ([4.0, 1.0], [[2.0, 0.5]])

    Source: Lingle 2023 (arXiv 2309.16354); van den Oord et al. 2017 (1711.00937).
    """
    state = jax.vmap(partial(ema_update, decay=decay))(state, statistics.sums, statistics.counts)
    if threshold is None:
        return state
    check_real("threshold", threshold, above=0.0)
    if key is None:
        raise ValueError("key must be given with threshold, to draw the new codes; got None.")

    def of_group(key: Key, state: EMAState, keys: Array, codes: Array) -> EMAState:
        return revive(
            key,
            state,
            keys,
            threshold=threshold,
            reset_size=max(threshold, 1.0),
            mask=codes < state.counts.shape[0],
            axis_name=axis_name,
        )

    keys = jax.random.split(key, state.counts.shape[0])
    return jax.vmap(of_group)(keys, state, statistics.keys, statistics.codes)


def update_codebooks(
    states: Sequence[EMAState],
    statistics: Sequence[CodeStatistics],
    *,
    decay: float = 0.99,
    key: Key | None = None,
    threshold: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[EMAState, ...]:
    """`update_codebook` of every layer.

    Args:
      states: One for each layer, from `VQTransformer.codebooks`.
      statistics: One for each layer.
      decay: γ in [0, 1).
      key: A random key, for revival.
      threshold: As in `update_codebook`.
      axis_name: As in `update_codebook`.

    Returns:
      The new states.

    Raises:
      ValueError: If there are not as many statistics as states.

    Example:
      >>> update_codebooks((), ())
      ()
    """
    if len(states) != len(statistics):
        raise ValueError(
            f"statistics must have one entry for each of {len(states)} layers; "
            f"got {len(statistics)}."
        )
    keys = [None] * len(states) if key is None else list(jax.random.split(key, len(states)))
    return tuple(
        update_codebook(
            state, found, decay=decay, key=own, threshold=threshold, axis_name=axis_name
        )
        for state, found, own in zip(states, statistics, keys, strict=True)
    )


def codebook_from_keys(
    key: Key,
    k: Float[Array, "batch groups length key_dim"],
    num_codes: int,
    *,
    method: str = "data",
    steps: int = 20,
    mask: Bool[Array, "batch length"] | None = None,
) -> EMAState:
    """Codes from keys that there are, of a pretrained model say: drawn from them, or by k-means.

    Args:
      key: A random key.
      k: Keys.
      num_codes: S.
      method: `data` (random keys) or `kmeans` (from those, by Lloyd's steps).
      steps: Most steps of `kmeans`.
      mask: True where a position counts.

    Returns:
      The state of these codes, n = 1.

    Raises:
      ValueError: If `method` is unknown or a size out of range.

    Example:
      >>> import jax
      >>> k = jnp.asarray([1.0, 3.0, 10.0]).reshape(1, 1, 3, 1)
      >>> state = codebook_from_keys(jax.random.key(0), k, 2, method="kmeans")
      >>> sorted(codebook_of(state).ravel().tolist())
      [2.0, 10.0]

    Source: post 9844 (codebooks of a pretrained model).
    """
    check_choice("method", method, METHODS)
    batch, groups, length, width = k.shape
    rows = jnp.moveaxis(k, 1, 0).reshape(groups, batch * length, width)
    counted = None if mask is None else mask.reshape(-1)

    def of_group(key: Key, rows: Array) -> EMAState:
        if method == "data":
            return ema_init(data_init(key, rows, num_codes, mask=counted))
        return ema_init(kmeans(key, rows, num_codes, steps=steps, mask=counted).codebook)

    return jax.vmap(of_group)(jax.random.split(key, groups), rows)
