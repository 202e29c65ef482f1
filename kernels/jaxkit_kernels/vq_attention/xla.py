"""The fast pure-JAX form: a few blocks at a time, scores that never leave their chunk.

The queries of a chunk of blocks meet their 2 L recent keys and the S codes in one matmul, and the
weights meet the values and the means in another. The backward pass forms the scores again from the
log-sum-exp; no array of the size of all scores exists in either direction.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit_kernels import _blocks, _sharding
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
        columns = 2 * length + self.codes

        def heuristic() -> _blocks.VqAttentionXlaBlocks:
            one = self.batch * self.heads * length * columns
            row = self.batch * self.groups * columns
            whole = one <= 2 * _TARGET
            return _blocks.VqAttentionXlaBlocks(
                blocks=max(_TARGET // one, 1),
                # Products of fewer than 64 rows are slow, whatever the memory.
                queries=self.share * length if whole else max(_TARGET // row, 64),
            )

        sizes = _blocks.choose(
            block_sizes,
            _blocks.VqAttentionXlaBlocks,
            _TABLE,
            "cpu",
            (*q.shape, length, self.codes),
            heuristic,
        )
        # Equal chunks: the largest divisor of the number of blocks within the wanted size.
        self.chunk = _divisor(self.blocks, sizes.blocks)
        self.steps = self.blocks // self.chunk
        self.rows = self.part = self.share * length
        if self.chunk == 1 and sizes.queries < self.rows:
            self.part = _divisor(length, sizes.queries)
        self.parts = self.rows // self.part

        self.q, self.means, self.log_counts = q, means, log_counts
        self.codebook = codebook.astype(self.dtype)
        self.k, self.v = k, v
        if valid is None:
            valid = jnp.ones((1, self.time), bool)
        self.valid = valid

        self.bias = bias
        if self.parts > 1:
            return
        # What is added to the scores of every block: [groups or 1, share L, 2 L + S].
        lag = length + np.arange(length)[:, None] - np.arange(2 * length)
        causal = jnp.asarray(np.where(lag >= 0, 0.0, MASKED), self.dtype)
        fixed = jnp.broadcast_to(causal, (1, self.share, length, 2 * length))
        if self.table:
            lags = jnp.broadcast_to(
                bias.astype(self.dtype)[:, None], (self.heads, length, window + 1)
            )
            by_key = skew.to_keys(lags, length)
            by_key = by_key.reshape(self.groups, self.share, length, 2 * length)
            fixed = jnp.broadcast_to(fixed, by_key.shape) + by_key
        fixed = jnp.pad(fixed, ((0, 0), (0, 0), (0, 0), (0, self.codes)))
        self.fixed = fixed.reshape(-1, self.rows, columns)

    @property
    def table(self) -> bool:
        """Whether the bias is a table by lag."""
        return self.bias is not None and self.bias.ndim == 2

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
        """Each block of the chunk behind the block before it (block 0 behind itself)."""
        size, length = self.chunk * self.length, self.length
        own = jax.lax.dynamic_slice_in_dim(x, step * size, size, axis=axis)
        start = jnp.maximum(step * size - length, 0)
        before = jax.lax.dynamic_slice_in_dim(x, start, length, axis=axis)
        most = jax.lax.slice_in_dim(own, 0, size - length, axis=axis)
        before = jnp.concatenate([before, most], axis=axis)
        shape = (*x.shape[:axis], self.chunk, length, *x.shape[axis + 1 :])
        return jnp.concatenate([before.reshape(shape), own.reshape(shape)], axis=axis + 1)

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

    def by_column(self, step: jax.Array) -> jax.Array:
        """Masks of keys, and log counts: [batch, groups, chunk, 2 L + S]."""
        seen = self._pairs(self.valid, step, 1)
        # Nothing comes before block 0.
        block = step * self.chunk + jnp.arange(self.chunk)
        old = jnp.arange(2 * self.length) < self.length
        seen = seen & ~((block == 0)[:, None] & old[None])[None]
        hidden = jnp.where(seen, jnp.zeros((), self.dtype), jnp.full((), MASKED, self.dtype))
        hidden = jnp.broadcast_to(
            hidden[:, None], (self.batch, self.groups, self.chunk, 2 * self.length)
        )
        cache = jax.lax.dynamic_slice_in_dim(self.log_counts, step * self.chunk, self.chunk, axis=2)
        return jnp.concatenate([hidden, cache], axis=-1)

    def cells(self, step: jax.Array) -> list[jax.Array]:
        """What is added to the scores of a chunk, cell by cell."""
        cells = [self.fixed[None, :, None]]
        if self.bias is not None and not self.table:
            lags = self.per_query(self.bias, step).reshape(
                self.batch, self.groups, self.chunk, self.share, self.length, self.window + 1
            )
            by_key = skew.to_keys(lags, self.length, self.codes)
            cells.append(by_key.reshape(*by_key.shape[:3], self.rows, by_key.shape[-1]))
        return cells

    def first(self, part: jax.Array) -> jax.Array:
        """Place in its block of the first query of a part; a part is within one head."""
        return part * self.part % self.length

    def rows_of(self, x: jax.Array, part: jax.Array) -> jax.Array:
        """Of [batch, groups, 1, share L, ...], the rows of a part."""
        return jax.lax.dynamic_slice_in_dim(x, part * self.part, self.part, axis=3)

    def head_of(self, part: jax.Array) -> jax.Array:
        """Which of the heads of a group a part belongs to."""
        return part * self.part // self.length

    def cells_of(self, lags: jax.Array | None, part: jax.Array) -> list[jax.Array]:
        """As `cells`, for a part, with the biases of its rows by lag."""
        first = self.first(part)
        rows = jax.lax.broadcasted_iota(jnp.int32, (self.part, 2 * self.length + self.codes), 0)
        columns = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
        ahead = (columns > self.length + first.astype(jnp.int32) + rows) & (
            columns < 2 * self.length
        )
        causal = jnp.where(ahead, jnp.full((), MASKED, self.dtype), jnp.zeros((), self.dtype))
        cells = [causal[None, None, None]]
        if lags is not None:
            by_key = skew.to_keys(lags, self.length)
            empty = jnp.zeros((*by_key.shape[:-1], rows.shape[1]), self.dtype)
            cells.append(jax.lax.dynamic_update_slice_in_dim(empty, by_key, first, axis=-1))
        return cells

    def lags_of(self, lags: jax.Array | None, part: jax.Array) -> jax.Array | None:
        """The biases of a part by lag, [batch or 1, groups, 1, rows, W + 1]."""
        if self.bias is None or lags is not None:
            return None if lags is None else self.rows_of(lags, part)
        table = self.bias.astype(self.dtype).reshape(1, self.groups, self.share, 1, -1)
        one = jax.lax.dynamic_slice_in_dim(table, self.head_of(part), 1, axis=2)
        return jnp.broadcast_to(one, (*one.shape[:3], self.part, one.shape[-1]))


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`."""
    return max(d for d in range(1, min(size, most) + 1) if size % d == 0)


def _scores(queries, keys, by_column, cells) -> jax.Array:
    """Masked scores [batch, groups, chunk, rows, 2 L + S]."""
    scores = _einsum("bgcid,bgcjd->bgcij", queries, keys)
    # By column and by cell, apart: the sum is one vectorised pass over the scores.
    return sum(cells, scores + by_column[:, :, :, None])


def _attend(queries, keys, values, by_column, cells) -> tuple[jax.Array, jax.Array]:
    scores = _scores(queries, keys, by_column, cells)
    # A row that sees nothing keeps a peak above all its scores, so that its weights vanish.
    peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), MASKED / 2)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    safe = jnp.where(some, total, jnp.ones_like(total))
    out = _einsum("bgcij,bgcjd->bgcid", weights, values) / safe
    lse = jnp.where(some, peak + jnp.log(safe), jnp.full_like(peak, -MASKED))
    return out, lse[..., 0]


def _pull(queries, keys, values, by_column, cells, lse, delta, g):
    """Cotangents of queries, keys, values and scores."""
    weights = jnp.exp(_scores(queries, keys, by_column, cells) - lse[..., None])
    at_weights = _einsum("bgcid,bgcjd->bgcij", g, values)
    at_scores = weights * (at_weights - delta[..., None])
    bar_q = _einsum("bgcij,bgcjd->bgcid", at_scores, keys)
    # Products that contract the queries run fastest with their left side laid out by rows.
    g_rows, q_rows = jax.lax.optimization_barrier(
        (jnp.swapaxes(g, -1, -2), jnp.swapaxes(queries, -1, -2))
    )
    bar_values = jnp.swapaxes(_einsum("bgcdi,bgcij->bgcdj", g_rows, weights), -1, -2)
    bar_keys = jnp.swapaxes(_einsum("bgcdi,bgcij->bgcdj", q_rows, at_scores), -1, -2)
    return bar_q, bar_keys, bar_values, at_scores


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
        queries, keys, values = chunks.per_query(q, step), chunks.keys(step), chunks.values(step)
        by_column = jax.lax.optimization_barrier(chunks.by_column(step))
        if chunks.parts == 1:
            out, lse = _attend(queries, keys, values, by_column, chunks.cells(step))
            return None, (out.astype(q.dtype), lse)
        lags = None if bias is None or chunks.table else chunks.per_query(bias, step)

        def some(part):
            cells = chunks.cells_of(chunks.lags_of(lags, part), part)
            out, lse = _attend(chunks.rows_of(queries, part), keys, values, by_column, cells)
            return out.astype(q.dtype), lse

        out, lse = jax.lax.map(some, jnp.arange(chunks.parts))
        return None, (_join(out), _join(lse))

    _, (out, lse) = jax.lax.scan(one, None, jnp.arange(chunks.steps))
    return chunks.per_time(out), chunks.per_time(lse)


def _join(x: jax.Array) -> jax.Array:
    """Rows of parts, [parts, batch, groups, 1, rows, ...], as rows of a block."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


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
    delta = jnp.sum(cotangent.astype(dtype) * out.astype(dtype), axis=-1)

    def whole(carry, step, queries, keys, values, by_column, *more):
        bar_q, bar_keys, bar_values, at_scores = _pull(
            queries, keys, values, by_column, chunks.cells(step), *more
        )
        at_bias = None
        if chunks.table:
            # A matmul with ones: XLA's own sum over the blocks takes as long as everything else.
            ones = jnp.ones(chunks.chunk, dtype)
            carry = carry + _einsum("c,bgcij->bgij", ones, at_scores)[..., :recent]
        elif bias is not None:
            by_key = at_scores[..., :recent]
            by_key = by_key.reshape(*by_key.shape[:3], chunks.share, block_length, recent)
            at_bias = skew.to_lags(by_key, window).astype(bias.dtype)
            at_bias = at_bias.reshape(*at_scores.shape[:4], window + 1)
        return carry, bar_q.astype(q.dtype), bar_keys, bar_values, at_bias

    def in_parts(carry, step, queries, keys, values, by_column, *more):
        lags = None if bias is None or chunks.table else chunks.per_query(bias, step)

        def one_part(sums, part):
            cells = chunks.cells_of(chunks.lags_of(lags, part), part)
            rows = partial(chunks.rows_of, part=part)
            bar_q, bar_keys, bar_values, at_scores = _pull(
                rows(queries), keys, values, by_column, cells, *(rows(x) for x in more)
            )
            at_table, at_bias = sums[2], None
            if bias is not None:
                size = block_length + chunks.part
                by_key = jax.lax.dynamic_slice_in_dim(at_scores, chunks.first(part), size, axis=-1)
                by_lag = skew.to_lags(by_key, window)
                if chunks.table:
                    head = chunks.head_of(part)
                    at_table = at_table.at[:, :, head].add(jnp.sum(by_lag[:, :, 0], axis=2))
                else:
                    at_bias = by_lag.astype(bias.dtype)
            sums = (sums[0] + bar_keys, sums[1] + bar_values, at_table)
            return sums, (bar_q.astype(q.dtype), at_bias)

        start = jnp.zeros_like(keys), jnp.zeros_like(values), carry
        sums, (bar_q, at_bias) = jax.lax.scan(one_part, start, jnp.arange(chunks.parts))
        at_bias = None if at_bias is None else _join(at_bias)
        return sums[2], _join(bar_q), sums[0], sums[1], at_bias

    def settle(own_before, pairs):
        """A key is seen from its own block and from the next, which comes later."""
        before, own = pairs[..., :block_length, :], pairs[..., block_length:recent, :]
        earlier = jnp.concatenate([own_before[:, :, None], own[:, :, :-1]], axis=2)
        return own[:, :, -1], earlier + before

    def one(carry, step):
        table, own_keys, own_values = carry
        table, bar_q, bar_keys, bar_values, at_bias = (whole if chunks.parts == 1 else in_parts)(
            table,
            step,
            chunks.per_query(q, step),
            chunks.keys(step),
            chunks.values(step),
            jax.lax.optimization_barrier(chunks.by_column(step)),
            chunks.per_query(lse, step),
            chunks.per_query(delta, step),
            chunks.per_query(cotangent, step),
        )
        own_keys, bar_k = settle(own_keys, bar_keys)
        own_values, bar_v = settle(own_values, bar_values)
        return (table, own_keys, own_values), {
            "q": bar_q,
            "k": bar_k.astype(k.dtype),
            "v": bar_v.astype(v.dtype),
            "means": bar_values[..., recent:, :].astype(means.dtype),
            "bias": at_bias,
        }

    # A table's cotangent: by key, [share L, 2 L], or in parts by lag, [share, W + 1].
    shape = (chunks.rows, recent) if chunks.parts == 1 else (chunks.share, window + 1)
    zeros = lambda *shape: _sharding.vary(jnp.zeros(shape, dtype), q)
    start = zeros(chunks.batch, chunks.groups, *shape) if chunks.table else None
    lead = (chunks.batch, chunks.groups, block_length)
    nothing = zeros(*lead, k.shape[-1]), zeros(*lead, v.shape[-1])
    (table, *last), parts = jax.lax.scan(one, (start, *nothing), jnp.arange(chunks.steps))

    def per_block(x: jax.Array) -> jax.Array:
        """[steps, batch, groups, chunk, ...] -> [batch, groups, blocks, ...]."""
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], chunks.blocks, *x.shape[4:])

    def per_key(x: jax.Array, last: jax.Array) -> jax.Array:
        """Blocks -1 to R - 2, and the last block, as [batch, groups, time, ...]."""
        x = jnp.concatenate([per_block(x)[:, :, 1:], last[:, :, None].astype(x.dtype)], axis=2)
        return x.reshape(*x.shape[:2], chunks.time, x.shape[-1])

    bar_bias = None
    if bias is not None and table is not None:
        total = jnp.sum(table, axis=0)
        if chunks.parts == 1:
            by_key = total.reshape(chunks.heads, block_length, recent)
            total = jnp.sum(skew.to_lags(by_key, window), axis=1)
        bar_bias = total.reshape(bias.shape).astype(bias.dtype)
    elif bias is not None:
        bar_bias = chunks.per_time(parts["bias"])
    return (
        chunks.per_time(parts["q"]),
        per_key(parts["k"], last[0]),
        per_key(parts["v"], last[1]),
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
