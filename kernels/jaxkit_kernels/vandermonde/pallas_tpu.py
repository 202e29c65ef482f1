"""TPU kernels: the two-level form for one head and a tile of [rows, 128] positions a program.

Both factors are made in VMEM, modes along sublanes, and meet on the matrix unit in full float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxkit_kernels import _blocks, _sharding
from jaxkit_kernels.vandermonde import phase
from jaxkit_kernels.vandermonde.xla import from_moments

__all__ = ["backward", "forward"]

_LANES = 128
_COLUMNS = 8
# VMEM holds a few [modes, 128] arrays: 0.5 MiB each at this many modes.
_MOST_MODES = 1024
_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.VandermondeTpuBlocks] = {}


def _check(alpha: jax.Array) -> None:
    if alpha.dtype != jnp.float32:
        raise NotImplementedError(f"the kernel computes in float32; got {alpha.dtype}.")
    if alpha.shape[0] == 0 or not 1 <= alpha.shape[1] <= _MOST_MODES:
        raise NotImplementedError(
            f"the kernel takes 1 to {_MOST_MODES} modes and at least one head; got {alpha.shape}."
        )


def _tiles(
    shape: tuple[int, ...], length: int, sizes: _blocks.BlockSizes | None
) -> tuple[int, int]:
    needed = -(-length // _LANES)

    def heuristic() -> _blocks.VandermondeTpuBlocks:
        return _blocks.VandermondeTpuBlocks(rows=min(-(-needed // 8) * 8, _LANES))

    rows = _blocks.choose(
        sizes, _blocks.VandermondeTpuBlocks, _TABLE, "tpu", (*shape, length), heuristic
    ).rows
    return rows, -(-needed // rows)


def _columns(*parts: jax.Array) -> jax.Array:
    """[heads, modes padded to 8, 8]: one mode a row, zeros where there is none."""
    stacked = jnp.stack(parts, axis=-1)
    extra = -stacked.shape[1] % 8
    return jnp.pad(stacked, ((0, 0), (0, extra), (0, _COLUMNS - len(parts))))


def _powers(columns, position):
    """exp((-alpha + i beta) position) for int32 positions [modes, count]."""
    turns = columns[:, 1:2], columns[:, 2:3], columns[:, 3:4]
    angle = phase.TURN * phase.fraction(position, turns)
    size = jnp.exp(-columns[:, 0:1] * position.astype(jnp.float32))
    return size * jnp.cos(angle), size * jnp.sin(angle)


def _positions(modes: int, rows: int):
    inner = jax.lax.broadcasted_iota(jnp.int32, (modes, _LANES), 1)
    outer = jax.lax.broadcasted_iota(jnp.int32, (modes, rows), 1)
    return inner, (outer + pl.program_id(1) * rows) * _LANES


def _forward_kernel(columns_ref, out, *, rows: int):
    columns = columns_ref[...]
    inner, outer = _positions(columns.shape[0], rows)
    in_re, in_im = _powers(columns, inner)
    at_re, at_im = _powers(columns, outer)
    a, b = 2.0 * columns[:, 4:5], 2.0 * columns[:, 5:6]
    contract = partial(
        jax.lax.dot_general,
        dimension_numbers=(((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    out[...] = contract(a * at_re - b * at_im, in_re) - contract(a * at_im + b * at_re, in_im)


def forward(
    alpha: jax.Array,
    beta: jax.Array,
    v_re: jax.Array,
    v_im: jax.Array,
    *,
    length: int,
    block_sizes: _blocks.BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `reference.forward`, in float32."""
    _check(alpha)
    heads = alpha.shape[0]
    rows, tiles = _tiles(alpha.shape, length, block_sizes)
    columns = _columns(alpha, *phase.split_turns(beta), v_re, v_im)
    out = pl.pallas_call(
        partial(_forward_kernel, rows=rows),
        grid=(heads, tiles),
        in_specs=[
            pl.BlockSpec((None, *columns.shape[1:]), lambda head, tile: (head, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, rows, _LANES), lambda head, tile: (head, tile, 0)),
        out_shape=_sharding.result((heads, tiles * rows, _LANES), jnp.float32, columns),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="vandermonde_forward",
    )(columns)
    return out.reshape(heads, -1)[:, :length]


def _backward_kernel(columns_ref, cotangent, out, *, rows: int):
    @pl.when(pl.program_id(1) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    columns, g = columns_ref[...], cotangent[...]
    inner, outer = _positions(columns.shape[0], rows)
    in_re, in_im = _powers(columns, inner)
    at_re, at_im = _powers(columns, outer)
    offset, within = outer.astype(jnp.float32), inner.astype(jnp.float32)
    dot = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    y_re, y_im = dot(at_re, g), dot(at_im, g)
    z_re = dot(offset * at_re, g) + within * y_re
    z_im = dot(offset * at_im, g) + within * y_im
    moments = (
        y_re * in_re - y_im * in_im,
        y_re * in_im + y_im * in_re,
        z_re * in_re - z_im * in_im,
        z_re * in_im + z_im * in_re,
    )
    for k, moment in enumerate(moments):
        out[:, k : k + 1] += jnp.sum(moment, axis=1, keepdims=True)


def backward(
    alpha: jax.Array,
    beta: jax.Array,
    v_re: jax.Array,
    v_im: jax.Array,
    cotangent: jax.Array,
    *,
    length: int,
    block_sizes: _blocks.BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cotangents of `forward`'s arrays."""
    _check(alpha)
    heads, modes = alpha.shape
    rows, tiles = _tiles(alpha.shape, length, block_sizes)
    columns = _columns(alpha, *phase.split_turns(beta))
    padded = jnp.pad(cotangent, ((0, 0), (0, tiles * rows * _LANES - length)))
    per_head = lambda head, tile: (head, 0, 0)
    out = pl.pallas_call(
        partial(_backward_kernel, rows=rows),
        grid=(heads, tiles),
        in_specs=[
            pl.BlockSpec((None, *columns.shape[1:]), per_head),
            pl.BlockSpec((None, rows, _LANES), lambda head, tile: (head, tile, 0)),
        ],
        out_specs=pl.BlockSpec((None, *columns.shape[1:]), per_head),
        out_shape=_sharding.result(columns.shape, jnp.float32, columns),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="vandermonde_backward",
    )(columns, padded.reshape(heads, tiles * rows, _LANES))
    return from_moments(v_re, v_im, [out[:, :modes, k] for k in range(4)])
