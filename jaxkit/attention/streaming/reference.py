"""Attention one key at a time: the post's recurrence, its stable state, and its prefix scan.

Slow on purpose (a step per key and query); what to read beside the paper, and to compare with.

Sources: post 10017; Milakov, Gimelshein 2018 (arXiv 1805.02867); Feng et al. 2024 (2405.13956).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice
from jaxkit._typing import Array, ArrayLike, Bool, DType, Float
from jaxkit.attention.streaming import _options
from jaxkit.attention.streaming.state import (
    Attended,
    SoftmaxState,
    finalize,
    identity,
    merge,
    update,
)

__all__ = [
    "ORDERS",
    "naive_attention",
    "prefix_attention",
    "sequential_attention",
    "sequential_states",
]

ORDERS = ("newest-first", "oldest-first")


def sequential_states(
    scores: Float[Array, "keys *lead"],
    values: Float[Array, "keys *lead dim"],
    *,
    order: str = "oldest-first",
    dtype: DType | None = None,
) -> SoftmaxState:
    """The states of one query after each key that it reads.

    Args:
      scores: s_j by position, −∞ where not visible.
      values: v_j.
      order: "oldest-first" reads position 0 first; "newest-first" the last one, so that an RNN
        meets its own position (and with it the query) at its first step.
      dtype: of the accumulators. Default: float32, or float64 if an argument is.

    Returns:
      All states, step t at index t: the first axis counts steps, not positions.

    Raises:
      ValueError: unknown order, or shapes do not fit.

    Example:
      >>> import numpy as np, jax.numpy as jnp
      >>> states = sequential_states(jnp.asarray([0.0, 2.0, 1.0]), jnp.ones((3, 1)))
      >>> print(states.m, np.asarray(states.l).round(3))
      [0. 2. 2.] [1.    1.135 1.503]

    Source: post 10017 on kexue.fm, made stable.
    """
    check_choice("order", order, ORDERS)
    if values.ndim != scores.ndim + 1 or values.shape[:-1] != scores.shape:
        raise ValueError(
            f"values must be [*{tuple(scores.shape)}, dim]; got shape {tuple(values.shape)}."
        )
    dtype = _options.work_dtype(scores, values) if dtype is None else dtype

    def step(state: SoftmaxState, key: tuple[Array, Array]) -> tuple[SoftmaxState, SoftmaxState]:
        state = update(state, *key)
        return state, state

    start = identity(scores.shape[1:], values.shape[-1], dtype=dtype)
    flip = order == "newest-first"
    keys = (scores[::-1], values[::-1]) if flip else (scores, values)
    return jax.lax.scan(step, start, keys)[1]


def _all_scores(
    q: Array,
    k: Array,
    *,
    causal: bool,
    window: int | None,
    offset: ArrayLike | None,
    mask: Array | None,
    bias: Array | None,
    scale: Any,
    soft_cap: float | None,
    sizes: _options.Sizes,
    dtype: DType,
) -> Array:
    """Scores [b, g, r, T, S]: the whole matrix, −∞ where not visible."""
    scale = _options.check_scale(scale, sizes.key_dim)
    window = _options.check_window(window, causal)
    at = _options.check_offset(offset, causal, sizes)
    shape = (sizes.rows, sizes.queries, sizes.groups, sizes.per_group, sizes.key_dim)
    queries = q.astype(dtype) * jnp.asarray(scale, dtype)
    keys = k.astype(dtype).reshape(sizes.rows, sizes.keys, sizes.groups, sizes.key_dim)
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", queries.reshape(shape), keys)
    scores = _options.cap(scores, _options.check_soft_cap(soft_cap))
    add = _options.pairwise("bias", bias, sizes, boolean=False)
    if add is not None:
        scores = scores + add.astype(dtype)
    seen = _options.pairwise("mask", mask, sizes, boolean=True)
    if at is not None:
        place = jnp.arange(sizes.queries, dtype=jnp.int32)[None, :, None] + at[:, None, None]
        key = jnp.arange(sizes.keys, dtype=jnp.int32)[None, None, :]
        past = key <= place
        if window is not None:
            past = past & (key > place - window)
        past = past[:, None, None]
        seen = past if seen is None else seen & past
    return scores if seen is None else jnp.where(seen, scores, jnp.full_like(scores, -jnp.inf))


def sequential_attention(
    q: Float[Array, "*batch queries heads key_dim"],
    k: Float[Array, "*batch keys groups key_dim"],
    v: Float[Array, "*batch keys groups value_dim"],
    *,
    order: str = "newest-first",
    causal: bool = False,
    window: int | None = None,
    offset: ArrayLike | None = None,
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    scale: Any = None,
    soft_cap: float | None = None,
    dtype: DType | None = None,
) -> Attended:
    """Softmax attention read one key at a time: `S` steps of `update` for every query.

    Newest-first starts at each query's own position `i + offset` if causal, else at the last key.

    Args:
      q: queries.
      k: keys; each of their G heads serves H / G query heads.
      v: values.
      order: "newest-first" or "oldest-first". Both give the same result up to rounding.
      causal: query i sees the keys up to `i + offset`.
      window: with `causal`: only the last so many of these.
      offset: position of the first query among the keys. Default: S − T.
      mask: true where visible; broadcasts to `[*batch, heads, queries, keys]`.
      bias: added to the scores; broadcasts likewise.
      scale: default 1/√key_dim.
      soft_cap: c of `c tanh(s / c)`, applied before the bias.
      dtype: of scores and accumulators. Default: float32, or float64 if an argument is.

    Returns:
      `(out, lse)` as of `blockwise_attention`; `out` in the dtype of `q`.

    Raises:
      TypeError: an argument has the wrong dtype.
      ValueError: shapes or options do not fit.

    Example:
      >>> import numpy as np, jax.numpy as jnp
      >>> q = k = v = jnp.eye(2)[:, None]
      >>> out, lse = sequential_attention(q, k, v, causal=True, scale=1.0)
      >>> print(np.asarray(out[:, 0]).round(3), np.asarray(lse[:, 0]).round(3))
      [[1.    0.   ]
       [0.269 0.731]] [1.    1.313]

    Source: post 10017 on kexue.fm; Milakov, Gimelshein 2018 (arXiv 1805.02867).
    """
    check_choice("order", order, ORDERS)
    sizes = _options.check_qkv(q, k, v)
    dtype = _options.work_dtype(q, k, v, bias) if dtype is None else dtype
    scores = _all_scores(
        q,
        k,
        causal=causal,
        window=window,
        offset=offset,
        mask=mask,
        bias=bias,
        scale=scale,
        soft_cap=soft_cap,
        sizes=sizes,
        dtype=dtype,
    )
    values = v.astype(dtype).reshape(sizes.rows, sizes.keys, sizes.groups, 1, 1, sizes.value_dim)
    places = jnp.arange(sizes.keys, dtype=jnp.int32)
    # The position that each query reads first; what lies beyond the ends is skipped.
    if order == "oldest-first":
        first = jnp.zeros((1, sizes.queries), jnp.int32)
    elif causal:
        at = _options.check_offset(offset, causal, sizes)
        assert at is not None
        first = at[:, None] + jnp.arange(sizes.queries, dtype=jnp.int32)[None, :]
        first = jnp.minimum(first, sizes.keys - 1)
    else:
        first = jnp.full((1, sizes.queries), sizes.keys - 1, jnp.int32)
    turn = 1 if order == "oldest-first" else -1

    def step(state: SoftmaxState, t: Array) -> tuple[SoftmaxState, None]:
        j = first + turn * t  # [b, T]
        real = (j >= 0) & (j < sizes.keys)
        j = jnp.broadcast_to(jnp.clip(j, 0, sizes.keys - 1), (sizes.rows, sizes.queries))
        score = jnp.take_along_axis(scores, j[:, None, None, :, None], axis=-1)[..., 0]
        score = jnp.where(real[:, None, None], score, jnp.full_like(score, -jnp.inf))
        value = jnp.take_along_axis(values, j[:, :, None, None, None, None], axis=1)
        value = jnp.moveaxis(value[:, :, :, :, 0], 1, 3)  # [b, g, 1, T, dv]
        return update(state, score, jnp.broadcast_to(value, state.o.shape)), None

    start = identity(scores.shape[:-1], sizes.value_dim, dtype=dtype)
    state, _ = jax.lax.scan(step, start, places)
    return _restore(finalize(state), sizes, q.dtype)


def _restore(result: Attended, sizes: _options.Sizes, dtype: DType) -> Attended:
    """From [b, g, r, T, ...] to [*batch, T, H, ...]."""
    out = result.out.transpose(0, 3, 1, 2, 4)
    out = out.reshape(*sizes.batch, sizes.queries, sizes.heads, sizes.value_dim)
    lse = result.lse.transpose(0, 3, 1, 2)
    return Attended(out.astype(dtype), lse.reshape(*sizes.batch, sizes.queries, sizes.heads))


def naive_attention(
    q: Float[Array, "*batch queries heads key_dim"],
    k: Float[Array, "*batch keys groups key_dim"],
    v: Float[Array, "*batch keys groups value_dim"],
    *,
    causal: bool = False,
    scale: Any = None,
) -> Float[Array, "*batch queries heads value_dim"]:
    """The post's own recursion `(y, z) ← (y, z) + e^s (v, 1)`, `o = y / z`: for teaching only.

    No maximum is subtracted, and sums are kept in the dtype of `q`: it is NaN from a score of 88.8
    in float32 and bfloat16 and of 11.1 in float16. Use `blockwise_attention`.

    Args:
      q: queries.
      k: keys; each of their G heads serves H / G query heads.
      v: values.
      causal: query i sees the keys up to `i + S − T`.
      scale: default 1/√key_dim; the post has 1.

    Returns:
      Outputs, in the dtype of `q`.

    Raises:
      TypeError: an argument is not real and floating-point.
      ValueError: shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> one = jnp.ones((1, 1, 1))
      >>> for score in (88.0, 89.0):
      ...     print(naive_attention(score * one, one, one, scale=1.0).item())
      1.0
      nan

    Source: post 10017 on kexue.fm.
    """
    sizes = _options.check_qkv(q, k, v)
    scores = _all_scores(
        q,
        k,
        causal=causal,
        window=None,
        offset=None,
        mask=None,
        bias=None,
        scale=scale,
        soft_cap=None,
        sizes=sizes,
        dtype=_options.work_dtype(q, k, v),
    ).astype(q.dtype)
    values = v.astype(q.dtype).reshape(sizes.rows, sizes.keys, sizes.groups, 1, 1, sizes.value_dim)

    def step(sums: tuple[Array, Array], j: Array) -> tuple[tuple[Array, Array], None]:
        y, z = sums
        weight = jnp.exp(jax.lax.dynamic_index_in_dim(scores, j, -1, keepdims=False))
        value = jax.lax.dynamic_index_in_dim(values, j, 1, keepdims=False)
        return (y + weight[..., None] * value, z + weight), None

    shape = scores.shape[:-1]
    start = jnp.zeros((*shape, sizes.value_dim), q.dtype), jnp.zeros(shape, q.dtype)
    newest_first = jnp.arange(sizes.keys - 1, -1, -1, dtype=jnp.int32)
    (y, z), _ = jax.lax.scan(step, start, newest_first)
    return _restore(Attended(y / z[..., None], z), sizes, q.dtype).out


def prefix_attention(
    q: Float[Array, "*batch heads key_dim"],
    k: Float[Array, "*batch keys groups key_dim"],
    v: Float[Array, "*batch keys groups value_dim"],
    *,
    scale: Any = None,
    soft_cap: float | None = None,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    initial: SoftmaxState | None = None,
    reverse: bool = False,
) -> tuple[Attended, SoftmaxState]:
    """One query over every prefix of the keys, by an associative scan (Aaren).

    `out_t = Σ_{j≤t} e^{s_j} v_j / Σ_{j≤t} e^{s_j}` for all t in O(S) work and O(log S) depth: the
    query is fixed (learned, say), so that this is an RNN with a state of constant size.

    Args:
      q: one query for each example.
      k: keys; each of their G heads serves H / G query heads.
      v: values.
      scale: default 1/√key_dim.
      soft_cap: c of `c tanh(s / c)`, applied before the bias.
      bias: added to the scores; broadcasts to `[*batch, heads, keys]`.
      mask: true where visible; broadcasts likewise.
      initial: state of what was read before, with leading axes `[*batch, heads]`.
      reverse: suffixes instead of prefixes.

    Returns:
      `(out [*batch, keys, heads, value_dim], lse [*batch, keys, heads])`, and the state after all
      keys, to go on with.

    Raises:
      TypeError: an argument has the wrong dtype.
      ValueError: shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> k, v = jnp.zeros((4, 1, 1)), jnp.arange(4.0).reshape(4, 1, 1)
      >>> (out, lse), state = prefix_attention(jnp.ones((1, 1)), k, v)
      >>> print(out.ravel(), state.l)
      [0.  0.5 1.  1.5] [4.]

    Source: Feng et al. 2024, *Attention as an RNN* (arXiv 2405.13956).
    """
    if q.ndim < 2:
        raise ValueError(f"q must be [*batch, heads, key_dim]; got shape {tuple(q.shape)}.")
    sizes = _options.check_qkv(q[..., None, :, :], k, v)
    dtype = _options.work_dtype(q, k, v, bias)
    scores = _all_scores(
        q[..., None, :, :],
        k,
        causal=False,
        window=None,
        offset=None,
        mask=None if mask is None else jnp.asarray(mask)[..., None, :],
        bias=None if bias is None else jnp.asarray(bias)[..., None, :],
        scale=scale,
        soft_cap=soft_cap,
        sizes=sizes,
        dtype=dtype,
    )
    # Steps first: [S, *batch, H], [S, *batch, H, dv].
    scores = scores.reshape(*sizes.batch, sizes.heads, sizes.keys)
    scores = jnp.moveaxis(scores, -1, 0)
    values = jnp.repeat(jnp.moveaxis(v.astype(dtype), -3, 0), sizes.per_group, axis=-2)
    # A masked key is the identity: its value takes no part, whatever it is.
    seen = ~jnp.isneginf(scores)
    values = jnp.where(seen[..., None], values, jnp.zeros_like(values))
    states = SoftmaxState(scores, seen.astype(dtype), values)
    states = jax.lax.associative_scan(merge, states, reverse=reverse, axis=0)
    if initial is not None:
        shape = (*sizes.batch, sizes.heads)
        if initial.m.shape != shape or initial.o.shape != (*shape, sizes.value_dim):
            raise ValueError(
                f"initial must have shapes {shape} and {(*shape, sizes.value_dim)}; "
                f"got {initial.m.shape} and {initial.o.shape}."
            )
        before = jax.tree.map(lambda x, like: x[None].astype(like.dtype), initial, states)
        states = merge(before, states)
    last = jax.tree.map(lambda x: x[0 if reverse else -1], states)
    out, lse = finalize(states, dtype=q.dtype)
    at = len(sizes.batch)
    return Attended(jnp.moveaxis(out, 0, at), jnp.moveaxis(lse, 0, at)), last
