"""Exact attention tile by tile: O(T²) time, O(T) memory, and a backward pass that knows lse.

Queries are cut into tiles, and each reads the tiles of keys one after another into one softmax
state. Tiles that no query can see are skipped. The backward pass keeps `out` and `lse` only and
recomputes the probabilities `P = e^{s − lse}`:

    dS = P ∘ (dout vᵀ − D + dlse),   D = ⟨dout, out⟩,   dv = Pᵀ dout,   dq = scale dS k,   …

The dlse term is what makes partial results differentiable after they have been merged.

Sources: Rabe, Staats 2021 (arXiv 2112.05682); Dao et al. 2022 (2205.14135); post 10017.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_int, is_traced
from jaxkit._typing import Array, ArrayLike, Bool, DType, Float, Int
from jaxkit.attention.streaming import _options
from jaxkit.attention.streaming.state import (
    Attended,
    SoftmaxState,
    finalize,
    identity,
    merge,
    sink,
    unfinalize,
)

__all__ = ["blockwise_attention"]


class _Static(NamedTuple):
    """What the compiled program depends on."""

    scale: float
    window: int | None
    soft_cap: float | None
    block_q: int
    block_k: int
    queries: int  # before padding
    keys: int
    precision: Any


class _Fixed(NamedTuple):
    """Arrays that have no gradient; None where an option is not used."""

    mask: Array | None  # [b, g, r, T, S], axes of 1 broadcast
    segments: tuple[Array, Array] | None  # [b, T], [b, S]
    offset: Array | None  # [b]; causal if there is one
    kv_length: Array | None  # [b]


def blockwise_attention(
    q: Float[Array, "*batch queries heads key_dim"],
    k: Float[Array, "*batch keys groups key_dim"],
    v: Float[Array, "*batch keys groups value_dim"],
    *,
    causal: bool = False,
    window: int | None = None,
    offset: ArrayLike | None = None,
    kv_length: ArrayLike | None = None,
    segment_ids: Int[Array, "*batch queries"] | None = None,
    kv_segment_ids: Int[Array, "*batch keys"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    sinks: Float[Array, "heads"] | None = None,
    scale: Any = None,
    soft_cap: float | None = None,
    block_q: int = 128,
    block_k: int = 256,
    custom_backward: bool = True,
    out_dtype: DType | None = None,
    precision: Any = None,
) -> Attended:
    """Exact softmax attention in tiles, with its log-sum-exp; both differentiable.

    `s_ij = scale q_i·k_j` (capped, then + bias), `out_i = Σ_j e^{s_ij} v_j / Σ_j e^{s_ij}` over the
    visible keys, `lse_i = log Σ_j e^{s_ij}`. Time O(T S), memory O(T + S + block_q block_k) per
    head, forward and backward. Scores and sums are float32 (float64 if an argument is).

    A key is visible if all that is given allows it: the causal mask, the window, `kv_length`,
    equal segments, `mask`. A query that sees no key gets out 0, lse −∞ and gradients 0.

    Args:
      q: queries.
      k: keys; each of their G heads serves H / G query heads in a row (G = 1: multi-query).
      v: values.
      causal: query i sees the keys up to `i + offset`.
      window: with `causal`: only the last so many of these, its own position included.
      offset: position of the first query among the keys; an integer, traced or not, or one for
        each example. Default: S − T, the queries are the last positions.
      kv_length: how many keys are real, the rest is padding; an integer or one for each example.
        In an array of JAX, more than all counts as all, fewer than none as none.
      segment_ids: queries see only keys of their own segment.
      kv_segment_ids: segments of the keys. Default: those of the queries, if T = S.
      mask: true where visible; broadcasts to `[*batch, heads, queries, keys]`.
      bias: added to the scores; broadcasts likewise. −∞ hides a key. It has a gradient.
      sinks: a logit for each head that takes part in the softmax with value 0.
      scale: a number or a traced scalar. Default: 1/√key_dim.
      soft_cap: c of `c tanh(s / c)`, applied before the bias.
      block_q: queries in a tile; need not divide T.
      block_k: keys in a tile; need not divide S.
      custom_backward: the backward pass above. Without it JAX differentiates the tiles (each one
        is recomputed): slower, but for forward mode too.
      out_dtype: of `out`. Default: that of `q`. Partial results are better merged in float32.
      precision: of the matrix products, as in `jax.numpy.matmul`.

    Returns:
      `(out [*batch, queries, heads, value_dim], lse [*batch, queries, heads])`; `lse` is float32
      (float64).

    Raises:
      TypeError: an argument has the wrong dtype.
      ValueError: shapes do not fit; heads are no multiple of the key heads; a tile is not
        positive; fewer keys than queries in a causal mask without `offset`.

    Example:
      >>> import numpy as np, jax.numpy as jnp
      >>> q = k = v = jnp.eye(3)[:, None]
      >>> out, lse = blockwise_attention(q, k, v, causal=True, scale=1.0)
      >>> print(np.asarray(out[:, 0]).round(3))
      [[1.    0.    0.   ]
       [0.269 0.731 0.   ]
       [0.212 0.212 0.576]]

    Source: Rabe, Staats 2021 (arXiv 2112.05682); Dao, Fu, Ermon, Rudra, Ré 2022 (2205.14135).
    """
    sizes = _options.check_qkv(q, k, v)
    block_q = min(check_int("block_q", block_q, least=1), sizes.queries)
    block_k = min(check_int("block_k", block_k, least=1), sizes.keys)
    scale = _options.check_scale(scale, sizes.key_dim)
    fixed = _Fixed(
        _options.pairwise("mask", mask, sizes, boolean=True),
        _options.check_segments(segment_ids, kv_segment_ids, sizes),
        _options.check_offset(offset, causal, sizes),
        _options.check_kv_length(kv_length, sizes),
    )
    window = _options.check_window(window, causal)
    bias = _options.pairwise("bias", bias, sizes, boolean=False)
    sinks = _options.check_sinks(sinks, sizes)
    dtype = _options.work_dtype(q, k, v, bias)
    out_dtype = q.dtype if out_dtype is None else out_dtype
    if is_traced(scale):
        q, scale = q.astype(dtype) * scale.astype(dtype), 1.0
    static = _Static(
        float(scale),
        window,
        _options.check_soft_cap(soft_cap),
        block_q,
        block_k,
        sizes.queries,
        sizes.keys,
        precision,
    )
    # [b, T, g, r, d], [b, S, g, d]; zeros fill up the last tiles.
    rows, groups, each = sizes.rows, sizes.groups, sizes.per_group
    queries = q.reshape(rows, sizes.queries, groups, each, sizes.key_dim)
    queries = _pad(queries, 1, block_q)
    keys = _pad(k.reshape(rows, sizes.keys, groups, sizes.key_dim), 1, block_k)
    values = _pad(v.reshape(rows, sizes.keys, groups, sizes.value_dim), 1, block_k)
    bias = _pad_pairs(bias, static)
    fixed = fixed._replace(
        mask=_pad_pairs(fixed.mask, static),
        segments=None
        if fixed.segments is None
        else (_pad(fixed.segments[0], 1, block_q), _pad(fixed.segments[1], 1, block_k)),
    )
    queries, keys, values, bias, fixed = _options.spread_over_devices(
        queries, keys, values, bias, fixed
    )
    attend = _attend if custom_backward else _forward
    out, lse = attend(static, dtype, queries, keys, values, bias, fixed)
    out = out[:, : sizes.queries].reshape(*sizes.batch, sizes.queries, sizes.heads, -1)
    lse = lse[:, : sizes.queries].reshape(*sizes.batch, sizes.queries, sizes.heads)
    if sinks is not None:
        extra = jnp.broadcast_to(sinks.astype(dtype), lse.shape)
        out, lse = finalize(merge(unfinalize(Attended(out, lse)), sink(extra, sizes.value_dim)))
    return Attended(out.astype(out_dtype), lse)


def _pad(x: Array, axis: int, block: int) -> Array:
    short = -x.shape[axis] % block
    if not short:
        return x
    return jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)])


def _pad_pairs(x: Array | None, static: _Static) -> Array | None:
    if x is None:
        return None
    if x.shape[-2] != 1:
        x = _pad(x, 3, static.block_q)
    return x if x.shape[-1] == 1 else _pad(x, 4, static.block_k)


def _cut(x: Array, axis: int, index: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _cut_pairs(x: Array | None, i: Array, j: Array, static: _Static) -> Array | None:
    if x is None:
        return None
    if x.shape[-2] != 1:
        x = _cut(x, 3, i, static.block_q)
    return x if x.shape[-1] == 1 else _cut(x, 4, j, static.block_k)


class _Tile(NamedTuple):
    """One tile of queries against one of keys."""

    scores: Array  # [b, g, r, q, k], −∞ where not visible
    slope: Array | None  # of the soft cap
    k: Array  # [b, g, k, d]
    v: Array


def _query_tile(static: _Static, dtype: Any, q: Array, i: Array) -> Array:
    """Scaled queries [b, g, r, q, d] of tile i."""
    tile = _cut(q, 1, i, static.block_q).astype(dtype) * static.scale
    return tile.transpose(0, 2, 3, 1, 4)


def _tile(
    static: _Static,
    q: Array,
    keys: Array,
    values: Array,
    bias: Array | None,
    fixed: _Fixed,
    i: Array,
    j: Array,
) -> _Tile:
    k = _cut(keys, 1, j, static.block_k).astype(q.dtype).transpose(0, 2, 1, 3)
    v = _cut(values, 1, j, static.block_k).astype(q.dtype).transpose(0, 2, 1, 3)
    place_k = j * static.block_k + jnp.arange(static.block_k, dtype=jnp.int32)
    if fixed.kv_length is not None:
        # What lies behind the length may be anything, NaN too.
        real = place_k[None, :] < fixed.kv_length[:, None]
        real = real[:, None, :, None]
        k, v = jnp.where(real, k, jnp.zeros_like(k)), jnp.where(real, v, jnp.zeros_like(v))
    scores = jnp.einsum("bgrqd,bgkd->bgrqk", q, k, precision=static.precision)
    slope = None
    if static.soft_cap is not None:
        scores = _options.cap(scores, static.soft_cap)
        slope = 1 - (scores / static.soft_cap) ** 2
    add = _cut_pairs(bias, i, j, static)
    if add is not None:
        scores = scores + add.astype(q.dtype)
    seen = _visible(static, fixed, i, j)
    if seen is not None:
        scores = jnp.where(seen, scores, jnp.full_like(scores, -jnp.inf))
    return _Tile(scores, slope, k, v)


def _visible(static: _Static, fixed: _Fixed, i: Array, j: Array) -> Array | None:
    """Which pairs of a tile are visible: [b, g, r, q, k] with axes of 1, or None for all."""
    place_q = i * static.block_q + jnp.arange(static.block_q, dtype=jnp.int32)
    place_k = j * static.block_k + jnp.arange(static.block_k, dtype=jnp.int32)
    seen: list[Array] = []  # each [b, q, k] with axes of 1
    if static.keys % static.block_k:
        seen.append((place_k < static.keys)[None, None, :])
    if fixed.kv_length is not None:
        seen.append((place_k[None, :] < fixed.kv_length[:, None])[:, None, :])
    if fixed.offset is not None:
        at = (place_q[None, :] + fixed.offset[:, None])[:, :, None]
        seen.append(place_k[None, None, :] <= at)
        if static.window is not None:
            seen.append(place_k[None, None, :] > at - static.window)
    if fixed.segments is not None:
        ids = _cut(fixed.segments[0], 1, i, static.block_q)
        kv_ids = _cut(fixed.segments[1], 1, j, static.block_k)
        seen.append(ids[:, :, None] == kv_ids[:, None, :])
    parts = [part[:, None, None] for part in seen]
    mask = _cut_pairs(fixed.mask, i, j, static)
    parts += [] if mask is None else [mask]
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part
    return whole


def _touched(static: _Static, fixed: _Fixed, i: Array, j: Array) -> Array | None:
    """Whether positions let any pair of the tile be visible; None if they always do."""
    conditions = []
    first_k, last_k = j * static.block_k, (j + 1) * static.block_k - 1
    if fixed.offset is not None:
        first_q = i * static.block_q
        last_q = jnp.minimum(first_q + static.block_q, static.queries) - 1
        conditions.append(first_k <= last_q + fixed.offset)
        if static.window is not None:
            conditions.append(last_k > first_q + fixed.offset - static.window)
    if fixed.kv_length is not None:
        conditions.append(first_k < fixed.kv_length)
    if not conditions:
        return None
    whole = conditions[0]
    for condition in conditions[1:]:
        whole = whole & condition
    return whole.any()


def _counts(static: _Static, q: Array, k: Array) -> tuple[Array, Array]:
    queries = jnp.arange(q.shape[1] // static.block_q, dtype=jnp.int32)
    return queries, jnp.arange(k.shape[1] // static.block_k, dtype=jnp.int32)


def _forward(
    static: _Static,
    dtype: Any,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    fixed: _Fixed,
) -> tuple[Array, Array]:
    """out [b, T, g, r, dv] and lse [b, T, g, r], of padded length."""
    tiles_q, tiles_k = _counts(static, q, k)
    rows, _, groups, each, _ = q.shape

    def query_tile(i: Array) -> Attended:
        q_tile = _query_tile(static, dtype, q, i)

        def read(state: SoftmaxState, j: Array) -> SoftmaxState:
            scores, _, _, values = _tile(static, q_tile, k, v, bias, fixed, i, j)
            m = jax.lax.stop_gradient(scores.max(-1))
            shift = jnp.where(jnp.isneginf(m), jnp.zeros_like(m), m)
            p = jnp.exp(scores - shift[..., None])
            o = jnp.einsum("bgrqk,bgkd->bgrqd", p, values, precision=static.precision)
            return merge(state, SoftmaxState(m, p.sum(-1), o))

        @jax.checkpoint
        def key_tile(state: SoftmaxState, j: Array) -> tuple[SoftmaxState, None]:
            touched = _touched(static, fixed, i, j)
            if touched is None:
                return read(state, j), None
            return jax.lax.cond(touched, read, lambda state, _: state, state, j), None

        empty = identity((rows, groups, each, static.block_q), v.shape[-1], dtype=dtype)
        _, empty = _options.spread_over_devices(q_tile, empty)
        state, _ = jax.lax.scan(key_tile, empty, tiles_k)
        return finalize(state)

    out, lse = jax.lax.map(query_tile, tiles_q)
    out = out.transpose(1, 0, 4, 2, 3, 5)  # [n, b, g, r, q, d] to [b, n, q, g, r, d]
    lse = lse.transpose(1, 0, 4, 2, 3)
    length = q.shape[1]
    return out.reshape(rows, length, *out.shape[3:]), lse.reshape(rows, length, *lse.shape[3:])


_attend = partial(jax.custom_vjp, nondiff_argnums=(0, 1))(_forward)


def _attend_forward(static, dtype, q, k, v, bias, fixed):
    out, lse = _forward(static, dtype, q, k, v, bias, fixed)
    return (out, lse), (q, k, v, bias, fixed, out, lse)


def _attend_backward(static, dtype, saved, cotangents):
    q, k, v, bias, fixed, out, lse = saved
    dout, dlse = cotangents
    tiles_q, tiles_k = _counts(static, q, k)
    # dlse − D in one number a query; rows that saw nothing have no gradient.
    empty = jnp.isneginf(lse)
    extra = jnp.where(empty, jnp.zeros_like(dlse), dlse) - (dout * out).sum(-1)
    safe = jnp.where(empty, jnp.zeros_like(lse), lse)

    def heads_first(x: Array, i: Array) -> Array:  # [b, T, g, r, ...] to [b, g, r, q, ...]
        return jnp.moveaxis(_cut(x, 1, i, static.block_q), 1, 3)

    def query_tile(carry, i):
        q_tile = _query_tile(static, dtype, q, i)
        tile_dout, tile_extra, tile_lse = (heads_first(x, i) for x in (dout, extra, safe))

        def pair(i, j):
            """Gradients of one tile of scores."""
            scores, slope, keys, values = _tile(static, q_tile, k, v, bias, fixed, i, j)
            p = jnp.exp(scores - tile_lse[..., None])
            product = partial(jnp.einsum, precision=static.precision)
            dp = product("bgrqd,bgkd->bgrqk", tile_dout, values)
            ds = p * (dp + tile_extra[..., None])
            add = _cut_pairs(bias, i, j, static)
            dbias = None if add is None else _sum_to(ds, add.shape)
            if slope is not None:
                ds = ds * slope
            return (
                product("bgrqk,bgkd->bgrqd", ds, keys),
                product("bgrqk,bgrqd->bkgd", ds, q_tile),
                product("bgrqk,bgrqd->bkgd", p, tile_dout),
                dbias,
            )

        def nothing(i, j):
            shapes = jax.eval_shape(pair, i, j)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return _options.spread_over_devices(q_tile, zeros)[1]

        @jax.checkpoint
        def key_tile(carry, j):
            dq, dk, dv, dbias = carry
            touched = _touched(static, fixed, i, j)
            if touched is None:
                more = pair(i, j)
            else:
                more = jax.lax.cond(touched, pair, nothing, i, j)
            dk = _add(dk, more[1], (0, j * static.block_k, 0, 0))
            dv = _add(dv, more[2], (0, j * static.block_k, 0, 0))
            if dbias is not None:
                start_q = i * static.block_q if dbias.shape[-2] != 1 else 0
                start_k = j * static.block_k if dbias.shape[-1] != 1 else 0
                dbias = _add(dbias, more[3], (0, 0, 0, start_q, start_k))
            return (dq + more[0], dk, dv, dbias), None

        (dq, *carry), _ = jax.lax.scan(key_tile, (jnp.zeros_like(q_tile), *carry), tiles_k)
        return tuple(carry), dq * static.scale

    zeros = tuple(None if x is None else jnp.zeros(x.shape, dtype) for x in (k, v, bias))
    zeros = _options.spread_over_devices(q, zeros)[1]
    (dk, dv, dbias), dq = jax.lax.scan(query_tile, zeros, tiles_q)
    dq = dq.transpose(1, 0, 4, 2, 3, 5).reshape(q.shape).astype(q.dtype)
    if dbias is not None:
        dbias = dbias.astype(bias.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


def _add(whole: Array, part: Array, start: tuple[Any, ...]) -> Array:
    start = tuple(jnp.asarray(at, jnp.int32) for at in start)
    old = jax.lax.dynamic_slice(whole, start, part.shape)
    return jax.lax.dynamic_update_slice(whole, old + part, start)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    axes = tuple(a for a, size in enumerate(shape) if size == 1 and x.shape[a] != 1)
    return x.sum(axes, keepdims=True)


_attend.defvjp(_attend_forward, _attend_backward)
