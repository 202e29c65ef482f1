"""The block form: recent keys one by one, older ones as a count and a mean for each code."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxkit_kernels as kernels

from jaxkit._checks import check_choice, check_int
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Bool, Float, Int
from jaxkit.attention.vq._operands import (
    HIGHEST,
    MASKED,
    check_bias,
    check_mask,
    finite_rows,
    nan_where,
    sizes,
)
from jaxkit.attention.vq.biases import rotate
from jaxkit.attention.vq.codes import quantize_keys

__all__ = ["LOCALS", "REDUCTIONS", "Cache", "merge", "reduce_blocks", "summarize", "vq_attention"]

REDUCTIONS = ("serial", "assoc_scan", "matmul", "sum")
LOCALS = ("blocks", "window")
# Blocks of one step of the block recurrence.
_STEP = 4


class Cache(NamedTuple):
    """All that attention needs of old tokens. Means and not sums, which lose precision.

    Attributes:
      means: μ, mean value of the tokens with a code, `[..., codes, value_dim]`, float32 at least;
        0 where there are none.
      counts: N, how many there are, `[..., codes]`; int32 (float32 for soft codes): adding 1 in
        bfloat16 stalls at 256.
    """

    means: Array
    counts: Array


def summarize(
    codes: Int[Array, "*batch length"],
    v: Float[Array, "*batch length value_dim"],
    num_codes: int,
) -> Cache:
    """N_s = #{z_j = s} and μ_s = mean of their values, as a one-hot product.

    Args:
      codes: z; the sentinel S counts nowhere. S + 1, a key that is not finite, could be any code:
        it counts everywhere, with NaN for its value.
      v: Values.
      num_codes: S.

    Returns:
      The cache of these tokens.

    Example:
      >>> import jax.numpy as jnp
      >>> cache = summarize(jnp.asarray([0, 2, 0]), jnp.asarray([[1.0], [5.0], [2.0]]), 3)
      >>> cache.means.ravel().tolist(), cache.counts.tolist()
      ([1.5, 0.0, 5.0], [2, 0, 1])
    """
    dtype = wide(v.dtype)
    index = jnp.arange(num_codes, dtype=codes.dtype).reshape((1,) * codes.ndim + (-1,))
    lost = (codes > num_codes)[..., None]
    one_hot = (codes[..., None] == index) | lost
    v = jnp.where(lost, jnp.full((), jnp.nan, v.dtype), v)
    counts = jnp.sum(one_hot, axis=-2, dtype=jnp.int32)
    share = one_hot.astype(dtype) / jnp.maximum(counts, 1).astype(dtype)[..., None, :]
    means = jnp.einsum("...ts,...td->...sd", share, v.astype(dtype), precision=HIGHEST)
    return Cache(means, counts)


def merge(a: Cache, b: Cache) -> Cache:
    """The cache of the tokens of both: counts add, means by their shares. 0/0 is 0.

    Associative and commutative, for `jax.lax.associative_scan`.

    Example:
      >>> import jax.numpy as jnp
      >>> a = Cache(jnp.asarray([[1.0], [7.0]]), jnp.asarray([1, 0]))
      >>> b = Cache(jnp.asarray([[4.0], [0.0]]), jnp.asarray([2, 0]))
      >>> merge(a, b).means.ravel().tolist()
      [3.0, 7.0]
    """
    counts = a.counts + b.counts
    share = _ratio(b.counts, counts, a.means.dtype)[..., None]
    return Cache(a.means + share * (b.means - a.means), counts)


def _ratio(part: Array, whole: Array, dtype: Any) -> Array:
    """part / whole, 0 where the whole is 0; counts may be fractions below 1."""
    some = whole > 0
    safe = jnp.where(some, whole, jnp.ones_like(whole)).astype(dtype)
    return jnp.where(some, part.astype(dtype) / safe, jnp.zeros((), dtype))


def reduce_blocks(blocks: Cache, *, reduction: str = "assoc_scan") -> Cache:
    """The cache of blocks 0 … r for every r, along the axis of blocks.

    - `serial`: a scan over blocks (in `vq_attention`, of the attention with it);
    - `assoc_scan`: a parallel scan, depth log R;
    - `matmul`: F[s, r, b] = n_b[s] / Σ_{b ≤ r} n_b[s] times the means, S R² fractions;
    - `sum`: running sums and one division; fastest, least accurate where values are large.

    Args:
      blocks: Caches of single blocks: means `[..., blocks, codes, value_dim]`, counts
        `[..., blocks, codes]`.
      reduction: One of the four.

    Returns:
      Caches of the same shape.

    Raises:
      ValueError: If `reduction` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> blocks = Cache(
      ...     jnp.asarray([1.0, 4.0, 6.0]).reshape(3, 1, 1), jnp.asarray([[1], [2], [3]])
      ... )
      >>> for reduction in REDUCTIONS:
      ...     print(reduce_blocks(blocks, reduction=reduction).means.ravel().tolist())
      [1.0, 3.0, 4.5]
      [1.0, 3.0, 4.5]
      [1.0, 3.0, 4.5]
      [1.0, 3.0, 4.5]

    Source: Lingle 2023 (arXiv 2309.16354, app. B).
    """
    check_choice("reduction", reduction, REDUCTIONS)
    means, counts = blocks
    axis = means.ndim - 3
    if reduction == "assoc_scan":
        return jax.lax.associative_scan(merge, blocks, axis=axis)
    if reduction == "serial":
        first = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), blocks)

        def body(cache: Cache, block: Cache) -> tuple[Cache, Cache]:
            cache = merge(cache, block)
            return cache, cache

        empty = jax.tree.map(lambda x: jnp.zeros_like(x[0]), first)
        _, every = jax.lax.scan(body, empty, first)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), every)
    total = jnp.cumsum(counts, axis=axis, dtype=counts.dtype)
    if reduction == "sum":
        sums = jnp.cumsum(means * counts.astype(means.dtype)[..., None], axis=axis)
        return Cache(sums * _ratio(jnp.ones_like(total), total, means.dtype)[..., None], total)
    size = counts.shape[axis]
    past = jnp.tril(jnp.ones((size, size), bool)).reshape((1,) * axis + (size, size, 1))
    # [..., r, b, s]
    fraction = _ratio(counts[..., None, :, :], total[..., :, None, :], means.dtype)
    fraction = jnp.where(past, fraction, jnp.zeros_like(fraction))
    # NaN times 0 is NaN: what is not finite in a block must not reach the blocks before it.
    usable = finite_rows(means)
    means = jnp.where(usable[..., None], means, jnp.zeros_like(means))
    out = jnp.einsum("...rbs,...bsd->...rsd", fraction, means, precision=HIGHEST)
    spoiled = jax.lax.cummax((~usable).astype(jnp.int32), axis=axis) > 0
    return Cache(out + nan_where(spoiled, out.dtype)[..., None], total)


def before_window(blocks: Cache, start: Cache, *, reduction: str) -> Cache:
    """What the queries of block r find in the cache: `start` and the blocks 0 … r − 2."""
    axis = blocks.means.ndim - 3
    count = blocks.means.shape[axis]
    older = jax.tree.map(
        lambda first, x: jnp.concatenate(
            [
                jnp.expand_dims(first, axis).astype(x.dtype),
                jax.lax.slice_in_dim(x, 0, max(count - 2, 0), axis=axis),
            ],
            axis=axis,
        ),
        start,
        blocks,
    )
    every = reduce_blocks(older, reduction=reduction)
    return jax.tree.map(
        lambda x: jax.lax.slice_in_dim(
            jnp.concatenate([jax.lax.slice_in_dim(x, 0, 1, axis=axis), x], axis=axis),
            0,
            count,
            axis=axis,
        ),
        every,
    )


def vq_attention(
    q: Float[Array, "batch heads length key_dim"],
    k: Float[Array, "batch groups length key_dim"],
    v: Float[Array, "batch groups length value_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    block_length: int,
    bias: Float[Array, "..."] | None = None,
    window: int | None = None,
    codes: Int[Array, "batch groups length"] | None = None,
    mask: Bool[Array, "batch length"] | None = None,
    scale: float | None = None,
    rotary_base: float | None = None,
    reduction: str = "assoc_scan",
    cache: bool = True,
    local: str = "blocks",
    grad_through_cache: bool = True,
    pad: bool = True,
    implementation: Any = "auto",
) -> Float[Array, "batch heads length value_dim"]:
    r"""Causal softmax attention over quantised keys, exactly, in time linear in the length.

    Queries of block r see the keys of the blocks r − 1 and r one by one, and all older ones as
    attention over codes: keys C, values μ, bias log N,

    $$ o_i = \frac{\sum_j e^{s_{ij}} v_j + \sum_s e^{q_i C_s + \log N_r[s]} \mu_r[s]}
                  {\sum_j e^{s_{ij}} + \sum_s e^{q_i C_s + \log N_r[s]}}. $$

    Equal to `quadratic_attention` for every block length ≥ the window. The gradient is that of the
    quadratic form where k̂ is straight-through in the two recent blocks and constant beyond
    (`quadratic_attention(block_length=...)`). Per token and group (S + 2 L)(dk + dv) products for
    scores and values, S dk for the codes and S dv for the cache. A key or a value that is not
    finite makes NaN of the outputs that see it, and of no others.

    The reductions over blocks other than `serial` hold a cache for each of the R blocks, R S dv
    numbers. `serial` is the recurrence of the whole layer: it carries one cache through a scan
    over blocks, and its gradient keeps some √R of them and runs the scan again.

    Args:
      q: Queries; head h reads group ⌊h G/H⌋. Scaled, and holding u if the score has (q + u) · k̂.
      k: Keys, not quantised yet.
      v: Values.
      codebook: C; no gradient.
      block_length: L.
      bias: `[heads, window + 1]` or `[batch, heads, length, window + 1]`, by lag (`xl_bias`).
      window: W ≤ L: `bias` and rotation reach that far. By default what `bias` says, or L.
      codes: z, if known; the number of codes marks padding.
      mask: True where a position counts. A query that sees nothing gives zeros.
      scale: Multiplies q.
      rotary_base: Rotate by min(i − j, W) (ReRoPE), with frequencies of this base.
      reduction: Over blocks: `serial` (least memory), `assoc_scan`, `matmul` or `sum`; see
        `reduce_blocks`.
      cache: False drops what is older than the blocks r − 1 and r.
      local: Without the cache: `blocks`, or `window` to drop also the lags beyond W.
      grad_through_cache: False stops the gradient to v through μ.
      pad: False refuses a length that L does not divide.
      implementation: Of the kernel; see `jaxkit_kernels.vq_attention`. The Pallas kernels have no
        rotation and no strict window.

    Returns:
      The outputs, in the dtype of `v`.

    Raises:
      TypeError: If dtypes do not fit or `codes` are no integers.
      ValueError: If shapes do not fit, `window` > L, or a name is unknown.
      NotImplementedError: If the implementation named does not take these arguments.

    Example:
      >>> import jax
      >>> from jaxkit.attention.vq import quadratic_attention
      >>> key = jax.random.key(0)
      >>> q, k, v = jax.random.normal(key, (3, 1, 2, 10, 4))
      >>> codebook = jax.random.normal(key, (2, 8, 4))
      >>> out = vq_attention(q, k, v, codebook, block_length=3)
      >>> bool(abs(out - quadratic_attention(q, k, v, codebook)).max() < 1e-5)
      True

    Source: Lingle 2023 (arXiv 2309.16354); post 9844.
    """
    size = sizes(q, k, v, codebook)
    block_length = check_int("block_length", block_length, least=1)
    window = resolve_window(bias, q, window, block_length)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("local", local, LOCALS)
    if mask is not None:
        check_mask(mask, (size.batch, size.length))
    if size.length % block_length and not pad:
        raise ValueError(
            f"q must have a length that block_length = {block_length} divides with pad=False; "
            f"got {size.length}."
        )
    if scale is not None:
        q = q * jnp.asarray(scale, q.dtype)
    keys, codes, valid = quantize_keys(k, codebook, codes=codes, mask=mask)
    return attend(
        q,
        keys,
        codes,
        v,
        valid,
        codebook,
        bias,
        start=None,
        block_length=block_length,
        window=window,
        rotary_base=rotary_base,
        reduction=reduction,
        cache=cache,
        local=local,
        grad_through_cache=grad_through_cache,
        implementation=implementation,
    )


def resolve_window(bias: Any, q: Any, window: int | None, block_length: int) -> int:
    """W as given, or as the bias says, or L; at most L."""
    window = check_bias(bias, q, window)
    window = block_length if window is None else window
    if window > block_length:
        raise ValueError(
            f"window must be at most block_length = {block_length}: older lags have no bias of "
            f"their own; got {window}."
        )
    return window


def attend(
    q: Array,
    keys: Array,
    codes: Array,
    v: Array,
    valid: Array,
    codebook: Array,
    bias: Array | None,
    *,
    start: Cache | None,
    block_length: int,
    window: int,
    rotary_base: float | None,
    reduction: str,
    cache: bool,
    local: str,
    grad_through_cache: bool,
    implementation: Any,
) -> Array:
    """The block form on quantised keys, with a cache of what came before the first block."""
    length, num_codes = q.shape[2], codebook.shape[1]
    codebook = jax.lax.stop_gradient(codebook).astype(q.dtype)
    # Whatever stands in the padding, NaN included, goes nowhere.
    v = jnp.where(valid[:, None, :, None], v, jnp.zeros_like(v))
    rows = None if bias is None or bias.ndim == 2 else bias

    def of_blocks(q: Array, rows: Array | None, kept: _Tokens, older: Cache) -> Array:
        table_or_rows = bias if rows is None else rows
        common: dict[str, Any] = {"block_length": block_length, "window": window}
        operands = (q, kept.keys, kept.v, codebook if cache else codebook[:, :1])
        strict = not cache and local == "window"
        if rotary_base is None and not strict:
            return kernels.vq_attention(
                *operands,
                *older,
                table_or_rows,
                valid=kept.valid,
                implementation=implementation,
                **common,
            )
        if implementation in ("pallas_tpu", "pallas_gpu"):
            what = "rotary_base" if rotary_base is not None else "local='window'"
            raise NotImplementedError(f"{implementation} has no kernel for {what}.")
        return _attend_blocks(
            *operands,
            older,
            table_or_rows,
            kept.valid,
            rotary_base=rotary_base,
            strict=strict,
            **common,
        )

    def of_each(kept: _Tokens) -> Cache:
        """The cache of every block by itself."""
        split = (*kept.codes.shape[:2], -1, block_length)
        v = kept.v if grad_through_cache else jax.lax.stop_gradient(kept.v)
        return summarize(kept.codes.reshape(split), v.reshape(*split, v.shape[-1]), num_codes)

    kept = _Tokens(keys, codes, v, valid)
    step = _STEP * block_length
    if cache and reduction == "serial" and length > step:
        return _in_series(q, rows, kept, start, of_blocks, of_each, num_codes, step, block_length)
    q, rows, kept = _padded(q, rows, kept, num_codes, block_length)
    if cache:
        blocks = of_each(kept)
        start = (
            jax.tree.map(lambda x: jnp.zeros_like(x[:, :, 0]), blocks) if start is None else start
        )
        older = before_window(blocks, start, reduction=reduction)
    else:
        # One code that nothing carries.
        shape = (*codes.shape[:2], kept.codes.shape[2] // block_length, 1)
        older = Cache(jnp.zeros((*shape, v.shape[-1]), wide(v.dtype)), jnp.zeros(shape, jnp.int32))
    return of_blocks(q, rows, kept, older)[:, :, :length]


class _Tokens(NamedTuple):
    """What is kept of a stretch of tokens: valid `[batch, length]`, the others after it."""

    keys: Array
    codes: Array
    v: Array
    valid: Array


def _in_series(
    q: Array,
    rows: Array | None,
    kept: _Tokens,
    start: Cache | None,
    of_blocks: Any,
    of_each: Any,
    num_codes: int,
    step: int,
    block_length: int,
) -> Array:
    """The recurrence over steps of some blocks, carrying one cache and the last block.

    The gradient keeps the carry of every √-th step, and of the steps between two of those while it
    runs them again.
    """
    length = q.shape[2]
    steps = -(-length // step)
    root = math.isqrt(steps)
    outer = min(range((root + 1) // 2, root + 1), key=lambda n: (-steps % n, -n))
    q, rows, kept = _padded(q, rows, kept, num_codes, step * outer)

    def split(x: Array) -> Array:
        """[batch, heads, length, …] -> [outer, inner, batch, heads, step, …]."""
        x = x.reshape(*x.shape[:2], outer, -1, step, *x.shape[3:])
        return jnp.moveaxis(x, (2, 3), (0, 1))

    def body(carry: tuple[Cache, _Tokens], now: Any) -> Any:
        first, last = carry
        q, rows, own = now
        both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), last, own)
        blocks = of_each(both)
        chain = jax.tree.map(
            lambda first, x: jnp.concatenate([first[:, :, None], x[:, :, :-1]], axis=2),
            first,
            blocks,
        )
        chain = reduce_blocks(chain, reduction="serial")
        older = jax.tree.map(lambda x: jnp.concatenate([x[:, :, :1], x[:, :, :-1]], axis=2), chain)
        # The last block has no queries any more; it is there to be seen.
        behind = lambda x: jnp.pad(x, ((0, 0), (0, 0), (block_length, 0), (0, 0)))
        out = of_blocks(
            behind(q),
            None if rows is None else behind(rows),
            both._replace(valid=both.valid[:, 0]),
            older,
        )
        after = jax.tree.map(lambda x: x[:, :, -1], chain)
        last = jax.tree.map(lambda x: x[:, :, -block_length:], both)
        return (after, last), out[:, :, block_length:]

    kept = kept._replace(valid=kept.valid[:, None])
    last = jax.tree.map(lambda x: jnp.zeros_like(x[:, :, :block_length]), kept)
    last = last._replace(codes=jnp.full_like(last.codes, num_codes))
    empty = jax.tree.map(lambda x: jnp.zeros_like(x[:, :, 0]), of_each(last))
    start = jax.tree.map(lambda x, like: x.astype(like.dtype), start or empty, empty)
    again = partial(jax.checkpoint, prevent_cse=False)
    inner = again(lambda carry, xs: jax.lax.scan(again(body), carry, xs))
    _, out = jax.lax.scan(inner, (start, last), jax.tree.map(split, (q, rows, kept)))
    out = jnp.moveaxis(out, (0, 1), (2, 3))
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :length]


def _padded(
    q: Array, rows: Array | None, kept: _Tokens, num_codes: int, multiple: int
) -> tuple[Array, Array | None, _Tokens]:
    """All of them padded behind to a multiple, by tokens that are not valid."""
    extra = -q.shape[2] % multiple

    def pad(x: Array, axis: int = 2, fill: int = 0) -> Array:
        widths = [(0, extra if at == axis else 0) for at in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=fill) if extra else x

    keys, codes, v, valid = kept
    kept = _Tokens(pad(keys), pad(codes, fill=num_codes), pad(v), pad(valid, axis=1))
    return pad(q), None if rows is None else pad(rows), kept


def _attend_blocks(
    q: Array,
    keys: Array,
    v: Array,
    codebook: Array,
    cache: Cache,
    bias: Array | None,
    valid: Array,
    *,
    block_length: int,
    window: int,
    rotary_base: float | None,
    strict: bool,
) -> Array:
    """In plain JAX, with rotation and with a strict window, which the kernel has not."""
    batch, heads, time, width = q.shape
    groups, blocks = keys.shape[1], time // block_length
    dtype = wide(q.dtype)
    own = jnp.arange(block_length)
    # Within a window of two blocks, so that angles stay small however long the sequence is.
    lag = block_length + own[:, None] - jnp.arange(2 * block_length)[None, :]

    # What is not finite must not meet a weight of zero.
    usable = finite_rows(keys, v)
    keys, v = (jnp.where(usable[..., None], x, jnp.zeros_like(x)) for x in (keys, v))

    def two_blocks(x: Array) -> Array:
        x = x.reshape(*x.shape[:2], blocks, block_length, *x.shape[3:])
        before = jnp.concatenate([jnp.zeros_like(x[:, :, :1]), x[:, :, :-1]], axis=2)
        return jnp.concatenate([before, x], axis=3)

    q = q.astype(dtype).reshape(batch, groups, heads // groups, blocks, block_length, width)
    keys, values = two_blocks(keys.astype(dtype)), two_blocks(v.astype(dtype))
    near = partial(jnp.einsum, "bgprid,bgrjd->bgprij", precision=HIGHEST)
    far_q = q if rotary_base is None else rotate(q, jnp.asarray(window), base=rotary_base)
    recent = near(far_q, keys)
    if rotary_base is not None:
        turned = (
            rotate(q, own + block_length, base=rotary_base),
            rotate(keys, jnp.arange(2 * block_length), base=rotary_base),
        )
        recent = jnp.where(_whole(lag <= window), near(*turned), recent)
    cached = jnp.einsum("bgprid,gsd->bgpris", far_q, codebook.astype(dtype), precision=HIGHEST)

    if bias is not None:
        at = jnp.clip(lag, 0, window)
        if bias.ndim == 2:
            by_lag = bias.astype(dtype)[:, at][None, :, None]
        else:
            rows = bias.astype(dtype).reshape(batch, heads, blocks, block_length, window + 1)
            by_lag = jnp.take_along_axis(rows, at[None, None, None], axis=-1)
        by_lag = jnp.where((lag <= window)[None, None, None], by_lag, jnp.zeros((), dtype))
        whole = (batch, heads, blocks, block_length, 2 * block_length)
        recent = recent + jnp.broadcast_to(by_lag, whole).reshape(recent.shape)

    seen = (lag >= 0) & (lag <= window) if strict else lag >= 0
    visible = _whole(seen) & two_blocks(valid[:, None])[:, :, None, :, None]
    some = cache.counts > 0
    log_counts = jnp.log(jnp.where(some, cache.counts, jnp.ones_like(cache.counts)).astype(dtype))
    cached = cached + log_counts[:, :, None, :, None]
    both = jnp.concatenate(
        [
            jnp.broadcast_to(visible, recent.shape),
            jnp.broadcast_to(some[:, :, None, :, None], cached.shape),
        ],
        axis=-1,
    )
    weights = masked_softmax(jnp.concatenate([recent, cached], axis=-1), both)
    values = jnp.concatenate([values, cache.means.astype(dtype)], axis=3)
    out = jnp.einsum("bgprij,bgrjd->bgprid", weights, values, precision=HIGHEST)
    spoiled = jnp.any(visible & two_blocks(~usable)[:, :, None, :, None], axis=-1)
    lost = jnp.any(some & ~finite_rows(cache.means), axis=-1)
    out = out + nan_where(spoiled | lost[:, :, None, :, None], dtype)[..., None]
    return out.reshape(batch, heads, time, -1).astype(v.dtype)


def masked_softmax(scores: Array, visible: Array) -> Array:
    """Softmax over what is visible; zeros (and a finite gradient) where nothing is."""
    scores = jnp.where(visible, scores, jnp.asarray(MASKED, scores.dtype))
    return jnp.where(visible, jax.nn.softmax(scores, axis=-1), jnp.zeros((), scores.dtype))


def _whole(x: Array) -> Array:
    """[queries, keys] -> broadcastable to [batch, groups, share, blocks, queries, keys]."""
    return x[None, None, None, None]
