"""GPU kernels (Mosaic, Hopper): 64 rows a program, products on the tensor cores.

Takes bfloat16 and float16: a float32 product on the tensor cores keeps ten bits, so that float32
input is left to the pure-JAX form, which computes in full float32. `layout` says what rows and
columns are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxkit_kernels import _blocks, _mosaic_gpu
from jaxkit_kernels.vq_attention.hopper import Tile, launch
from jaxkit_kernels.vq_attention.layout import Layout, pad_axis, round_up
from jaxkit_kernels.vq_attention.reference import MASKED

__all__ = ["decode", "forward"]

_ROWS = 64
# The sum of 64 rows of outputs takes half as many registers of each thread as it has columns.
_MOST_VALUES = 256
_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.VqAttentionGpuBlocks] = {}


def _check(q: jax.Array) -> None:
    if q.dtype not in (jnp.dtype("bfloat16"), jnp.dtype("float16")):
        raise NotImplementedError(f"the kernel takes bfloat16 or float16; got {q.dtype}.")
    if q.shape[-1] > 256:
        raise NotImplementedError(f"the kernel takes dk up to 256; got {q.shape[-1]}.")
    _mosaic_gpu.check_device()


def _parts(dv: int) -> tuple[int, int]:
    """How many parts the values are cut in, and the width of one."""
    parts = -(-dv // _MOST_VALUES)
    return parts, round_up(-(-dv // parts), 64)


def _columns_of_tile(
    shape: tuple[int, ...], length: int, codes: int, given: _blocks.BlockSizes | None
) -> int:
    def heuristic() -> _blocks.VqAttentionGpuBlocks:
        return _blocks.VqAttentionGpuBlocks(keys=64)

    return _blocks.choose(
        given, _blocks.VqAttentionGpuBlocks, _TABLE, "cuda", (*shape, length, codes), heuristic
    ).keys


def _layout(
    q: jax.Array,
    codebook: jax.Array,
    length: int,
    window: int,
    block_sizes: _blocks.BlockSizes | None,
) -> Layout:
    batch, heads, time, _ = q.shape
    groups, codes = codebook.shape[:2]
    columns = _columns_of_tile(q.shape, length, codes, block_sizes)
    return Layout(batch, heads, groups, time // length, length, window, codes, _ROWS, columns)


def _flat(x: jax.Array, width: int) -> jax.Array:
    """[lead, blocks, rows, d] -> [lead, blocks rows, width]."""
    return pad_axis(x.reshape(x.shape[0], -1, x.shape[-1]), 2, width)


def _recent(x: jax.Array, width: int) -> jax.Array:
    """The same behind one empty block, so that the 2 L keys of block r start at block r."""
    return _flat(jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))), width)


def _cell_lead(cells: jax.Array, groups: int, lead: Any) -> Any:
    if cells.shape[0] == 1:
        return 0
    return lax.rem(lead, jnp.int32(groups)) if cells.shape[0] == groups else lead


def _spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])


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
    block, row = i // row_tiles, lax.rem(i, jnp.int32(row_tiles)) * _ROWS
    dk = q.shape[-1]
    cell_lead = _cell_lead(cells, groups, lead)
    cell_block = block if cells.shape[1] > 1 else 0
    cut = pl.ds(part * width, width)
    whole = pl.ds(0, dk)

    def fold(first, with_cells, q_tile):
        def body(j, carry, key_tile, value_tile):
            peak, norm, total = carry
            at = (first + j) * tile
            scores = machine.dot(q_tile, key_tile)
            column = machine.per_column(columns, (lead, block, pl.ds(at, tile)))
            scores = scores + _spread(column, scores.shape, 1)
            if with_cells:
                cell = (cell_lead, cell_block, pl.ds(row, _ROWS), pl.ds(at, tile))
                scores = scores + machine.matrix(cells, cell)
            new = jnp.maximum(peak, jnp.max(scores, axis=1))
            weights = jnp.exp(scores - _spread(new, scores.shape, 0))
            shrink = jnp.exp(peak - new)
            norm = norm * shrink + jnp.sum(weights, axis=1)
            total = total * _spread(shrink, total.shape, 0)
            return new, norm, machine.add_dot(total, weights, value_tile)

        return body

    def run(q_tile):
        # Above every masked score, so that the weights of a row that sees nothing vanish.
        carry = (
            machine.full((_ROWS,), MASKED / 2),
            machine.full((_ROWS,), 0.0),
            machine.full((_ROWS, width), 0.0),
        )
        near = lambda j: pl.ds(block * block_keys + j * tile, tile)
        carry = machine.stream(
            (
                Tile(keys, lambda j: (lead, near(j), whole), (tile, dk)),
                Tile(values, lambda j: (lead, near(j), cut), (tile, width)),
            ),
            recent,
            fold(0, True, q_tile),
            carry,
        )
        group = lax.rem(lead, jnp.int32(groups))
        here = lambda j: pl.ds((block * cached + j) * tile, tile)
        peak, norm, total = machine.stream(
            (
                Tile(codes, lambda j: (group, pl.ds(j * tile, tile), whole), (tile, dk)),
                Tile(means, lambda j: (lead, here(j), cut), (tile, width)),
            ),
            cached,
            fold(recent, False, q_tile),
            carry,
        )
        safe = jnp.where(norm > 0, norm, 1.0)
        machine.store(
            out, (lead, pl.ds(i * _ROWS, _ROWS), cut), total / _spread(safe, total.shape, 0)
        )
        if lse is not None:

            @pl.when(part == 0)
            def _():
                value = jnp.where(norm > 0, peak + jnp.log(safe), -MASKED)
                machine.store_plain(lse, (lead, pl.ds(i * _ROWS, _ROWS)), value)

    machine.fetch((Tile(q, lambda _: (lead, pl.ds(i * _ROWS, _ROWS), whole), (_ROWS, dk)),), run)


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
    """As `reference.forward`, bfloat16 or float16."""
    _check(q)
    a = _layout(q, codebook, block_length, window, block_sizes)
    dk, dv = round_up(q.shape[-1], 64), v.shape[-1]
    parts, width = _parts(dv)
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
            jax.ShapeDtypeStruct((a.lead, a.blocks * a.rows, parts * width), q.dtype),
            jax.ShapeDtypeStruct((a.lead, a.blocks * a.rows), jnp.float32),
        ],
        (a.lead, a.blocks * a.row_tiles, parts),
        name="vq_attention_forward",
        interpret=interpret,
    )(
        _flat(a.by_row(q), dk),
        _recent(a.by_key(k), dk),
        _recent(a.by_key(v), parts * width),
        pad_axis(pad_axis(codebook, 1, a.padded_codes), 2, dk),
        _flat(_means(means, a).astype(v.dtype), parts * width),
        a.columns(log_counts, valid)[:, :, 0],
        a.cells(bias),
    )
    out = out.reshape(a.lead, a.blocks, a.rows, parts * width)[..., :dv]
    return a.from_rows(out), a.from_rows(lse.reshape(a.lead, a.blocks, a.rows))


def _means(means: jax.Array, a: Layout) -> jax.Array:
    flat = means.reshape(a.lead, a.blocks, a.codes, means.shape[-1])
    return pad_axis(flat, 2, a.padded_codes)


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
    wide, (parts, width) = round_up(dk, 64), _parts(dv)
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
        return pad_axis(pad_axis(x.reshape(lead, -1, x.shape[-1]), 1, size), 2, last)

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
        [jax.ShapeDtypeStruct((lead, rows, parts * width), q.dtype)],
        (lead, rows // _ROWS, parts),
        name="vq_attention_decode",
        interpret=interpret,
    )(
        flat(q, rows, wide),
        flat(keys, recent, wide),
        flat(values, recent, parts * width),
        pad_axis(pad_axis(codebook, 1, cached), 2, wide),
        flat(means.astype(values.dtype), cached, parts * width),
        columns.reshape(lead, 1, recent + cached),
        cells,
    )
    return out[:, :share, :dv].reshape(batch, heads, dv)
