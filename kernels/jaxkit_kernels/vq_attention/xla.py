"""The fast pure-JAX form: a few blocks at a time, scores that never leave their chunk.

The queries of a chunk of blocks meet their 2 L recent keys and the S codes in one matmul, and the
weights meet the values and the means in another. The backward pass forms the scores again from the
log-sum-exp; no array of the size of all scores exists in either direction.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit_kernels import _blocks
from jaxkit_kernels.vq_attention import skew
from jaxkit_kernels.vq_attention.reference import MASKED

__all__ = ["backward", "decode", "forward"]

# Scores of one chunk: 4 MiB in float32. Smaller chunks pay for dispatch, larger ones for memory.
_TARGET = 1 << 20
_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.VqAttentionXlaBlocks] = {}
_einsum = partial(jnp.einsum, precision="highest")


class _Chunks:
    """What both directions share: the slices of one chunk of blocks, and its scores."""

    def __init__(
        self, q, k, v, codebook, means, log_counts, bias, valid, length, window, block_sizes
    ):
        self.batch, self.heads, self.time, self.dk = q.shape
        self.groups, self.codes = codebook.shape[:2]
        self.share = self.heads // self.groups
        self.length, self.window = length, window
        self.blocks = self.time // length
        self.dtype = log_counts.dtype
        one = self.batch * self.heads * length * (2 * length + self.codes)

        def heuristic() -> _blocks.VqAttentionXlaBlocks:
            return _blocks.VqAttentionXlaBlocks(blocks=max(_TARGET // max(one, 1), 1))

        wanted = _blocks.choose(
            block_sizes,
            _blocks.VqAttentionXlaBlocks,
            _TABLE,
            "cpu",
            (*q.shape, length, self.codes),
            heuristic,
        ).blocks
        # Equal chunks: the largest divisor of the number of blocks within the wanted size.
        self.chunk = max(d for d in range(1, min(wanted, self.blocks) + 1) if self.blocks % d == 0)
        self.steps = self.blocks // self.chunk

        self.q, self.means, self.log_counts = q, means, log_counts
        self.codebook = codebook.astype(self.dtype)
        front = ((0, 0), (0, 0), (length, 0), (0, 0))
        self.k, self.v = jnp.pad(k, front), jnp.pad(v, front)
        if valid is None:
            valid = jnp.ones((1, self.time), bool)
        self.valid = jnp.pad(valid, ((0, 0), (length, 0)))

        lag = length + np.arange(length)[:, None] - np.arange(2 * length)
        causal = jnp.asarray(np.where(lag >= 0, 0.0, MASKED), self.dtype)
        # What is added to the scores of every block: [groups or 1, share L, 2 L + S].
        self.rows = self.share * length
        fixed = jnp.broadcast_to(causal, (1, self.share, length, 2 * length))
        self.bias = None
        if bias is not None and bias.ndim == 2:
            table = jnp.broadcast_to(
                bias.astype(self.dtype)[:, None], (self.heads, length, window + 1)
            )
            by_key = skew.to_keys(table, length)
            by_key = by_key.reshape(self.groups, self.share, length, 2 * length)
            fixed = jnp.broadcast_to(fixed, by_key.shape) + by_key
        elif bias is not None:
            self.bias = bias
        fixed = jnp.pad(fixed, ((0, 0), (0, 0), (0, 0), (0, self.codes)))
        self.fixed = fixed.reshape(-1, self.rows, 2 * length + self.codes)

    def per_query(self, x: jax.Array, step: jax.Array) -> jax.Array:
        """Of [batch, heads, time, ...]: [batch, groups, chunk, share L, ...]."""
        size = self.chunk * self.length
        part = jax.lax.dynamic_slice_in_dim(x, step * size, size, axis=2).astype(self.dtype)
        part = part.reshape(
            self.batch, self.groups, self.share, self.chunk, self.length, *x.shape[3:]
        )
        return jnp.moveaxis(part, 3, 2).reshape(
            self.batch, self.groups, self.chunk, self.rows, *x.shape[3:]
        )

    def per_time(self, x: jax.Array) -> jax.Array:
        """Stacked results of `per_query`'s form, [steps, ...], as [batch, heads, time, ...]."""
        tail = x.shape[5:]
        x = x.reshape(
            self.steps, self.batch, self.groups, self.chunk, self.share, self.length, *tail
        )
        x = jnp.moveaxis(x, (1, 2, 4), (0, 1, 2))
        return x.reshape(self.batch, self.heads, self.time, *tail)

    def _pairs(self, x: jax.Array, step: jax.Array, axis: int) -> jax.Array:
        """Each block of the chunk behind the block before it, along `axis` of a padded array."""
        size = self.chunk * self.length
        part = jax.lax.dynamic_slice_in_dim(x, step * size, size + self.length, axis=axis)
        lead, tail = x.shape[:axis], x.shape[axis + 1 :]
        cut = lambda start: jax.lax.slice_in_dim(part, start, start + size, axis=axis).reshape(
            *lead, self.chunk, self.length, *tail
        )
        return jnp.concatenate([cut(0), cut(self.length)], axis=axis + 1)

    def keys(self, step: jax.Array) -> jax.Array:
        """[batch, groups, chunk, 2 L + S, dk]."""
        recent = self._pairs(self.k, step, 2).astype(self.dtype)
        codes = jnp.broadcast_to(
            self.codebook[None, :, None],
            (self.batch, self.groups, self.chunk, self.codes, self.dk),
        )
        return jnp.concatenate([recent, codes], axis=3)

    def values(self, step: jax.Array) -> jax.Array:
        """[batch, groups, chunk, 2 L + S, dv]."""
        recent = self._pairs(self.v, step, 2).astype(self.dtype)
        cache = jax.lax.dynamic_slice_in_dim(self.means, step * self.chunk, self.chunk, axis=2)
        return jnp.concatenate([recent, cache.astype(self.dtype)], axis=3)

    def scores(self, queries: jax.Array, keys: jax.Array, step: jax.Array) -> jax.Array:
        """[batch, groups, chunk, share L, 2 L + S], masked."""
        seen = self._pairs(self.valid, step, 1)
        hidden = jnp.where(seen, jnp.zeros((), self.dtype), jnp.full((), MASKED, self.dtype))
        hidden = jnp.broadcast_to(
            hidden[:, None], (self.batch, self.groups, self.chunk, 2 * self.length)
        )
        cache = jax.lax.dynamic_slice_in_dim(self.log_counts, step * self.chunk, self.chunk, axis=2)
        # By column and by row, apart: the sum is one vectorised pass over the scores.
        by_column = jax.lax.optimization_barrier(jnp.concatenate([hidden, cache], axis=-1))
        scores = _einsum("bgcid,bgcjd->bgcij", queries, keys)
        scores = scores + by_column[:, :, :, None] + self.fixed[None, :, None]
        if self.bias is not None:
            lags = self.per_query(self.bias, step).reshape(
                *scores.shape[:3], self.share, self.length, self.window + 1
            )
            by_key = skew.to_keys(lags, self.length, self.codes)
            scores = scores + by_key.reshape(scores.shape)
        return scores


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    codebook: jax.Array,
    means: jax.Array,
    log_counts: jax.Array,
    bias: jax.Array | None,
    valid: jax.Array | None,
    *,
    block_length: int,
    window: int,
    block_sizes: _blocks.BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`, with the scores of one chunk of blocks at a time."""
    chunks = _Chunks(
        q, k, v, codebook, means, log_counts, bias, valid, block_length, window, block_sizes
    )

    def one(_, step):
        scores = chunks.scores(chunks.per_query(q, step), chunks.keys(step), step)
        # A row that sees nothing keeps a peak above all its scores, so that its weights vanish.
        peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), MASKED / 2)
        weights = jnp.exp(scores - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        some = total > 0
        safe = jnp.where(some, total, jnp.ones_like(total))
        out = _einsum("bgcij,bgcjd->bgcid", weights, chunks.values(step)) / safe
        lse = jnp.where(some, peak + jnp.log(safe), jnp.full_like(peak, -MASKED))
        return None, (out.astype(q.dtype), lse[..., 0])

    _, (out, lse) = jax.lax.scan(one, None, jnp.arange(chunks.steps))
    return chunks.per_time(out), chunks.per_time(lse)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    codebook: jax.Array,
    means: jax.Array,
    log_counts: jax.Array,
    bias: jax.Array | None,
    valid: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    cotangent: jax.Array,
    *,
    block_length: int,
    window: int,
    block_sizes: _blocks.BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Cotangents of q, k, v, means and bias: P = exp(s - lse), dS = P (dout v^T - dout . out)."""
    chunks = _Chunks(
        q, k, v, codebook, means, log_counts, bias, valid, block_length, window, block_sizes
    )
    recent, dtype = 2 * block_length, chunks.dtype
    by_key_shape = (chunks.batch, chunks.groups, chunks.rows, recent)
    table = bias is not None and bias.ndim == 2
    delta = jnp.sum(cotangent.astype(dtype) * out.astype(dtype), axis=-1)

    def one(carry, step):
        queries, keys = chunks.per_query(q, step), chunks.keys(step)
        g = chunks.per_query(cotangent, step)
        scores = chunks.scores(queries, keys, step)
        weights = jnp.exp(scores - chunks.per_query(lse, step)[..., None])
        at_weights = _einsum("bgcid,bgcjd->bgcij", g, chunks.values(step))
        at_scores = weights * (at_weights - chunks.per_query(delta, step)[..., None])
        bar_q = _einsum("bgcij,bgcjd->bgcid", at_scores, keys)
        # Products that contract the queries run fastest with their left side laid out by rows.
        g_rows, q_rows = jax.lax.optimization_barrier(
            (jnp.swapaxes(g, -1, -2), jnp.swapaxes(queries, -1, -2))
        )
        bar_values = jnp.swapaxes(_einsum("bgcdi,bgcij->bgcdj", g_rows, weights), -1, -2)
        bar_keys = jnp.swapaxes(_einsum("bgcdi,bgcij->bgcdj", q_rows, at_scores), -1, -2)
        results = {
            "q": bar_q.astype(q.dtype),
            "keys": bar_keys[..., :recent, :],
            "values": bar_values[..., :recent, :],
            "means": bar_values[..., recent:, :].astype(means.dtype),
        }
        if table:
            # A matmul with ones: XLA's own sum over the blocks takes as long as everything else.
            ones = jnp.ones(chunks.chunk, dtype)
            carry = carry + _einsum("c,bgcij->bgij", ones, at_scores)[..., :recent]
        elif bias is not None:
            at_recent = at_scores[..., :recent]
            by_key = at_recent.reshape(*at_recent.shape[:3], chunks.share, block_length, recent)
            by_lag = skew.to_lags(by_key, window).astype(bias.dtype)
            results["bias"] = by_lag.reshape(*at_recent.shape[:4], window + 1)
        return carry, results

    start = jnp.zeros(by_key_shape, dtype) if table else None
    carry, parts = jax.lax.scan(one, start, jnp.arange(chunks.steps))

    def per_block(x: jax.Array) -> jax.Array:
        """[steps, batch, groups, chunk, ...] -> [batch, groups, blocks, ...]."""
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], chunks.blocks, *x.shape[4:])

    def unpair(x: jax.Array, like: jax.Array) -> jax.Array:
        """A key is seen from its own block and from the next."""
        x = per_block(x)
        own, before = x[:, :, :, block_length:], x[:, :, 1:, :block_length]
        before = jnp.pad(before, ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
        return (own + before).reshape(like.shape).astype(like.dtype)

    bar_bias = None
    if carry is not None and bias is not None:
        by_key = jnp.sum(carry, axis=0).reshape(chunks.heads, block_length, recent)
        bar_bias = jnp.sum(skew.to_lags(by_key, window), axis=1).astype(bias.dtype)
    elif bias is not None:
        bar_bias = chunks.per_time(parts["bias"])
    return (
        chunks.per_time(parts["q"]),
        unpair(parts["keys"], k),
        unpair(parts["values"], v),
        per_block(parts["means"]),
        bar_bias,
    )


def decode(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    codebook: jax.Array,
    means: jax.Array,
    log_counts: jax.Array,
    bias: jax.Array | None,
    visible: jax.Array,
) -> jax.Array:
    """As `reference.decode`, without joining the window to the cache: neither is copied."""
    batch, heads, width = q.shape
    groups, lags = keys.shape[1], keys.shape[2]
    dtype = log_counts.dtype
    queries = q.astype(dtype).reshape(batch, groups, heads // groups, width)
    recent = _einsum("bgpd,bgjd->bgpj", queries, keys.astype(dtype))
    cached = _einsum("bgpd,gsd->bgps", queries, codebook.astype(dtype)) + log_counts[:, :, None]
    if bias is not None:
        full = jnp.broadcast_to(bias if bias.ndim == 3 else bias[None], (batch, heads, lags))
        recent = recent + full.astype(dtype).reshape(recent.shape)
    recent = jnp.where(visible[:, None, None], recent, jnp.full((), MASKED, dtype))
    peak = jnp.maximum(jnp.max(recent, axis=-1), jnp.max(cached, axis=-1))
    peak = jax.lax.stop_gradient(jnp.maximum(peak, MASKED / 2))[..., None]
    recent, cached = jnp.exp(recent - peak), jnp.exp(cached - peak)
    total = jnp.sum(recent, axis=-1, keepdims=True) + jnp.sum(cached, axis=-1, keepdims=True)
    out = _einsum("bgpj,bgjd->bgpd", recent, values.astype(dtype))
    out = out + _einsum("bgps,bgsd->bgpd", cached, means.astype(dtype))
    out = out / jnp.where(total > 0, total, jnp.ones_like(total))
    return out.reshape(batch, heads, -1).astype(q.dtype)
