"""The parts of a Mosaic GPU kernel that are Hopper's: tiles in shared memory, products by wgmma.

A kernel body is written against a machine with a few verbs. `Hopper` is one warpgroup with tiles
that arrive by TMA, one ahead of the arithmetic; `Plain` is ordinary JAX for interpret mode, since
the interpreter of `plgpu.kernel` knows neither layouts nor stores.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["Hopper", "Plain", "Tile", "launch"]

_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


class Tile(NamedTuple):
    """A source of tiles: which part of an array the program needs at step j.

    Attributes:
        ref: the array, in global memory.
        index: of step j, ending in two slices.
        shape: of a tile.
    """

    ref: Any
    index: Callable[[Any], tuple[Any, ...]]
    shape: tuple[int, int]


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    # 128-byte swizzle: the layout that wgmma reads without bank conflicts.
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Hopper:
    """One warpgroup. Matrices in registers have the layout of wgmma's accumulator."""

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        """A constant: a matrix, or a vector with one number a row."""
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else _ROWS
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def matrix(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """A matrix from global memory."""
        return plgpu.load(ref, index, layout=plgpu.Layout.WGMMA, optimized=False)

    def per_row(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """A vector from global memory with one number a row."""
        return plgpu.load(ref, index, layout=_ROWS, optimized=False)

    def per_column(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """A vector from global memory with one number a column."""
        return plgpu.load(ref, index, layout=_COLUMNS, optimized=False)

    def dot(self, a: Any, b: Any) -> jax.Array:
        """a b^T."""

        def multiply(acc):
            plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)))
            return acc[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def add_dot(self, total: jax.Array, a: jax.Array, b: Any) -> jax.Array:
        """total + a b, with a in registers, rounded to the dtype of b."""

        def multiply(acc):
            plgpu.wgmma(acc, a.astype(b.dtype), b)

        return pl.run_state(multiply)(plgpu.ACC.init(total))

    def fetch(self, tiles: Sequence[Tile], body: Callable[..., Any]) -> Any:
        """Call `body(*tiles)` with the tiles in shared memory."""

        def scoped(*scratch):
            *buffers, barrier = scratch
            for tile, buffer in zip(tiles, buffers, strict=True):
                plgpu.copy_gmem_to_smem(tile.ref.at[tile.index(0)], buffer, barrier)
            plgpu.barrier_wait(barrier)
            return body(*buffers)

        return pl.run_scoped(
            scoped,
            *(_shared(tile.shape, tile.ref.dtype) for tile in tiles),
            plgpu.Barrier(num_arrivals=len(tiles)),
        )

    def stream(
        self, tiles: Sequence[Tile], count: int, body: Callable[..., Any], carry: Any
    ) -> Any:
        """Fold `carry = body(j, carry, *tiles)` over the steps, the next tiles on their way."""

        def scoped(*scratch):
            *buffers, barrier = scratch
            two = jnp.int32(2)

            def start(j):
                slot = lax.rem(j, two)
                for tile, buffer in zip(tiles, buffers, strict=True):
                    source = tile.ref.at[tile.index(j)]
                    plgpu.copy_gmem_to_smem(source, buffer.at[slot], barrier.at[slot])

            start(jnp.int32(0))

            def step(j, carry):
                # The other slot was read one step ago, and its products have been waited for.
                @pl.when(j + 1 < count)
                def _():
                    start(j + 1)

                slot = lax.rem(j, two)
                plgpu.barrier_wait(barrier.at[slot])
                return body(j, carry, *(buffer.at[slot] for buffer in buffers))

            return lax.fori_loop(jnp.int32(0), jnp.int32(count), step, carry)

        return pl.run_scoped(
            scoped,
            *(_shared((2, *tile.shape), tile.ref.dtype) for tile in tiles),
            plgpu.Barrier(num_arrivals=len(tiles), num_barriers=2),
        )

    def store(self, ref: Any, index: tuple[Any, ...], value: jax.Array) -> None:
        """A matrix in the dtype of the array, through shared memory."""

        def scoped(buffer):
            buffer[...] = value.astype(ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, ref.at[index])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, _shared(value.shape, ref.dtype))

    def store_plain(self, ref: Any, index: tuple[Any, ...], value: jax.Array) -> None:
        """A float32 vector or matrix, from the registers."""
        ref[index] = value


class Plain:
    """The same verbs for interpret mode."""

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        """As `Hopper.full`."""
        return jnp.full(shape, value, jnp.float32)

    def matrix(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """As `Hopper.matrix`."""
        return ref[index]

    per_row = per_column = matrix

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """As `Hopper.dot`."""
        return jnp.dot(a, b.T, preferred_element_type=jnp.float32)

    def add_dot(self, total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """As `Hopper.add_dot`."""
        return total + jnp.dot(a.astype(b.dtype), b, preferred_element_type=jnp.float32)

    def fetch(self, tiles: Sequence[Tile], body: Callable[..., Any]) -> Any:
        """As `Hopper.fetch`."""
        return body(*(tile.ref[tile.index(0)] for tile in tiles))

    def stream(
        self, tiles: Sequence[Tile], count: int, body: Callable[..., Any], carry: Any
    ) -> Any:
        """As `Hopper.stream`."""

        def step(j, carry):
            return body(j, carry, *(tile.ref[tile.index(j)] for tile in tiles))

        return lax.fori_loop(jnp.int32(0), jnp.int32(count), step, carry)

    def store(self, ref: Any, index: tuple[Any, ...], value: jax.Array) -> None:
        """As `Hopper.store`."""
        ref[index] = value.astype(ref.dtype)

    store_plain = store


def launch(
    body: Callable[..., None],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int, int],
    *,
    name: str,
    interpret: bool,
) -> Callable[..., Sequence[jax.Array]]:
    """A function of the operands that runs `body(machine, (i, j, k), *inputs, *outputs)`.

    Args:
        body: the kernel, for one warpgroup.
        out_shapes: of the outputs.
        grid: three sizes.
        name: of the kernel, in profiles.
        interpret: run it on `Plain`, on whatever platform.

    Returns:
        The function.
    """
    if interpret:

        def by_index(*refs: Any) -> None:
            body(Plain(), tuple(pl.program_id(axis) for axis in range(3)), *refs)

        return pl.pallas_call(
            by_index, out_shape=list(out_shapes), grid=grid, interpret=True, name=name
        )

    names = ("lead", "tile", "part")

    def by_name(*refs: Any) -> None:
        body(Hopper(), tuple(lax.axis_index(axis) for axis in names), *refs)

    by_name.__name__ = name
    return plgpu.kernel(
        by_name,
        out_type=list(out_shapes),
        grid=grid,
        grid_names=names,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
