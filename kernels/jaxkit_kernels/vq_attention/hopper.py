"""The parts of a Mosaic GPU kernel that are Hopper's: tiles in shared memory, products by wgmma.

A kernel body is written against a machine with a few verbs. `Hopper` is one warpgroup with tiles
that arrive by TMA, one ahead of the arithmetic; `Plain` is ordinary JAX for interpret mode, since
the interpreter of `plgpu.kernel` knows neither layouts nor stores.

The tensor cores multiply 16-bit numbers (their "float32" keeps ten bits). A float32 matrix is
therefore cut in three bfloat16 parts of eight bits each, and a product is the six products of parts
that are not below float32's last bit. Tiles carry their parts as the first axis.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxkit_kernels import _sharding

__all__ = ["Hopper", "Plain", "Tile", "launch", "split", "stored"]

# Shared memory that one program may take.
_SHARED = 227 * 1024
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# JAX 0.12 takes the place of a load with the reference, 0.10 beside it.
_load: Any = plgpu.load
_PLACE_BESIDE = "idx" in inspect.signature(plgpu.load).parameters


def _loaded(ref: Any, index: tuple[Any, ...], layout: Any) -> jax.Array:
    """Global memory into registers."""
    if _PLACE_BESIDE:
        return _load(ref, index, layout=layout, optimized=False)
    return _load(ref.at[index], layout=layout, optimized=False)


def stored(dtype: Any) -> tuple[int, Any]:
    """Number of parts of a matrix of this dtype, and the dtype of a part.

    Example:
        >>> stored("float32")[0]
        3
    """
    wide = jnp.dtype(dtype) == jnp.dtype("float32")
    return (3, jnp.dtype("bfloat16")) if wide else (1, jnp.dtype(dtype))


def split(x: jax.Array, axis: int) -> jax.Array:
    """The parts of x, along a new axis; their sum is x to the last bit of float32.

    Example:
        >>> import jax.numpy as jnp
        >>> split(jnp.array([1 + 2.0**-20]), 0).astype("float32").sum(0) - 1 == 2.0**-20
        Array([ True], dtype=bool)
    """
    count, dtype = stored(x.dtype)
    if count == 1:
        return jnp.expand_dims(x, axis)
    parts = []
    for _ in range(count):
        # Not a pair of conversions: XLA takes those for a rounding that it may leave out.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(dtype))
        x = x - part
    return jnp.stack(parts, axis)


def _pairs(count: int) -> list[tuple[int, int]]:
    """Which parts to multiply, the small ones first."""
    pairs = [(i, j) for i in range(count) for j in range(count) if i + j < count]
    return sorted(pairs, key=sum, reverse=True)


class Tile(NamedTuple):
    """A source of tiles: which part of an array [lead, parts, rows, columns] is needed at step j.

    Attributes:
        ref: the array, in global memory.
        place: (lead, first row, first column) of step j.
        shape: of a tile.
    """

    ref: Any
    place: Callable[[Any], tuple[Any, Any, Any]]
    shape: tuple[int, int]

    def at(self, j: Any) -> tuple[Any, ...]:
        """The index of step j."""
        lead, row, column = self.place(j)
        parts = pl.ds(0, self.ref.shape[1])
        return lead, parts, pl.ds(row, self.shape[0]), pl.ds(column, self.shape[1])

    @property
    def bytes(self) -> int:
        """Shared memory of one tile."""
        return 2 * self.ref.shape[1] * self.shape[0] * self.shape[1]


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    # Swizzled lines of 128 bytes, which wgmma reads without bank conflicts.
    line = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _buffer(tile: Tile, *slots: int) -> Any:
    return _shared((*slots, tile.ref.shape[1], *tile.shape), tile.ref.dtype)


class Hopper:
    """One warpgroup. Matrices in registers have the layout of wgmma's accumulator."""

    def __init__(self) -> None:
        self._taken = 0

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        """A constant: a matrix, or a vector with one number a row."""
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else _ROWS
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def matrix(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """A float32 matrix from global memory."""
        return _loaded(ref, index, plgpu.Layout.WGMMA)

    def per_row(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """A float32 vector from global memory with one number a row."""
        return _loaded(ref, index, _ROWS)

    def per_column(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """A float32 vector from global memory with one number a column."""
        return _loaded(ref, index, _COLUMNS)

    def dot(self, a: Any, b: Any) -> jax.Array:
        """a b^T of two tiles."""

        def multiply(acc):
            for i, j in _pairs(a.shape[0]):
                plgpu.wgmma(acc, a.at[i], b.at[j].transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[1], b.shape[1]), jnp.float32))

    def add_dot(self, total: jax.Array, a: jax.Array, b: Any) -> jax.Array:
        """total + a b, with a in registers and a tile b."""
        count = b.shape[0]
        for i in range(count):
            part = a.astype(b.dtype)

            def multiply(acc, part=part, i=i):
                for j in reversed(range(count - i)):
                    plgpu.wgmma(acc, part, b.at[j])

            # One part at a time, since all of them with the sums would not fit the registers.
            total = pl.run_state(multiply)(plgpu.ACC.init(total))
            a = a - part.astype(jnp.float32)
        return total

    def fetch(self, tiles: Sequence[Tile], body: Callable[..., Any]) -> Any:
        """Call `body(*tiles)` with the tiles in shared memory."""

        def scoped(*scratch):
            *buffers, barrier = scratch
            for tile, buffer in zip(tiles, buffers, strict=True):
                plgpu.copy_gmem_to_smem(tile.ref.at[tile.at(0)], buffer, barrier)
            plgpu.barrier_wait(barrier)
            return body(*buffers)

        size = sum(tile.bytes for tile in tiles)
        self._taken += size
        result = pl.run_scoped(
            scoped,
            *(_buffer(tile) for tile in tiles),
            plgpu.Barrier(num_arrivals=len(tiles)),
        )
        self._taken -= size
        return result

    def stream(
        self, tiles: Sequence[Tile], count: Any, body: Callable[..., Any], carry: Any
    ) -> Any:
        """Fold `carry = body(j, carry, *tiles)` over the steps.

        The next tiles are on their way meanwhile, where shared memory has room for two of each.
        """
        size = sum(tile.bytes for tile in tiles)
        free = _SHARED - 2048 - self._taken
        if size > free:
            raise NotImplementedError(
                f"tiles of {size} bytes do not fit the {free} bytes of shared memory left; "
                f"dk and dv are too large for the kernel."
            )
        slots = 2 if 2 * size <= free else 1

        def scoped(*scratch):
            *buffers, barrier = scratch
            last = jnp.asarray(count, jnp.int32)

            def start(j):
                @pl.when(j < last)
                def _():
                    slot = lax.rem(j, jnp.int32(slots))
                    for tile, buffer in zip(tiles, buffers, strict=True):
                        source = tile.ref.at[tile.at(j)]
                        plgpu.copy_gmem_to_smem(source, buffer.at[slot], barrier.at[slot])

            start(jnp.int32(0))

            def step(j, carry):
                if slots == 2:
                    # The other slot was read one step ago, and its products were waited for.
                    start(j + 1)
                slot = lax.rem(j, jnp.int32(slots))
                plgpu.barrier_wait(barrier.at[slot])
                carry = body(j, carry, *(buffer.at[slot] for buffer in buffers))
                if slots == 1:
                    start(j + 1)
                return carry

            return lax.fori_loop(jnp.int32(0), last, step, carry)

        return pl.run_scoped(
            scoped,
            *(_shared((slots, tile.ref.shape[1], *tile.shape), tile.ref.dtype) for tile in tiles),
            plgpu.Barrier(num_arrivals=len(tiles), num_barriers=slots),
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
        product = lambda i, j: jnp.dot(a[i], b[j].T, preferred_element_type=jnp.float32)
        return sum((product(i, j) for i, j in _pairs(len(a))), jnp.zeros((), jnp.float32))

    def add_dot(self, total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """As `Hopper.add_dot`."""
        parts = split(a, 0) if len(b) > 1 else a.astype(b.dtype)[None]
        for i, j in _pairs(len(b)):
            total = total + jnp.dot(parts[i], b[j], preferred_element_type=jnp.float32)
        return total

    def fetch(self, tiles: Sequence[Tile], body: Callable[..., Any]) -> Any:
        """As `Hopper.fetch`."""
        return body(*(tile.ref[tile.at(0)] for tile in tiles))

    def stream(
        self, tiles: Sequence[Tile], count: Any, body: Callable[..., Any], carry: Any
    ) -> Any:
        """As `Hopper.stream`."""

        def step(j, carry):
            return body(j, carry, *(tile.ref[tile.at(j)] for tile in tiles))

        return lax.fori_loop(jnp.int32(0), jnp.asarray(count, jnp.int32), step, carry)

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

    def run(*operands: jax.Array) -> Sequence[jax.Array]:
        outs = plgpu.kernel(
            by_name,
            out_type=[_sharding.result(s.shape, s.dtype, *operands) for s in out_shapes],
            grid=grid,
            grid_names=names,
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(*operands)
        return [_sharding.vary(out, *operands) for out in outs]

    return run
