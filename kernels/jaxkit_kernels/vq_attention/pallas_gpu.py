"""GPU kernels (Mosaic, Hopper): 64 rows a program, products on the tensor cores.

Like the TPU kernels, with one kernel for each way of adding up. The columns of a row are streamed
through shared memory; the softmax and the sums live in registers. No atomics: what is added over
blocks by several programs is added up afterwards, in order. `layout` says what rows and columns
are, `hopper` how tiles are moved and multiplied, and how float32 is kept.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxkit_kernels import _blocks, _mosaic_gpu
from jaxkit_kernels.vq_attention.hopper import Tile, launch, split, stored
from jaxkit_kernels.vq_attention.layout import Layout, pad_axis, round_up
from jaxkit_kernels.vq_attention.reference import MASKED

__all__ = ["backward", "decode", "forward"]

_ROWS = 64
# Programs that fill 132 cores twice.
_PROGRAMS = 264
_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.VqAttentionGpuBlocks] = {}


def _check(q: jax.Array) -> None:
    if q.dtype == jnp.dtype("float64"):
        raise NotImplementedError(f"the kernel takes bfloat16, float16 or float32; got {q.dtype}.")
    if q.shape[-1] > 256:
        raise NotImplementedError(f"the kernel takes dk up to 256; got {q.shape[-1]}.")
    _mosaic_gpu.check_device()


def _cut(dv: int, dtype: Any) -> tuple[int, int]:
    """How many parts the columns of the values are cut in, and the width of one."""
    # The sum of 64 rows takes half as many registers of each thread as it has columns.
    most = 256 if stored(dtype)[0] == 1 else 128
    count = -(-dv // most)
    return count, round_up(-(-dv // count), 64)


def _layout(
    q: jax.Array,
    codebook: jax.Array,
    length: int,
    window: int,
    block_sizes: _blocks.BlockSizes | None,
) -> Layout:
    batch, heads, time, _ = q.shape
    groups, codes = codebook.shape[:2]
    sizes = _blocks.choose(
        block_sizes,
        _blocks.VqAttentionGpuBlocks,
        _TABLE,
        "cuda",
        (*q.shape, length, codes),
        lambda: _blocks.VqAttentionGpuBlocks(columns=64),
    )
    return Layout(batch, heads, groups, time // length, length, window, codes, _ROWS, sizes.columns)


def _tiles(x: jax.Array, width: int) -> jax.Array:
    """[lead, ..., d] -> [lead, parts, rows, width], as the kernels read matrices."""
    return split(pad_axis(x.reshape(x.shape[0], -1, x.shape[-1]), 2, width), 1)


def _behind_one(x: jax.Array) -> jax.Array:
    """The same behind one empty block, so that the 2 L recent keys of block r start at block r."""
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))


def _means(means: jax.Array, a: Layout) -> jax.Array:
    flat = means.reshape(a.lead, a.blocks, a.codes, means.shape[-1])
    return pad_axis(flat, 2, a.padded_codes)


def _mod(x: Any, size: int) -> Any:
    return lax.rem(x, jnp.int32(size))


def _cells_at(cells: Any, groups: int, lead: Any, block: Any) -> tuple[Any, Any]:
    first, second = cells.shape[:2]
    by_lead = 0 if first == 1 else _mod(lead, groups) if first == groups else lead
    return by_lead, block if second > 1 else 0


def _spread(x: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """A vector with one number a row (axis 0) or a column (axis 1), as a matrix."""
    return lax.broadcast_in_dim(x, like.shape, [axis])


def _forward_kernel(
    machine,
    ids,
    q,
    keys,
    values,
    codes,
    means,
    columns,
    cells,
    out,
    lse=None,
    *,
    groups: int,
    row_tiles: int,
    tile: int,
    recent: int,
    cached: int,
    block_keys: int,
    width: int,
):
    """`recent` and `cached` tiles of columns; `block_keys` keys from one block to the next."""
    lead, i, part = ids
    block, row = i // row_tiles, _mod(i, row_tiles) * _ROWS
    dk, group, cut = q.shape[-1], _mod(lead, groups), part * width
    cell = _cells_at(cells, groups, lead, block)

    def fold(first, with_cells, q_tile):
        def body(j, carry, key_tile, value_tile):
            peak, norm, total = carry
            at = pl.ds((first + j) * tile, tile)
            scores = machine.dot(q_tile, key_tile)
            scores = scores + _spread(machine.per_column(columns, (lead, block, at)), scores, 1)
            if with_cells:
                scores = scores + machine.matrix(cells, (*cell, pl.ds(row, _ROWS), at))
            new = jnp.maximum(peak, jnp.max(scores, axis=1))
            weights, shrink = jnp.exp(scores - _spread(new, scores, 0)), jnp.exp(peak - new)
            norm = norm * shrink + jnp.sum(weights, axis=1)
            total = machine.add_dot(total * _spread(shrink, total, 0), weights, value_tile)
            return new, norm, total

        return body

    def run(q_tile):
        # Above every masked score, so that the weights of a row that sees nothing vanish.
        carry = (
            machine.full((_ROWS,), MASKED / 2),
            machine.full((_ROWS,), 0.0),
            machine.full((_ROWS, width), 0.0),
        )
        near = lambda j: block * block_keys + j * tile
        tiles = (
            Tile(keys, lambda j: (lead, near(j), 0), (tile, dk)),
            Tile(values, lambda j: (lead, near(j), cut), (tile, width)),
        )
        carry = machine.stream(tiles, recent, fold(0, True, q_tile), carry)
        tiles = (
            Tile(codes, lambda j: (group, j * tile, 0), (tile, dk)),
            Tile(means, lambda j: (lead, (block * cached + j) * tile, cut), (tile, width)),
        )
        peak, norm, total = machine.stream(tiles, cached, fold(recent, False, q_tile), carry)
        safe, rows = jnp.where(norm > 0, norm, 1.0), pl.ds(i * _ROWS, _ROWS)
        machine.store(out, (lead, rows, pl.ds(cut, width)), total / _spread(safe, total, 0))
        if lse is not None:

            @pl.when(part == 0)
            def _():
                value = jnp.where(norm > 0, peak + jnp.log(safe), -MASKED)
                machine.store_plain(lse, (lead, rows), value)

    machine.fetch((Tile(q, lambda _: (lead, i * _ROWS, 0), (_ROWS, dk)),), run)


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
    """As `reference.forward`, float32, bfloat16 or float16."""
    _check(q)
    a = _layout(q, codebook, block_length, window, block_sizes)
    dk, dv = round_up(q.shape[-1], 64), v.shape[-1]
    cuts, width = _cut(dv, q.dtype)
    kernel = partial(
        _forward_kernel,
        groups=a.groups,
        row_tiles=a.row_tiles,
        tile=a.tile_columns,
        recent=2 * a.key_tiles,
        cached=a.code_tiles,
        block_keys=a.keys,
        width=width,
    )
    out, lse = launch(
        kernel,
        [
            jax.ShapeDtypeStruct((a.lead, a.blocks * a.rows, cuts * width), q.dtype),
            jax.ShapeDtypeStruct((a.lead, a.blocks * a.rows), jnp.float32),
        ],
        (a.lead, a.blocks * a.row_tiles, cuts),
        name="vq_attention_forward",
        interpret=interpret,
    )(
        _tiles(a.by_row(q), dk),
        _tiles(_behind_one(a.by_key(k)), dk),
        _tiles(_behind_one(a.by_key(v)), cuts * width),
        _tiles(pad_axis(codebook, 1, a.padded_codes), dk),
        _tiles(_means(means, a).astype(v.dtype), cuts * width),
        a.columns(log_counts, valid)[:, :, 0],
        a.cells(bias),
    )
    out = out.reshape(a.lead, a.blocks, a.rows, cuts * width)[..., :dv]
    return a.from_rows(out), a.from_rows(lse.reshape(a.lead, a.blocks, a.rows))


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
    _check(q)
    batch, heads, dk = q.shape
    groups, lags, dv = keys.shape[1], keys.shape[2], values.shape[3]
    codes, share, lead = codebook.shape[1], heads // groups, batch * groups
    rows, tile = round_up(share, _ROWS), 64
    wide, (cuts, width) = round_up(dk, 64), _cut(dv, q.dtype)
    recent, cached = round_up(lags, tile), round_up(codes, tile)
    hidden = jnp.where(visible, 0.0, MASKED).astype(jnp.float32)
    hidden = jnp.broadcast_to(pad_axis(hidden, 1, recent, MASKED)[:, None], (batch, groups, recent))
    columns = jnp.concatenate([hidden, pad_axis(log_counts, 2, cached, MASKED)], axis=2)
    if bias is None:
        cells = jnp.zeros((1, 1, rows, recent), jnp.float32)
    else:
        full = bias.astype(jnp.float32).reshape(-1, 1, share, lags)
        cells = pad_axis(pad_axis(full, 2, rows), 3, recent)

    def flat(x: jax.Array, size: int, last: int) -> jax.Array:
        return _tiles(pad_axis(x.reshape(lead, -1, x.shape[-1]), 1, size), last)

    kernel = partial(
        _forward_kernel,
        groups=groups,
        row_tiles=rows // _ROWS,
        tile=tile,
        recent=recent // tile,
        cached=cached // tile,
        block_keys=0,
        width=width,
    )
    (out,) = launch(
        kernel,
        [jax.ShapeDtypeStruct((lead, rows, cuts * width), q.dtype)],
        (lead, rows // _ROWS, cuts),
        name="vq_attention_decode",
        interpret=interpret,
    )(
        flat(q, rows, wide),
        flat(keys, recent, wide),
        flat(values, recent, cuts * width),
        _tiles(pad_axis(codebook, 1, cached), wide),
        flat(means.astype(values.dtype), cached, cuts * width),
        columns.reshape(lead, 1, recent + cached),
        cells,
    )
    return out[:, :share, :dv].reshape(batch, heads, dv)


def _query_kernel(
    machine,
    ids,
    q,
    keys,
    values,
    codes,
    means,
    columns,
    cells,
    lse,
    delta,
    g,
    bar_q,
    bar_cells=None,
    *,
    a: Layout,
):
    lead, i, _ = ids
    block, row = i // a.row_tiles, _mod(i, a.row_tiles) * _ROWS
    dk, dv, group = q.shape[-1], values.shape[-1], _mod(lead, a.groups)
    cell, rows = _cells_at(cells, a.groups, lead, block), pl.ds(i * _ROWS, _ROWS)
    recent, tile = 2 * a.key_tiles, a.tile_columns

    def fold(first, with_cells, q_tile, g_tile):
        def body(j, total, key_tile, value_tile):
            at = pl.ds((first + j) * tile, tile)
            scores = machine.dot(q_tile, key_tile)
            scores = scores + _spread(machine.per_column(columns, (lead, block, at)), scores, 1)
            if with_cells:
                scores = scores + machine.matrix(cells, (*cell, pl.ds(row, _ROWS), at))
            weights = jnp.exp(scores - _spread(machine.per_row(lse, (lead, rows)), scores, 0))
            shift = _spread(machine.per_row(delta, (lead, rows)), scores, 0)
            at_scores = weights * (machine.dot(g_tile, value_tile) - shift)
            if with_cells and bar_cells is not None:
                machine.store_plain(bar_cells, (lead, block, pl.ds(row, _ROWS), at), at_scores)
            return machine.add_dot(total, at_scores, key_tile)

        return body

    def run(q_tile, g_tile):
        near = lambda j: block * a.keys + j * tile
        tiles = (
            Tile(keys, lambda j: (lead, near(j), 0), (tile, dk)),
            Tile(values, lambda j: (lead, near(j), 0), (tile, dv)),
        )
        body = fold(0, True, q_tile, g_tile)
        total = machine.stream(tiles, recent, body, machine.full((_ROWS, dk), 0.0))
        here = lambda j: block * a.padded_codes + j * tile
        tiles = (
            Tile(codes, lambda j: (group, j * tile, 0), (tile, dk)),
            Tile(means, lambda j: (lead, here(j), 0), (tile, dv)),
        )
        body = fold(recent, False, q_tile, g_tile)
        total = machine.stream(tiles, a.code_tiles, body, total)
        machine.store(bar_q, (lead, rows, pl.ds(0, dk)), total)

    tiles = (
        Tile(q, lambda _: (lead, i * _ROWS, 0), (_ROWS, dk)),
        Tile(g, lambda _: (lead, i * _ROWS, 0), (_ROWS, dv)),
    )
    machine.fetch(tiles, run)


def _key_kernel(
    machine,
    ids,
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
    *,
    a: Layout,
):
    """Everything transposed: 64 keys are the rows, and the queries that see them the columns."""
    lead, i, _ = ids
    per_block = a.keys // _ROWS
    block, first = i // per_block, _mod(i, per_block) * _ROWS
    dk, dv = q.shape[-1], values.shape[-1]

    def fold(seen_from, column, key_tile, value_tile):
        at = pl.ds(column, _ROWS)
        cell = _cells_at(cells, a.groups, lead, seen_from)

        def body(j, carry, q_tile, g_tile):
            bar_key, bar_value = carry
            row = pl.ds(seen_from * a.rows + j * _ROWS, _ROWS)
            scores = machine.dot(key_tile, q_tile)
            scores = scores + _spread(machine.per_row(columns, (lead, seen_from, at)), scores, 0)
            scores = scores + machine.matrix(cells, (*cell, at, pl.ds(j * _ROWS, _ROWS)))
            weights = jnp.exp(scores - _spread(machine.per_column(lse, (lead, row)), scores, 1))
            bar_value = machine.add_dot(bar_value, weights, g_tile)
            shift = _spread(machine.per_column(delta, (lead, row)), scores, 1)
            at_scores = weights * (machine.dot(value_tile, g_tile) - shift)
            return machine.add_dot(bar_key, at_scores, q_tile), bar_value

        return body

    def at_row(seen_from, j):
        return lead, seen_from * a.rows + j * _ROWS, 0

    def run(key_tile, value_tile):
        carry = machine.full((_ROWS, dk), 0.0), machine.full((_ROWS, dv), 0.0)
        # From the block itself, then from the next, where there is one.
        later = jnp.where(block + 1 < a.blocks, a.row_tiles, 0).astype(jnp.int32)
        for seen_from, column, count in (
            (block, a.keys + first, a.row_tiles),
            (block + 1, first, later),
        ):
            place = partial(at_row, seen_from)
            tiles = Tile(q, place, (_ROWS, dk)), Tile(g, place, (_ROWS, dv))
            carry = machine.stream(
                tiles, count, fold(seen_from, column, key_tile, value_tile), carry
            )
        rows = pl.ds(i * _ROWS, _ROWS)
        machine.store(bar_keys, (lead, rows, pl.ds(0, dk)), carry[0])
        machine.store(bar_values, (lead, rows, pl.ds(0, dv)), carry[1])

    # One empty block stands before the keys.
    own = lambda _: (lead, a.keys + i * _ROWS, 0)
    machine.fetch((Tile(keys, own, (_ROWS, dk)), Tile(values, own, (_ROWS, dv))), run)


def _mean_kernel(machine, ids, q, codes, columns, lse, g, bar_means, *, a: Layout, width: int):
    lead, i, part = ids
    per_block = a.padded_codes // _ROWS
    block, first = i // per_block, _mod(i, per_block) * _ROWS
    dk, cut = q.shape[-1], part * width

    def run(code_tile):
        def body(j, total, q_tile, g_tile):
            at = pl.ds(2 * a.keys + first, _ROWS)
            row = pl.ds(block * a.rows + j * _ROWS, _ROWS)
            scores = machine.dot(code_tile, q_tile)
            scores = scores + _spread(machine.per_row(columns, (lead, block, at)), scores, 0)
            weights = jnp.exp(scores - _spread(machine.per_column(lse, (lead, row)), scores, 1))
            return machine.add_dot(total, weights, g_tile)

        row = lambda j: block * a.rows + j * _ROWS
        tiles = (
            Tile(q, lambda j: (lead, row(j), 0), (_ROWS, dk)),
            Tile(g, lambda j: (lead, row(j), cut), (_ROWS, width)),
        )
        total = machine.stream(tiles, a.row_tiles, body, machine.full((_ROWS, width), 0.0))
        machine.store(bar_means, (lead, pl.ds(i * _ROWS, _ROWS), pl.ds(cut, width)), total)

    group = _mod(lead, a.groups)
    machine.fetch((Tile(codes, lambda _: (group, first, 0), (_ROWS, dk)),), run)


def _table_kernel(
    machine,
    ids,
    q,
    keys,
    values,
    columns,
    cells,
    lse,
    delta,
    g,
    bar_cells,
    *,
    a: Layout,
    steps: int,
):
    """The sum over `steps` of all (sequence, block), of one tile of cells."""
    group, i, part = ids
    tile, across = a.tile_columns, 2 * a.key_tiles
    row, at = i // across * _ROWS, pl.ds(_mod(i, across) * tile, tile)
    dk, dv = q.shape[-1], values.shape[-1]
    cell = pl.ds(row, _ROWS)

    def place(j):
        step = part * steps + j
        return step // a.blocks * a.groups + group, _mod(step, a.blocks)

    def body(j, total, q_tile, key_tile, value_tile, g_tile):
        lead, block = place(j)
        rows = pl.ds(block * a.rows + row, _ROWS)
        scores = machine.dot(q_tile, key_tile) + machine.matrix(cells, (group, 0, cell, at))
        scores = scores + _spread(machine.per_column(columns, (lead, block, at)), scores, 1)
        weights = jnp.exp(scores - _spread(machine.per_row(lse, (lead, rows)), scores, 0))
        shift = _spread(machine.per_row(delta, (lead, rows)), scores, 0)
        return total + weights * (machine.dot(g_tile, value_tile) - shift)

    def of_row(j):
        lead, block = place(j)
        return lead, block * a.rows + row, 0

    def of_key(j):
        lead, block = place(j)
        return lead, block * a.keys + _mod(i, across) * tile, 0

    tiles = (
        Tile(q, of_row, (_ROWS, dk)),
        Tile(keys, of_key, (tile, dk)),
        Tile(values, of_key, (tile, dv)),
        Tile(g, of_row, (_ROWS, dv)),
    )
    total = machine.stream(tiles, steps, body, machine.full((_ROWS, tile), 0.0))
    machine.store_plain(bar_cells, (group, part, cell, at), total)


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
    _check(q)
    dk, dv = round_up(q.shape[-1], 64), round_up(v.shape[-1], 64)
    if dk + dv > 256:
        raise NotImplementedError(
            f"the kernel's sums take registers for dk + dv up to 256 in steps of 64; "
            f"got {q.shape[-1]} and {v.shape[-1]}."
        )
    a = _layout(q, codebook, block_length, window, block_sizes)
    delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    rows, g = _tiles(a.by_row(q), dk), _tiles(a.by_row(cotangent), dv)
    keys, values = _tiles(_behind_one(a.by_key(k)), dk), _tiles(_behind_one(a.by_key(v)), dv)
    codes = _tiles(pad_axis(codebook, 1, a.padded_codes), dk)
    cache = _tiles(_means(means, a).astype(v.dtype), dv)
    columns, cells = a.columns(log_counts, valid)[:, :, 0], a.cells(bias)
    # Rows of padding see nothing.
    lse = a.by_row(lse, -MASKED).reshape(a.lead, -1)
    delta = a.by_row(delta).reshape(a.lead, -1)
    run = partial(launch, interpret=interpret)
    struct = jax.ShapeDtypeStruct

    by_query = bias is not None and bias.ndim == 4
    bar_q, *bar_cells = run(
        partial(_query_kernel, a=a),
        [
            struct((a.lead, a.blocks * a.rows, dk), q.dtype),
            *([struct(cells.shape, jnp.float32)] if by_query else []),
        ],
        (a.lead, a.blocks * a.row_tiles, 1),
        name="vq_attention_query",
    )(rows, keys, values, codes, cache, columns, cells, lse, delta, g)
    bar_k, bar_v = run(
        partial(_key_kernel, a=a),
        [
            struct((a.lead, a.blocks * a.keys, dk), k.dtype),
            struct((a.lead, a.blocks * a.keys, dv), v.dtype),
        ],
        (a.lead, a.blocks * a.keys // _ROWS, 1),
        name="vq_attention_keys",
    )(rows, keys, values, columns, jnp.swapaxes(cells, 2, 3), lse, delta, g)
    (bar_means,) = run(
        partial(_mean_kernel, a=a, width=dv),
        [struct((a.lead, a.blocks * a.padded_codes, dv), jnp.float32)],
        (a.lead, a.blocks * a.padded_codes // _ROWS, 1),
        name="vq_attention_means",
    )(rows, codes, columns, lse, g)

    bar_bias = None
    if bias is not None and by_query:
        bar_bias = a.cotangent_of_bias(bar_cells[0], bias).astype(bias.dtype)
    elif bias is not None:
        tiles, total = a.row_tiles * 2 * a.key_tiles, a.batch * a.blocks
        wanted = max(_PROGRAMS // (a.groups * tiles), 1)
        parts = max(p for p in range(1, min(wanted, total) + 1) if total % p == 0)
        (table,) = run(
            partial(_table_kernel, a=a, steps=total // parts),
            [struct((a.groups, parts, a.rows, 2 * a.keys), jnp.float32)],
            (a.groups, tiles, parts),
            name="vq_attention_table",
        )(rows, keys, values, columns, cells, lse, delta, g)
        table = jnp.sum(table, axis=1, keepdims=True)
        bar_bias = a.cotangent_of_bias(table, bias).astype(bias.dtype)

    def block_wise(x: jax.Array, size: int) -> jax.Array:
        return x.reshape(a.lead, a.blocks, size, x.shape[-1])

    bar_means = block_wise(bar_means, a.padded_codes)[:, :, : a.codes, : v.shape[-1]]
    return (
        a.from_rows(block_wise(bar_q, a.rows)[..., : q.shape[-1]]),
        a.from_keys(block_wise(bar_k, a.keys)[..., : q.shape[-1]]),
        a.from_keys(block_wise(bar_v, a.keys)[..., : v.shape[-1]]),
        bar_means.reshape(means.shape).astype(means.dtype),
        bar_bias,
    )
