"""Reading a cache of keys: split decoding, and prompts taken in chunks.

Both are one merge of partial results: pieces of the cache for one new query, or cache and own chunk
for a chunk of queries.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_int
from jaxkit._typing import Array, ArrayLike, Bool, DType, Float
from jaxkit.attention.streaming import _options
from jaxkit.attention.streaming.block import blockwise_attention
from jaxkit.attention.streaming.state import (
    Attended,
    SoftmaxState,
    finalize,
    merge,
    merge_all,
    merge_normalized,
    sink,
)

__all__ = ["KVCache", "append", "chunked_prefill", "init_cache", "prefill_chunk", "split_decode"]


class KVCache(NamedTuple):
    """Keys and values read so far, in buffers of fixed size.

    Attributes:
      k: `[*batch, capacity, groups, key_dim]`.
      v: `[*batch, capacity, groups, value_dim]`.
      length: how many are real, int32.
    """

    k: Float[Array, "*batch capacity groups key_dim"]
    v: Float[Array, "*batch capacity groups value_dim"]
    length: Array


def init_cache(
    batch: tuple[int, ...],
    capacity: int,
    groups: int,
    key_dim: int,
    value_dim: int,
    *,
    dtype: DType = jnp.float32,
) -> KVCache:
    """An empty cache.

    Args:
      batch: batch axes.
      capacity: positions there is room for.
      groups: key heads G.
      key_dim: size of a key.
      value_dim: size of a value.
      dtype: of keys and values.

    Returns:
      The cache, of length 0.

    Raises:
      ValueError: a size is below 1.

    Example:
      >>> print(init_cache((2,), 8, 1, 4, 4).k.shape)
      (2, 8, 1, 4)
    """
    sizes = {"capacity": capacity, "groups": groups, "key_dim": key_dim, "value_dim": value_dim}
    capacity, groups, key_dim, value_dim = (
        check_int(name, size, least=1) for name, size in sizes.items()
    )
    return KVCache(
        jnp.zeros((*batch, capacity, groups, key_dim), dtype),
        jnp.zeros((*batch, capacity, groups, value_dim), dtype),
        jnp.zeros((), jnp.int32),
    )


def append(
    cache: KVCache,
    k: Float[Array, "*batch chunk groups key_dim"],
    v: Float[Array, "*batch chunk groups value_dim"],
) -> KVCache:
    """Write a chunk of keys and values behind what is there.

    What would go beyond the capacity is not written in place of older keys: everything that the
    cache holds becomes NaN instead, since the length is not known when the program is made.

    Args:
      cache: the cache.
      k: keys of the next positions.
      v: their values.

    Returns:
      The longer cache.

    Raises:
      ValueError: shapes do not fit, or the chunk alone exceeds the capacity.

    Example:
      >>> import jax.numpy as jnp
      >>> cache = init_cache((), 4, 1, 2, 2)
      >>> cache = append(cache, jnp.ones((3, 1, 2)), jnp.ones((3, 1, 2)))
      >>> print(cache.length, cache.k[:, 0, 0])
      3 [1. 1. 1. 0.]
    """
    capacity, chunk = cache.k.shape[-3], k.shape[-3]
    for name, new, old in (("k", k, cache.k), ("v", v, cache.v)):
        want = (*old.shape[:-3], chunk, *old.shape[-2:])
        if new.shape != want:
            raise ValueError(f"{name} must have shape {want}; got {tuple(new.shape)}.")
    if chunk > capacity:
        raise ValueError(f"k must have at most {capacity} positions, the capacity; got {chunk}.")
    full = cache.length + chunk > capacity

    def write(old: Array, new: Array) -> Array:
        axis = old.ndim - 3
        new = new.astype(old.dtype)
        written = jax.lax.dynamic_update_slice_in_dim(old, new, cache.length, axis)
        return jnp.where(full, jnp.full_like(old, jnp.nan), written)

    return KVCache(write(cache.k, k), write(cache.v, v), cache.length + chunk)


def split_decode(
    q: Float[Array, "*batch heads key_dim"],
    k: Float[Array, "*batch keys groups key_dim"],
    v: Float[Array, "*batch keys groups value_dim"],
    *,
    splits: int = 1,
    kv_length: ArrayLike | None = None,
    window: int | None = None,
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    sinks: Float[Array, "heads"] | None = None,
    scale: Any = None,
    soft_cap: float | None = None,
    out_dtype: DType | None = None,
    precision: Any = None,
) -> Attended:
    """One query for each example over a cache that is read in pieces side by side.

    The keys are cut into `splits` pieces, each gives a state `(m, l, o)`, and one merge joins them:
    the pieces do not wait for one another. A step reads every key and value once for all H / G
    query heads of its group, so that it is bound by memory: about 4 S d flops for 2 S d numbers.

    Args:
      q: the query of the newest position.
      k: keys, the query's own among them.
      v: values.
      splits: pieces; need not divide the number of keys.
      kv_length: how many keys are real, by default all; an integer or one for each example.
        In an array of JAX, more than all counts as all, fewer than none as none.
      window: only the last so many of the real keys.
      mask: true where visible; broadcasts to `[*batch, heads, keys]`.
      bias: added to the scores; broadcasts likewise.
      sinks: a logit for each head that takes part in the softmax with value 0.
      scale: default 1/√key_dim.
      soft_cap: c of `c tanh(s / c)`, applied before the bias.
      out_dtype: of `out`. Default: that of `q`.
      precision: of the matrix products.

    Returns:
      `(out [*batch, heads, value_dim], lse [*batch, heads])`.

    Raises:
      TypeError: an argument has the wrong dtype.
      ValueError: shapes or options do not fit, or `splits` is not from 1 to the number of keys.

    Example:
      >>> import jax.numpy as jnp
      >>> k, v = jnp.zeros((5, 1, 2)), jnp.arange(5.0).reshape(5, 1, 1)
      >>> print(split_decode(jnp.ones((4, 2)), k, v, splits=2, kv_length=4).out[:, 0])
      [1.5 1.5 1.5 1.5]

    Source: Dao et al. 2022 (arXiv 2205.14135) and its decoding form; post 10017 on kexue.fm.
    """
    if q.ndim < 2:
        raise ValueError(f"q must be [*batch, heads, key_dim]; got shape {tuple(q.shape)}.")
    sizes = _options.check_qkv(q[..., None, :, :], k, v)
    splits = check_int("splits", splits, least=1)
    if splits > sizes.keys:
        raise ValueError(f"splits must be at most the {sizes.keys} keys; got {splits}.")
    scale = _options.check_scale(scale, sizes.key_dim)
    length = _options.check_kv_length(kv_length, sizes)
    window = _options.check_window(window, True)
    sinks = _options.check_sinks(sinks, sizes)
    soft_cap = _options.check_soft_cap(soft_cap)
    dtype = _options.work_dtype(q, k, v, bias)
    rows, groups, each = sizes.rows, sizes.groups, sizes.per_group
    queries = (q.astype(dtype) * jnp.asarray(scale, dtype)).reshape(rows, groups, each, -1)
    keys = k.reshape(rows, sizes.keys, groups, sizes.key_dim).astype(dtype)
    values = v.reshape(rows, sizes.keys, groups, sizes.value_dim).astype(dtype)
    place = jnp.arange(sizes.keys, dtype=jnp.int32)[None, :]
    real = None
    if length is not None:
        real = place < length[:, None]
        # What lies behind the length may be anything, NaN too.
        keys = jnp.where(real[..., None, None], keys, jnp.zeros_like(keys))
        values = jnp.where(real[..., None, None], values, jnp.zeros_like(values))
    if window is not None:
        end = jnp.full((1,), sizes.keys, jnp.int32) if length is None else length
        recent = place >= end[:, None] - window
        real = recent if real is None else real & recent
    scores = jnp.einsum("bgrd,bkgd->bgrk", queries, keys, precision=precision)
    scores = _options.cap(scores, soft_cap)
    if bias is not None:
        add = _options.pairwise("bias", jnp.asarray(bias)[..., None, :], sizes, boolean=False)
        assert add is not None
        scores = scores + add[..., 0, :].astype(dtype)
    low = jnp.full_like(scores, -jnp.inf)
    if real is not None:
        scores = jnp.where(real[:, None, None], scores, low)
    if mask is not None:
        seen = _options.pairwise("mask", jnp.asarray(mask)[..., None, :], sizes, boolean=True)
        assert seen is not None
        scores = jnp.where(seen[..., 0, :], scores, low)
    # Pieces: [P, b, g, r, n] scores and [P, b, g, n, dv] values, filled up with hidden keys.
    size = -(-sizes.keys // splits)
    extra = splits * size - sizes.keys
    scores = jnp.pad(scores, [(0, 0)] * 3 + [(0, extra)], constant_values=-jnp.inf)
    values = jnp.pad(values, [(0, 0), (0, extra), (0, 0), (0, 0)])
    pieces = jnp.moveaxis(scores.reshape(rows, groups, each, splits, size), 3, 0)
    parts = values.reshape(rows, splits, size, groups, -1).transpose(1, 0, 3, 2, 4)
    state = merge_all(_tile_states(pieces, parts, precision), axis=0)
    if sinks is not None:
        logits = sinks.astype(dtype).reshape(1, groups, each)
        logits = jnp.broadcast_to(logits, state.m.shape)
        state = merge(state, sink(logits, sizes.value_dim))
    out, lse = finalize(state, dtype=q.dtype if out_dtype is None else out_dtype)
    shape = (*sizes.batch, sizes.heads)
    return Attended(out.reshape(*shape, sizes.value_dim), lse.reshape(shape))


def _tile_states(scores: Array, values: Array, precision: Any) -> SoftmaxState:
    """States of [..., r, n] scores over [..., n, dv] values that the r query heads share."""
    m = jax.lax.stop_gradient(scores.max(-1))
    shift = jnp.where(jnp.isneginf(m), jnp.zeros_like(m), m)
    p = jnp.exp(scores - shift[..., None])
    return SoftmaxState(m, p.sum(-1), jnp.matmul(p, values, precision=precision))


def prefill_chunk(
    cache: KVCache,
    q: Float[Array, "*batch chunk heads key_dim"],
    k: Float[Array, "*batch chunk groups key_dim"],
    v: Float[Array, "*batch chunk groups value_dim"],
    *,
    window: int | None = None,
    scale: Any = None,
    soft_cap: float | None = None,
    block_q: int = 128,
    block_k: int = 256,
    precision: Any = None,
) -> tuple[Attended, KVCache]:
    """The next chunk of a prompt: `merge(attend(cache), attend(own chunk, causal))`.

    Args:
      cache: what was read before.
      q: queries of the chunk.
      k: its keys.
      v: its values.
      window: every query sees only the last so many keys.
      scale: default 1/√key_dim.
      soft_cap: c of `c tanh(s / c)`.
      block_q: queries in a tile.
      block_k: keys in a tile.
      precision: of the matrix products.

    Returns:
      `(out, lse)` of the chunk, and the cache with its keys. Chunks of any lengths one after
      another give what one causal call over all of them gives.

    Raises:
      TypeError: an argument has the wrong dtype.
      ValueError: shapes or options do not fit.

    Example:
      >>> import numpy as np, jax.numpy as jnp
      >>> cache = init_cache((), 4, 1, 1, 1)
      >>> zero, v = jnp.zeros((2, 1, 1)), jnp.asarray([1.0, 3.0]).reshape(2, 1, 1)
      >>> for _ in range(2):
      ...     (out, lse), cache = prefill_chunk(cache, zero, zero, v)
      >>> print(np.asarray(out).ravel().round(3))
      [1.667 2.   ]
    """
    options: dict[str, Any] = {
        "causal": True,
        "window": window,
        "scale": scale,
        "soft_cap": soft_cap,
        "block_q": block_q,
        "block_k": block_k,
        "out_dtype": _options.work_dtype(q, k, v),
        "precision": precision,
    }
    # Every real key of the cache is older than the chunk: only a window hides any.
    before = blockwise_attention(
        q, cache.k, cache.v, offset=cache.length, kv_length=cache.length, **options
    )
    own = blockwise_attention(q, k, v, offset=0, **options)
    out, lse = merge_normalized(before, own)
    return Attended(out.astype(q.dtype), lse), append(cache, k, v)


def chunked_prefill(
    q: Float[Array, "*batch length heads key_dim"],
    k: Float[Array, "*batch length groups key_dim"],
    v: Float[Array, "*batch length groups value_dim"],
    *,
    chunk: int,
    cache: KVCache | None = None,
    window: int | None = None,
    scale: Any = None,
    soft_cap: float | None = None,
    block_q: int = 128,
    block_k: int = 256,
    precision: Any = None,
) -> tuple[Attended, KVCache]:
    """Causal attention over a prompt, `chunk` positions at a time, with the cache it leaves.

    Args:
      q: queries of the prompt.
      k: its keys.
      v: its values.
      chunk: positions taken at once; need not divide the length.
      cache: what was read before, with room for the prompt. Default: an empty one of its length.
      window: every query sees only the last so many keys.
      scale: default 1/√key_dim.
      soft_cap: c of `c tanh(s / c)`.
      block_q: queries in a tile.
      block_k: keys in a tile.
      precision: of the matrix products.

    Returns:
      `(out, lse)` of all positions, and the cache after them.

    Raises:
      TypeError: an argument has the wrong dtype.
      ValueError: shapes or options do not fit, `chunk` is below 1, or the prompt alone exceeds
        the cache's capacity.

    Example:
      >>> import jax.numpy as jnp
      >>> q = k = v = jnp.eye(3)[:, None]
      >>> (out, lse), cache = chunked_prefill(q, k, v, chunk=2)
      >>> whole = blockwise_attention(q, k, v, causal=True)
      >>> print(int(cache.length), bool(abs(out - whole.out).max() < 1e-6))
      3 True
    """
    sizes = _options.check_qkv(q, k, v)
    if sizes.keys != sizes.queries:
        raise ValueError(
            f"k must have the {sizes.queries} positions of q; got shape {tuple(k.shape)}."
        )
    chunk = min(check_int("chunk", chunk, least=1), sizes.queries)
    if cache is None:
        cache = init_cache(
            sizes.batch,
            sizes.keys,
            sizes.groups,
            sizes.key_dim,
            sizes.value_dim,
            dtype=k.dtype,
        )._replace(v=jnp.zeros(v.shape, v.dtype))
    if cache.k.shape[-3] < sizes.keys:
        raise ValueError(
            f"cache must have room for the {sizes.keys} positions of q; "
            f"got a capacity of {cache.k.shape[-3]}."
        )
    options: dict[str, Any] = {
        "window": window,
        "scale": scale,
        "soft_cap": soft_cap,
        "block_q": block_q,
        "block_k": block_k,
        "precision": precision,
    }
    axis = len(sizes.batch)

    def step(cache: Any, part: Any) -> tuple[Any, Attended]:
        result, cache = prefill_chunk(cache, *part, **options)
        return cache, result

    def cut(x: Array, whole: int) -> Array:
        x = jax.lax.slice_in_dim(x, 0, whole * chunk, axis=axis)
        x = x.reshape(*x.shape[:axis], whole, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    # Whole chunks are one scan; what is left over is a shorter one.
    whole = sizes.queries // chunk
    last_cache, results = jax.lax.scan(step, cache, tuple(cut(x, whole) for x in (q, k, v)))
    out, lse = (join(x) for x in results)
    if whole * chunk < sizes.queries:
        rest = tuple(jax.lax.slice_in_dim(x, whole * chunk, None, axis=axis) for x in (q, k, v))
        last_cache, last = step(last_cache, rest)
        out = jnp.concatenate([out, last.out], axis)
        lse = jnp.concatenate([lse, last.lse], axis)
    return Attended(out, lse), last_cache
