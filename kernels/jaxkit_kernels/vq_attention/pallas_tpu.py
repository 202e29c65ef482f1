"""TPU kernels: one tile of scores a program, the columns of a row in order (flash attention).

A row of tiles runs over the recent keys, then over the codes, with an online softmax in VMEM. The
backward pass has a kernel for each way of adding up: over columns (q), over rows (k and v of a
block, seen from that block and the next; the means), and over blocks (a table of biases). `layout`
says what rows and columns are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxkit_kernels import _blocks, _sharding
from jaxkit_kernels.vq_attention.layout import Layout, pad_axis, round_up
from jaxkit_kernels.vq_attention.reference import MASKED

__all__ = ["backward", "decode", "forward"]

_LANES = 128
_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.VqAttentionTpuBlocks] = {}


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if q.dtype not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        raise NotImplementedError(f"the kernel takes bfloat16 or float32; got {q.dtype}.")
    if k.shape[-1] > 1024 or v.shape[-1] > 2048:
        raise NotImplementedError(
            f"the kernel takes dk up to 1024 and dv up to 2048; got {k.shape[-1]}, {v.shape[-1]}."
        )


def _layout(
    q: jax.Array,
    v: jax.Array,
    codebook: jax.Array,
    length: int,
    window: int,
    block_sizes: _blocks.BlockSizes | None,
) -> Layout:
    batch, heads, time, dk = q.shape
    groups, codes = codebook.shape[:2]

    def heuristic() -> _blocks.VqAttentionTpuBlocks:
        # A tile of values, its output and its sum, each twice in flight, in 16 MiB of VMEM.
        most = 256 if dk + v.shape[-1] <= 1024 else 128
        return _blocks.VqAttentionTpuBlocks(
            queries=min(most, round_up(heads // groups * length, _LANES)),
            keys=min(most, round_up(max(length, codes), _LANES)),
        )

    sizes = _blocks.choose(
        block_sizes,
        _blocks.VqAttentionTpuBlocks,
        _TABLE,
        "tpu",
        (*q.shape, length, codes),
        heuristic,
    )
    return Layout(
        batch, heads, groups, time // length, length, window, codes, sizes.queries, sizes.keys
    )


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of tiles in float32; bfloat16 tiles meet as they are."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _to_column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def _to_row(column: jax.Array) -> jax.Array:
    """[n, 1] -> [1, n]."""
    return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], _LANES)))[:1]


def _forward_kernel(
    q, keys, values, codebook, means, columns, cells, out, *rest, recent: int, total: int
):
    *lse, peak, norm, sums = rest
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _():
        # Above every masked score, so that the weights of a row that sees nothing vanish.
        peak[...] = jnp.full_like(peak, MASKED / 2)
        norm[...] = jnp.zeros_like(norm)
        sums[...] = jnp.zeros_like(sums)

    def tile(keys, values, more):
        scores = _dot(q[...], keys[...], (1, 1)) + columns[...]
        scores = scores if more is None else scores + more[...]
        old = peak[...][:, :1]
        new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = jnp.exp(scores - new), jnp.exp(old - new)
        total = norm[...][:, :1] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        sums[...] = sums[...] * shrink + _dot(weights.astype(values.dtype), values[...], (1, 0))
        peak[...] = jnp.broadcast_to(new, peak.shape)
        norm[...] = jnp.broadcast_to(total, norm.shape)

    @pl.when(j < recent)
    def _():
        tile(keys, values, cells)

    @pl.when(j >= recent)
    def _():
        tile(codebook, means, None)

    @pl.when(j == total - 1)
    def _():
        weight = norm[...][:, :1]
        safe = jnp.where(weight > 0, weight, 1.0)
        out[...] = (sums[...] / safe).astype(out.dtype)
        for ref in lse:  # absent in decoding
            ref[...] = _to_row(jnp.where(weight > 0, peak[...][:, :1] + jnp.log(safe), -MASKED))


def _spec(shape: tuple[int, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *shape), index)


def _cells_index(cells: jax.Array, groups: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Where the cells of (batch and group, block) stand: by group, by both, or one for all."""
    first, second = cells.shape[:2]
    by_block = lambda r: r if second > 1 else 0
    if first == 1:
        return lambda n, r: (0, by_block(r))
    if first == groups and second == 1:
        return lambda n, r: (n % groups, 0)
    return lambda n, r: (n, by_block(r))


def _params(*semantics: Any) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics)


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`, float32 or bfloat16."""
    _check(q, k, v)
    a = _layout(q, v, codebook, block_length, window, block_sizes)
    dk, dv = q.shape[-1], v.shape[-1]
    cells = a.cells(bias)
    at, n, c = _cells_index(cells, a.groups), a.key_tiles, a.code_tiles

    def key_index(g, r, i, j):
        # The block before, then the block itself; the first block has none before (masked).
        before = j < n
        return (
            g,
            jnp.where(before, jnp.maximum(r - 1, 0), r),
            jnp.where(before, j, jnp.minimum(j - n, n - 1)),
            0,
        )

    of_row = lambda g, r, i, j: (g, r, i, 0)
    code = lambda j: jnp.maximum(j - 2 * n, 0)
    out, lse = pl.pallas_call(
        partial(_forward_kernel, recent=2 * n, total=2 * n + c),
        grid=(a.lead, a.blocks, a.row_tiles, 2 * n + c),
        in_specs=[
            _spec((a.tile_rows, dk), of_row),
            _spec((a.tile_columns, dk), key_index),
            _spec((a.tile_columns, dv), key_index),
            pl.BlockSpec((None, a.tile_columns, dk), lambda g, r, i, j: (g % a.groups, code(j), 0)),
            _spec((a.tile_columns, dv), lambda g, r, i, j: (g, r, code(j), 0)),
            _spec((1, a.tile_columns), lambda g, r, i, j: (g, r, 0, j)),
            _spec(
                (a.tile_rows, a.tile_columns),
                lambda g, r, i, j: (*at(g, r), i, jnp.minimum(j, 2 * n - 1)),
            ),
        ],
        out_specs=[
            _spec((a.tile_rows, dv), of_row),
            _spec((1, a.tile_rows), lambda g, r, i, j: (g, r, 0, i)),
        ],
        out_shape=[
            _sharding.result((a.lead, a.blocks, a.rows, dv), q.dtype, q),
            _sharding.result((a.lead, a.blocks, 1, a.rows), jnp.float32, q),
        ],
        scratch_shapes=[
            pltpu.VMEM((a.tile_rows, _LANES), jnp.float32),
            pltpu.VMEM((a.tile_rows, _LANES), jnp.float32),
            pltpu.VMEM((a.tile_rows, dv), jnp.float32),
        ],
        compiler_params=_params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="vq_attention_forward",
    )(
        a.by_row(q),
        a.by_key(k),
        a.by_key(v),
        pad_axis(codebook, 1, a.padded_codes),
        _flat_means(means, a).astype(v.dtype),
        a.columns(log_counts, valid),
        cells,
    )
    return a.from_rows(out), a.from_rows(lse[:, :, 0])


def _flat_means(means: jax.Array, a: Layout) -> jax.Array:
    flat = means.reshape(a.lead, a.blocks, a.codes, means.shape[-1])
    return pad_axis(flat, 2, a.padded_codes)


def _weights(q, keys, values, columns, cells, lse, delta, g):
    """Weights of a tile, and the cotangents of its scores; float32 [rows, columns]."""
    scores = _dot(q[...], keys[...], (1, 1)) + columns[...]
    scores = scores if cells is None else scores + cells[...]
    weights = jnp.exp(scores - _to_column(lse[...]))
    at_weights = _dot(g[...], values[...], (1, 1))
    return weights, weights * (at_weights - _to_column(delta[...]))


def _query_kernel(
    q, keys, values, codebook, means, columns, cells, lse, delta, g, bar_q, *rest, recent, total
):
    *bar_cells, sums = rest
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(j < recent)
    def _():
        _, at_scores = _weights(q, keys, values, columns, cells, lse, delta, g)
        sums[...] += _dot(at_scores.astype(keys.dtype), keys[...], (1, 0))
        for ref in bar_cells:  # with a bias for each query
            ref[...] = at_scores

    @pl.when(j >= recent)
    def _():
        _, at_scores = _weights(q, codebook, means, columns, None, lse, delta, g)
        sums[...] += _dot(at_scores.astype(codebook.dtype), codebook[...], (1, 0))

    @pl.when(j == total - 1)
    def _():
        bar_q[...] = sums[...].astype(bar_q.dtype)


def _key_kernel(
    q,
    keys,
    values,
    columns,
    cells,
    lse,
    delta,
    g,
    bar_keys,
    bar_values,
    key_sums,
    value_sums,
    *,
    row_tiles: int,
):
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    # The last block is seen from no later one.
    @pl.when((step < row_tiles) | (pl.program_id(1) + 1 < pl.num_programs(1)))
    def _():
        weights, at_scores = _weights(q, keys, values, columns, cells, lse, delta, g)
        value_sums[...] += _dot(weights.astype(g.dtype), g[...], (0, 0))
        key_sums[...] += _dot(at_scores.astype(q.dtype), q[...], (0, 0))

    @pl.when(step == 2 * row_tiles - 1)
    def _():
        bar_keys[...] = key_sums[...].astype(bar_keys.dtype)
        bar_values[...] = value_sums[...].astype(bar_values.dtype)


def _mean_kernel(q, codebook, columns, lse, g, bar_means, sums):
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    scores = _dot(q[...], codebook[...], (1, 1)) + columns[...]
    weights = jnp.exp(scores - _to_column(lse[...]))
    sums[...] += _dot(weights.astype(g.dtype), g[...], (0, 0))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        bar_means[...] = sums[...].astype(bar_means.dtype)


def _table_kernel(q, keys, values, columns, cells, lse, delta, g, bar_cells):
    @pl.when((pl.program_id(3) == 0) & (pl.program_id(4) == 0))
    def _():
        bar_cells[...] = jnp.zeros_like(bar_cells)

    _, at_scores = _weights(q, keys, values, columns, cells, lse, delta, g)
    bar_cells[...] += at_scores


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Cotangents of q, k, v, means and bias."""
    _check(q, k, v)
    a = _layout(q, v, codebook, block_length, window, block_sizes)
    dk, dv = q.shape[-1], v.shape[-1]
    cells = a.cells(bias)
    at, n, c, m = _cells_index(cells, a.groups), a.key_tiles, a.code_tiles, a.row_tiles
    delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    rows, columns = a.by_row(q), a.columns(log_counts, valid)
    keys, values = a.by_key(k), a.by_key(v)
    codes = pad_axis(codebook, 1, a.padded_codes)
    cache = _flat_means(means, a).astype(v.dtype)
    # Rows of padding see nothing.
    lse, delta = a.by_row(lse, -MASKED)[:, :, None], a.by_row(delta)[:, :, None]
    g = a.by_row(cotangent)

    def call(kernel, grid, semantics, **options):
        name = options.pop("name")
        return pl.pallas_call(
            kernel,
            grid=grid,
            compiler_params=_params(*semantics),
            interpret=interpret,
            name=f"vq_attention_{name}",
            **options,
        )

    four = ("parallel", "parallel", "parallel", "arbitrary")
    row_tile, column_tile = a.tile_rows, a.tile_columns
    scratch = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    struct = lambda shape, dtype: _sharding.result(shape, dtype, q)

    # q, and the cells of biases that each query has of its own: along the columns of a row.
    def key_index(b, r, i, j):
        before = j < n
        return (
            b,
            jnp.where(before, jnp.maximum(r - 1, 0), r),
            jnp.where(before, j, jnp.minimum(j - n, n - 1)),
            0,
        )

    of_row = lambda b, r, i, j: (b, r, i, 0)
    line = lambda b, r, i, j: (b, r, 0, i)
    code = lambda j: jnp.maximum(j - 2 * n, 0)
    by_query = bias is not None and bias.ndim == 4
    cell_spec = _spec(
        (row_tile, column_tile),
        lambda b, r, i, j: (*at(b, r), i, jnp.minimum(j, 2 * n - 1)),
    )
    extra_specs = [cell_spec] if by_query else []
    extra_shapes = [struct(cells.shape, jnp.float32)] if by_query else []
    bar_q, *bar_cells = call(
        partial(_query_kernel, recent=2 * n, total=2 * n + c),
        (a.lead, a.blocks, m, 2 * n + c),
        four,
        in_specs=[
            _spec((row_tile, dk), of_row),
            _spec((column_tile, dk), key_index),
            _spec((column_tile, dv), key_index),
            pl.BlockSpec((None, column_tile, dk), lambda b, r, i, j: (b % a.groups, code(j), 0)),
            _spec((column_tile, dv), lambda b, r, i, j: (b, r, code(j), 0)),
            _spec((1, column_tile), lambda b, r, i, j: (b, r, 0, j)),
            cell_spec,
            _spec((1, row_tile), line),
            _spec((1, row_tile), line),
            _spec((row_tile, dv), of_row),
        ],
        out_specs=[_spec((row_tile, dk), of_row), *extra_specs],
        out_shape=[struct(rows.shape, q.dtype), *extra_shapes],
        scratch_shapes=[scratch(row_tile, dk)],
        name="query",
    )(rows, keys, values, codes, cache, columns, cells, lse, delta, g)

    # k and v: along the rows of the block itself (columns n...), then of the next (columns 0...).
    def seen_from(r, step):
        return jnp.where(step < m, r, jnp.minimum(r + 1, a.blocks - 1))

    def column(j, step):
        return jnp.where(step < m, n + j, j)

    from_row = lambda b, r, j, s: (b, seen_from(r, s), s % m, 0)
    from_line = lambda b, r, j, s: (b, seen_from(r, s), 0, s % m)
    of_key = lambda b, r, j, s: (b, r, j, 0)
    bar_k, bar_v = call(
        partial(_key_kernel, row_tiles=m),
        (a.lead, a.blocks, n, 2 * m),
        four,
        in_specs=[
            _spec((row_tile, dk), from_row),
            _spec((column_tile, dk), of_key),
            _spec((column_tile, dv), of_key),
            _spec((1, column_tile), lambda b, r, j, s: (b, seen_from(r, s), 0, column(j, s))),
            _spec(
                (row_tile, column_tile),
                lambda b, r, j, s: (*at(b, seen_from(r, s)), s % m, column(j, s)),
            ),
            _spec((1, row_tile), from_line),
            _spec((1, row_tile), from_line),
            _spec((row_tile, dv), from_row),
        ],
        out_specs=[_spec((column_tile, dk), of_key), _spec((column_tile, dv), of_key)],
        out_shape=[struct(keys.shape, k.dtype), struct(values.shape, v.dtype)],
        scratch_shapes=[scratch(column_tile, dk), scratch(column_tile, dv)],
        name="keys",
    )(rows, keys, values, columns, cells, lse, delta, g)

    bar_means = call(
        _mean_kernel,
        (a.lead, a.blocks, c, m),
        four,
        in_specs=[
            _spec((row_tile, dk), lambda b, r, j, s: (b, r, s, 0)),
            pl.BlockSpec((None, column_tile, dk), lambda b, r, j, s: (b % a.groups, j, 0)),
            _spec((1, column_tile), lambda b, r, j, s: (b, r, 0, 2 * n + j)),
            _spec((1, row_tile), lambda b, r, j, s: (b, r, 0, s)),
            _spec((row_tile, dv), lambda b, r, j, s: (b, r, s, 0)),
        ],
        out_specs=_spec((column_tile, dv), of_key),
        out_shape=struct(cache.shape, means.dtype),
        scratch_shapes=[scratch(column_tile, dv)],
        name="means",
    )(rows, codes, columns, lse, g)

    bar_bias = None
    if bias is not None and by_query:
        bar_bias = a.cotangent_of_bias(bar_cells[0], bias).astype(bias.dtype)
    elif bias is not None:
        # Along the sequences and the blocks; the groups of a sequence are side by side.
        lead = lambda group, b: b * a.groups + group
        row = lambda group, i, j, b, r: (lead(group, b), r, i, 0)
        flat = lambda group, i, j, b, r: (lead(group, b), r, 0, i)
        cell = _spec((row_tile, column_tile), lambda group, i, j, b, r: (group, 0, i, j))

        def key(group, i, j, b, r):
            before = j < n
            block = jnp.where(before, jnp.maximum(r - 1, 0), r)
            return lead(group, b), block, jnp.where(before, j, j - n), 0

        table = call(
            _table_kernel,
            (a.groups, m, 2 * n, a.batch, a.blocks),
            ("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            in_specs=[
                _spec((row_tile, dk), row),
                _spec((column_tile, dk), key),
                _spec((column_tile, dv), key),
                _spec((1, column_tile), lambda group, i, j, b, r: (lead(group, b), r, 0, j)),
                cell,
                _spec((1, row_tile), flat),
                _spec((1, row_tile), flat),
                _spec((row_tile, dv), row),
            ],
            out_specs=cell,
            out_shape=struct(cells.shape, jnp.float32),
            name="table",
        )(rows, keys, values, columns, cells, lse, delta, g)
        bar_bias = a.cotangent_of_bias(table, bias).astype(bias.dtype)
    bar_means = bar_means[:, :, : a.codes].reshape(means.shape)
    return a.from_rows(bar_q), a.from_keys(bar_k), a.from_keys(bar_v), bar_means, bar_bias


def decode(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    codebook: jax.Array,
    means: jax.Array,
    log_counts: jax.Array,
    bias: jax.Array | None,
    visible: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `reference.decode`, in one launch; the heads of a group read its cache once."""
    _check(q, keys, values)
    batch, heads, dk = q.shape
    groups, lags, dv = keys.shape[1], keys.shape[2], values.shape[3]
    codes, share, lead = codebook.shape[1], heads // groups, batch * groups
    rows = round_up(share, 16)
    tile = 256 if min(lags, codes) > _LANES and dk + dv <= 1024 else _LANES
    recent, cached = round_up(lags, tile), round_up(codes, tile)
    n, c = recent // tile, cached // tile

    hidden = jnp.where(visible, 0.0, MASKED).astype(jnp.float32)
    hidden = jnp.broadcast_to(pad_axis(hidden, 1, recent, MASKED)[:, None], (batch, groups, recent))
    columns = jnp.concatenate([hidden, pad_axis(log_counts, 2, cached, MASKED)], axis=2)
    if bias is None:
        cells = jnp.zeros((1, 1, rows, recent), jnp.float32)
    else:
        full = bias.astype(jnp.float32).reshape(-1, 1, share, lags)
        cells = pad_axis(pad_axis(full, 2, rows), 3, recent)
    at = _cells_index(cells, groups)
    code = lambda j: jnp.maximum(j - n, 0)
    key = lambda g, r, i, j: (g, 0, jnp.minimum(j, n - 1), 0)
    out = pl.pallas_call(
        partial(_forward_kernel, recent=n, total=n + c),
        grid=(lead, 1, 1, n + c),
        in_specs=[
            _spec((rows, dk), lambda g, r, i, j: (g, 0, 0, 0)),
            _spec((tile, dk), key),
            _spec((tile, dv), key),
            pl.BlockSpec((None, tile, dk), lambda g, r, i, j: (g % groups, code(j), 0)),
            _spec((tile, dv), lambda g, r, i, j: (g, 0, code(j), 0)),
            _spec((1, tile), lambda g, r, i, j: (g, 0, 0, j)),
            _spec((rows, tile), lambda g, r, i, j: (*at(g, 0), 0, jnp.minimum(j, n - 1))),
        ],
        out_specs=_spec((rows, dv), lambda g, r, i, j: (g, 0, 0, 0)),
        out_shape=_sharding.result((lead, 1, rows, dv), q.dtype, q),
        scratch_shapes=[
            pltpu.VMEM((rows, _LANES), jnp.float32),
            pltpu.VMEM((rows, _LANES), jnp.float32),
            pltpu.VMEM((rows, dv), jnp.float32),
        ],
        compiler_params=_params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="vq_attention_decode",
    )(
        pad_axis(q.reshape(lead, 1, share, dk), 2, rows),
        pad_axis(keys.reshape(lead, 1, lags, dk), 2, recent),
        pad_axis(values.reshape(lead, 1, lags, dv), 2, recent),
        pad_axis(codebook, 1, cached),
        pad_axis(means.reshape(lead, 1, codes, dv), 2, cached).astype(values.dtype),
        columns.reshape(lead, 1, 1, recent + cached),
        cells,
    )
    return out[:, 0, :share].reshape(batch, heads, dv)
