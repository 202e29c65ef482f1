"""GPU kernels (Mosaic): one head and a tile of nodes a program, modes in a loop.

Each thread keeps its nodes and the eight sums in registers; the ten scalars of a mode are uniform
loads. The backward kernel writes one partial sum for each tile, which are added afterwards in a
fixed order: no atomics, so the result is deterministic.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxkit_kernels import _blocks, _mosaic_gpu
from jaxkit_kernels.cauchy import body
from jaxkit_kernels.cauchy.nodes import half_angles

__all__ = ["backward", "forward"]

_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.CauchyGpuBlocks] = {}


def _sizes(
    shape: tuple[int, ...], length: int, given: _blocks.BlockSizes | None
) -> _blocks.CauchyGpuBlocks:
    def heuristic() -> _blocks.CauchyGpuBlocks:
        # Four nodes a thread hide the latency of a division and leave registers for the sums;
        # short sequences take smaller tiles, so that there are enough of them.
        long = shape[0] * (length // 2) >= 132 * 512 * 2
        return _blocks.CauchyGpuBlocks(nodes=512 if long else 128, nodes_backward=512)

    return _blocks.choose(
        given, _blocks.CauchyGpuBlocks, _TABLE, "cuda", (*shape, length), heuristic
    )


def _nodes(length: int, tile: int) -> tuple[np.ndarray, int]:
    tiles = -(-(length // 2 + 1) // tile)
    both = np.stack(half_angles(length, padded=tiles * tile))
    return both.astype(np.float32), tiles


def _forward_kernel(head, tile_index, scalars, nodes, out, *, modes: int, tile: int):
    at = pl.ds(tile_index * tile, tile)
    load = lambda k, n: scalars[head, k, n]
    re, im = body.forward_tile(load, modes, False, nodes[0, at], nodes[1, at])
    out[head, 0, at] = re
    out[head, 1, at] = im


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
    body.check_operands(alpha, re)
    _mosaic_gpu.check_device()
    heads, modes = alpha.shape
    tile = _sizes(alpha.shape, length, block_sizes).nodes
    nodes, tiles = _nodes(length, tile)
    scalars = jnp.concatenate([alpha[:, None], beta[:, None], re, im], axis=1)
    out = _mosaic_gpu.launch(
        partial(_forward_kernel, modes=modes, tile=tile),
        jax.ShapeDtypeStruct((heads, 2, tiles * tile), jnp.float32),
        (heads, tiles),
        name="dplr_forward",
        interpret=interpret,
    )(scalars, jnp.asarray(nodes))
    flat = out[:, :, : length // 2 + 1]
    return flat[:, 0], flat[:, 1]


def _backward_kernel(head, tile_index, scalars, nodes, cotangents, out, *, modes: int, tile: int):
    at = pl.ds(tile_index * tile, tile)
    load = lambda k, n: scalars[head, k, n]
    sine, cosine = nodes[0, at], nodes[1, at]
    d_re, d_im = body.sum_cotangents(
        load, modes, False, sine, cosine, cotangents[head, 0, at], cotangents[head, 1, at]
    )

    def step(n, carry):
        terms = body.mode_cotangents(load, n, False, sine, cosine, d_re, d_im)
        for k, term in enumerate(terms):
            out[head, tile_index, k, n] = jnp.sum(term)
        return carry

    jax.lax.fori_loop(0, modes, step, 0)


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
    body.check_operands(alpha, re)
    _mosaic_gpu.check_device()
    heads, modes = alpha.shape
    tile = _sizes(alpha.shape, length, block_sizes).nodes_backward
    nodes, tiles = _nodes(length, tile)
    scalars = jnp.concatenate([alpha[:, None], beta[:, None], re, im], axis=1)
    cotangents = jnp.stack([ct_re, ct_im], axis=1)
    extra = tiles * tile - cotangents.shape[-1]
    cotangents = jnp.pad(cotangents, ((0, 0), (0, 0), (0, extra)))
    partials = _mosaic_gpu.launch(
        partial(_backward_kernel, modes=modes, tile=tile),
        jax.ShapeDtypeStruct((heads, tiles, body.PARAMETERS, modes), jnp.float32),
        (heads, tiles),
        name="dplr_backward",
        interpret=interpret,
    )(scalars, jnp.asarray(nodes), cotangents)
    bars = jnp.sum(partials, axis=1)
    return bars[:, 0], bars[:, 1], bars[:, 2:6], bars[:, 6:10]
