"""Attention over keys that lie on several devices, inside `jax.shard_map`.

Two ways to the same merge: the partial results of all devices are reduced (queries everywhere,
keys split: decoding), or keys and values travel round a ring while each device reads them into the
results of its own queries (both split: training on long sequences). Both are differentiable, since
`blockwise_attention` takes the cotangent of lse.

Source: Liu, Zaharia, Abbeel 2023, *Ring Attention* (arXiv 2310.01889).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice
from jaxkit._typing import Array, Bool, Float, Int
from jaxkit.attention.streaming import _options
from jaxkit.attention.streaming.block import blockwise_attention
from jaxkit.attention.streaming.state import (
    Attended,
    finalize,
    merge,
    merge_normalized,
    merge_normalized_all,
    sink,
    unfinalize,
)

__all__ = ["merge_over_devices", "ring_attention"]


def merge_over_devices(partial: Attended, axis_name: str, *, method: str = "sum") -> Attended:
    """Merge partial results that devices have of the same queries over different keys.

    Args:
      partial: this device's `(out, lse)`.
      axis_name: mesh axis over which the keys are split.
      method: "sum" adds e^{lse − max} (out, 1) over the devices: the result is the same on all, and
        typed so. "gather" collects all (out, lse) and merges them on every device.

    Returns:
      The result over all keys, `out` in the dtype of `partial.out`.

    Raises:
      ValueError: unknown method.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
      >>> def local(q, k, v):
      ...     return merge_over_devices(blockwise_attention(q, k, v), "x")
      >>> q = k = v = jnp.ones((4, 1, 2))
      >>> split = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("x"), P("x")), out_specs=P())
      >>> print(split(q, k, v).lse.shape)
      (4, 1)
    """
    check_choice("method", method, ("sum", "gather"))
    if method == "gather":
        return merge_normalized_all(jax.lax.all_gather(partial, axis_name))
    state = unfinalize(partial)
    top = jax.lax.pmax(jax.lax.stop_gradient(state.m), axis_name)
    shift = jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top)
    weight = jnp.exp(state.m - shift)
    l, o = jax.lax.psum((weight * state.l, weight[..., None] * state.o), axis_name)
    return finalize(type(state)(top, l, o), dtype=partial.out.dtype)


def ring_attention(
    q: Float[Array, "*batch queries heads key_dim"],
    k: Float[Array, "*batch keys groups key_dim"],
    v: Float[Array, "*batch keys groups value_dim"],
    axis_name: str,
    *,
    causal: bool = False,
    window: int | None = None,
    segment_ids: Int[Array, "*batch queries"] | None = None,
    kv_segment_ids: Int[Array, "*batch keys"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    sinks: Float[Array, "heads"] | None = None,
    scale: Any = None,
    soft_cap: float | None = None,
    block_q: int = 128,
    block_k: int = 256,
    precision: Any = None,
) -> Attended:
    """Attention of sequences that are cut into equal parts, one a device, in their order.

    Each device holds its own queries, keys and values. After its own keys it reads those of the
    device before it, and so on: newest first. Parts that a causal mask or a window hides cost a
    transfer, but no products.

    Args:
      q: this device's queries.
      k: this device's keys.
      v: their values.
      axis_name: mesh axis over which the sequence is split.
      causal: a query sees the keys up to its own position in the whole sequence; with more keys
        than queries, the queries are the last positions.
      window: with `causal`: only the last so many of these.
      segment_ids: of this device's queries.
      kv_segment_ids: of this device's keys. Default: those of the queries.
      mask: true where visible: this device's queries against all keys of all devices, or 1.
      bias: added to the scores; likewise.
      sinks: a logit for each head, counted once.
      scale: default 1/√key_dim.
      soft_cap: c of `c tanh(s / c)`, applied before the bias.
      block_q: queries in a tile.
      block_k: keys in a tile.
      precision: of the matrix products.

    Returns:
      `(out, lse)` of this device's queries over the whole sequence.

    Raises:
      TypeError: an argument has the wrong dtype.
      ValueError: shapes or options do not fit.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
      >>> ring = functools.partial(ring_attention, axis_name="x", causal=True)
      >>> ring = jax.shard_map(ring, mesh=mesh, in_specs=(P("x"),) * 3, out_specs=P("x"))
      >>> q = k = v = jnp.eye(4)[:, None]
      >>> whole = blockwise_attention(q, k, v, causal=True)
      >>> print(bool(abs(ring(q, k, v).out - whole.out).max() < 1e-6))
      True

    Source: Liu, Zaharia, Abbeel 2023 (arXiv 2310.01889).
    """
    sizes = _options.check_qkv(q, k, v)
    window = _options.check_window(window, causal)
    if causal and sizes.keys < sizes.queries:
        raise ValueError(
            "k must have at least as many positions as q for a causal ring; "
            f"got {sizes.keys} and {sizes.queries}."
        )
    sinks = _options.check_sinks(sinks, sizes)
    segments = _options.check_segments(segment_ids, kv_segment_ids, sizes)
    kv_ids = None
    if segments is not None:
        kv_ids = segments[1] if segments[1].shape[0] != 1 else segments[1][0]
        if kv_ids.ndim == 2:
            kv_ids = kv_ids.reshape(*sizes.batch, sizes.keys)
    devices = jax.lax.axis_size(axis_name)
    own = jax.lax.axis_index(axis_name).astype(jnp.int32)
    every = sizes.keys * devices
    for name, x in (("mask", mask), ("bias", bias)):
        if x is not None and x.shape[-1] not in (1, every):
            raise ValueError(
                f"{name} must have the {every} keys of all devices on its last axis, or 1; "
                f"got shape {tuple(x.shape)}."
            )

    def columns(x: Array | None, source: Array) -> Array | None:
        if x is None or x.shape[-1] == 1:
            return x
        return jax.lax.dynamic_slice_in_dim(x, source * sizes.keys, sizes.keys, x.ndim - 1)

    def read(k: Array, v: Array, kv_ids: Array | None, source: Array) -> Attended:
        """Own queries over the part of the keys that came from device `source`."""
        offset = None
        if causal:
            before = devices * (sizes.keys - sizes.queries)
            offset = own * sizes.queries + before - source * sizes.keys
        return blockwise_attention(
            q,
            k,
            v,
            causal=causal,
            window=window,
            offset=offset,
            segment_ids=segment_ids,
            kv_segment_ids=kv_ids,
            mask=columns(mask, source),
            bias=columns(bias, source),
            scale=scale,
            soft_cap=soft_cap,
            block_q=block_q,
            block_k=block_k,
            out_dtype=_options.work_dtype(q, k, v, bias),
            precision=precision,
        )

    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def turn(carry: Any, step: Array) -> tuple[Any, None]:
        result, part = carry
        part = jax.lax.ppermute(part, axis_name, ring)
        k, v, kv_ids = part
        more = read(k, v, kv_ids, (own - step) % devices)
        return (merge_normalized(result, more), part), None

    start = (read(k, v, kv_ids, own), (k, v, kv_ids))
    start = _options.spread_over_devices(*start, own)[:-1]
    (result, _), _ = jax.lax.scan(turn, start, jnp.arange(1, devices, dtype=jnp.int32))
    if sinks is not None:
        extra = jnp.broadcast_to(sinks.astype(result.lse.dtype), result.lse.shape)
        result = finalize(merge(unfinalize(result), sink(extra, sizes.value_dim)))
    return Attended(result.out.astype(q.dtype), result.lse)
