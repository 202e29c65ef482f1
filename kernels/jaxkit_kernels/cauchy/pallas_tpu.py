"""TPU kernels: one head and a tile of [rows, 128] nodes a program, modes in a loop.

The ten scalars of each mode come from scalar memory, so that a program is elementwise vector
arithmetic alone. The backward kernel walks over the tiles of a head in order and adds in VMEM,
which makes the reduction over nodes deterministic.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxkit_kernels import _blocks, _sharding
from jaxkit_kernels.cauchy import body
from jaxkit_kernels.cauchy.nodes import half_angles

__all__ = ["backward", "forward"]

_LANES = 128
# The backward kernel holds [10, modes, 128] sums in VMEM: 5 MiB at this many modes.
_MOST_MODES = 1024
_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.CauchyTpuBlocks] = {}


def _tiles(
    shape: tuple[int, ...], length: int, sizes: _blocks.BlockSizes | None
) -> tuple[np.ndarray, int, int]:
    """Nodes [2, tiles * rows, 128], rows of a tile, number of tiles."""
    needed = -(-(length // 2 + 1) // _LANES)

    def heuristic() -> _blocks.CauchyTpuBlocks:
        # Eight accumulators of 16 rows are 16 of the 64 vector registers.
        return _blocks.CauchyTpuBlocks(rows=8 if needed <= 8 else 16)

    rows = _blocks.choose(
        sizes, _blocks.CauchyTpuBlocks, _TABLE, "tpu", (*shape, length), heuristic
    ).rows
    tiles = -(-needed // rows)
    both = np.stack(half_angles(length, padded=tiles * rows * _LANES))
    return both.reshape(2, tiles * rows, _LANES).astype(np.float32), rows, tiles


def _check(alpha: jax.Array, re: jax.Array) -> None:
    body.check_operands(alpha, re)
    if alpha.shape[1] > _MOST_MODES:
        raise NotImplementedError(
            f"the kernel takes at most {_MOST_MODES} modes; got {alpha.shape[1]}."
        )


def _forward_kernel(scalars, nodes, out, *, modes: int):
    sine, cosine = nodes[0], nodes[1]
    re, im = body.forward_tile(lambda k, n: scalars[k, n], modes, False, sine, cosine)
    out[0] = re
    out[1] = im


def forward(
    alpha: jax.Array,
    beta: jax.Array,
    re: jax.Array,
    im: jax.Array,
    *,
    length: int,
    block_sizes: _blocks.BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`, rank one and float32."""
    _check(alpha, re)
    heads, modes = alpha.shape
    nodes, rows, tiles = _tiles(alpha.shape, length, block_sizes)
    scalars = jnp.concatenate([alpha[:, None], beta[:, None], re, im], axis=1)
    out = pl.pallas_call(
        partial(_forward_kernel, modes=modes),
        grid=(heads, tiles),
        in_specs=[
            pl.BlockSpec(
                (None, body.PARAMETERS, modes),
                lambda head, tile: (head, 0, 0),
                memory_space=pltpu.SMEM,
            ),
            pl.BlockSpec((2, rows, _LANES), lambda head, tile: (0, tile, 0)),
        ],
        out_specs=pl.BlockSpec((None, 2, rows, _LANES), lambda head, tile: (head, 0, tile, 0)),
        out_shape=_sharding.result((heads, 2, tiles * rows, _LANES), jnp.float32, scalars),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="dplr_forward",
    )(scalars, jnp.asarray(nodes))
    flat = out.reshape(heads, 2, -1)[:, :, : length // 2 + 1]
    return flat[:, 0], flat[:, 1]


def _backward_kernel(scalars, nodes, cotangents, out, sums, *, modes: int):
    tile = pl.program_id(1)
    sine, cosine = nodes[0], nodes[1]
    load = lambda k, n: scalars[k, n]
    d_re, d_im = body.sum_cotangents(load, modes, False, sine, cosine, cotangents[0], cotangents[1])

    @pl.when(tile == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    def step(n, _):
        terms = body.mode_cotangents(load, n, False, sine, cosine, d_re, d_im)
        for k, term in enumerate(terms):
            sums[k, pl.ds(n, 1), :] += jnp.sum(term, axis=0, keepdims=True)

    jax.lax.fori_loop(0, modes, step, None)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        for k in range(body.PARAMETERS):
            out[k, :] = jnp.sum(sums[k], axis=-1)


def backward(
    alpha: jax.Array,
    beta: jax.Array,
    re: jax.Array,
    im: jax.Array,
    ct_re: jax.Array,
    ct_im: jax.Array,
    *,
    length: int,
    block_sizes: _blocks.BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cotangents of `forward`'s arrays."""
    _check(alpha, re)
    heads, modes = alpha.shape
    nodes, rows, tiles = _tiles(alpha.shape, length, block_sizes)
    scalars = jnp.concatenate([alpha[:, None], beta[:, None], re, im], axis=1)
    cotangents = jnp.stack([ct_re, ct_im], axis=1)
    extra = tiles * rows * _LANES - cotangents.shape[-1]
    cotangents = jnp.pad(cotangents, ((0, 0), (0, 0), (0, extra)))
    bars = pl.pallas_call(
        partial(_backward_kernel, modes=modes),
        grid=(heads, tiles),
        in_specs=[
            pl.BlockSpec(
                (None, body.PARAMETERS, modes),
                lambda head, tile: (head, 0, 0),
                memory_space=pltpu.SMEM,
            ),
            pl.BlockSpec((2, rows, _LANES), lambda head, tile: (0, tile, 0)),
            pl.BlockSpec((None, 2, rows, _LANES), lambda head, tile: (head, 0, tile, 0)),
        ],
        out_specs=pl.BlockSpec((None, body.PARAMETERS, modes), lambda head, tile: (head, 0, 0)),
        out_shape=_sharding.result((heads, body.PARAMETERS, modes), jnp.float32, scalars),
        scratch_shapes=[pltpu.VMEM((body.PARAMETERS, modes, _LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="dplr_backward",
    )(scalars, jnp.asarray(nodes), cotangents.reshape(heads, 2, tiles * rows, _LANES))
    return bars[:, 0], bars[:, 1], bars[:, 2:6], bars[:, 6:10]
