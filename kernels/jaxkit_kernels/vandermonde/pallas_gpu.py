"""GPU kernels (Mosaic): the two-level form for one head and rows of 128 positions a program.

A thread owns one position within the rows. For each mode it takes one exponential, which meets the
powers at the starts of the rows (uniform loads of an array of L / 128 numbers a mode) in two
multiply-adds a row. Full float32 throughout; no atomics.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxkit_kernels import _blocks, _mosaic_gpu
from jaxkit_kernels.vandermonde import phase
from jaxkit_kernels.vandermonde.xla import from_moments, powers

__all__ = ["backward", "forward"]

_LANES = 128
_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.VandermondeGpuBlocks] = {}


def _check(alpha: jax.Array) -> None:
    if alpha.dtype != jnp.float32:
        raise NotImplementedError(f"the kernel computes in float32; got {alpha.dtype}.")
    if alpha.size == 0:
        raise NotImplementedError(f"the kernel takes no empty array; got shape {alpha.shape}.")
    _mosaic_gpu.check_device()


def _tiles(
    shape: tuple[int, ...], length: int, sizes: _blocks.BlockSizes | None
) -> tuple[int, int]:
    needed = -(-length // _LANES)

    def heuristic() -> _blocks.VandermondeGpuBlocks:
        # More rows share an exponential; fewer give more programs. Two for each of 132 cores.
        rows = 16
        while rows > 1 and (rows >= 2 * needed or shape[0] * needed < 2 * 132 * rows):
            rows //= 2
        return _blocks.VandermondeGpuBlocks(rows=rows)

    rows = _blocks.choose(
        sizes, _blocks.VandermondeGpuBlocks, _TABLE, "cuda", (*shape, length), heuristic
    ).rows
    return rows, -(-needed // rows)


def _operands(alpha, beta, rows: int, tiles: int):
    """Scalars [heads, 4, modes], and the powers at the starts of the rows."""
    scalars = jnp.stack([alpha, *phase.split_turns(beta)], axis=1)
    return scalars, powers(alpha, beta, np.arange(tiles * rows) * _LANES)


def _within(scalars, head, n, index):
    """exp((-alpha + i beta) index) for the positions within a row."""
    turns = scalars[head, 1, n], scalars[head, 2, n], scalars[head, 3, n]
    angle = phase.TURN * phase.fraction_of((index,), turns)
    size = jnp.exp(-scalars[head, 0, n] * index)
    return size * jnp.cos(angle), size * jnp.sin(angle)


def _forward_kernel(head, tile_index, scalars, starts, index_ref, out, *, modes: int, rows: int):
    first = tile_index * rows
    index = index_ref[...]

    def step(n, carry):
        in_re, in_im = _within(scalars, head, n, index)
        return [
            total + starts[head, 0, n, first + r] * in_re - starts[head, 1, n, first + r] * in_im
            for r, total in enumerate(carry)
        ]

    # Not a constant: Mosaic GPU lays out constants otherwise, and a loop must keep the layout.
    totals = jax.lax.fori_loop(0, modes, step, [0.0 * index for _ in range(rows)])
    for r, total in enumerate(totals):
        out[head, pl.ds((first + r) * _LANES, _LANES)] = total


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
    heads, modes = alpha.shape
    rows, tiles = _tiles(alpha.shape, length, block_sizes)
    scalars, (at_re, at_im) = _operands(alpha, beta, rows, tiles)
    a, b = 2 * v_re[..., None], 2 * v_im[..., None]
    starts = jnp.stack([a * at_re - b * at_im, a * at_im + b * at_re], axis=1)
    out = _mosaic_gpu.launch(
        partial(_forward_kernel, modes=modes, rows=rows),
        jax.ShapeDtypeStruct((heads, tiles * rows * _LANES), jnp.float32),
        (heads, tiles),
        name="vandermonde_forward",
        interpret=interpret,
    )(scalars, starts, jnp.arange(_LANES, dtype=jnp.float32))
    return out[:, :length]


def _backward_kernel(
    head, tile_index, scalars, starts, index_ref, cotangent, out, *, modes: int, rows: int
):
    first = tile_index * rows
    index = index_ref[...]
    g = [cotangent[head, pl.ds((first + r) * _LANES, _LANES)] for r in range(rows)]

    def step(n, carry):
        y_re, y_im, z_re, z_im = (0.0 * index for _ in range(4))
        for r in range(rows):
            t_re = starts[head, 0, n, first + r] * g[r]
            t_im = starts[head, 1, n, first + r] * g[r]
            offset = ((first + r) * _LANES).astype(jnp.float32)
            y_re, y_im = y_re + t_re, y_im + t_im
            z_re, z_im = z_re + offset * t_re, z_im + offset * t_im
        z_re, z_im = z_re + index * y_re, z_im + index * y_im
        in_re, in_im = _within(scalars, head, n, index)
        out[head, tile_index, 0, n] = jnp.sum(y_re * in_re - y_im * in_im)
        out[head, tile_index, 1, n] = jnp.sum(y_re * in_im + y_im * in_re)
        out[head, tile_index, 2, n] = jnp.sum(z_re * in_re - z_im * in_im)
        out[head, tile_index, 3, n] = jnp.sum(z_re * in_im + z_im * in_re)
        return carry

    jax.lax.fori_loop(0, modes, step, 0)


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
    scalars, at = _operands(alpha, beta, rows, tiles)
    padded = jnp.pad(cotangent, ((0, 0), (0, tiles * rows * _LANES - length)))
    partials = _mosaic_gpu.launch(
        partial(_backward_kernel, modes=modes, rows=rows),
        jax.ShapeDtypeStruct((heads, tiles, 4, modes), jnp.float32),
        (heads, tiles),
        name="vandermonde_backward",
        interpret=interpret,
    )(scalars, jnp.stack(at, axis=1), jnp.arange(_LANES, dtype=jnp.float32), padded)
    moments = jnp.sum(partials, axis=1)
    return from_moments(v_re, v_im, [moments[:, k] for k in range(4)])
