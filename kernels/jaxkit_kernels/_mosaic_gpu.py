"""What every Mosaic GPU kernel of this package shares: the launch, and what it needs to run."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxkit_kernels import _sharding

__all__ = ["check_device", "launch"]


def check_device() -> None:
    """Refuse NVIDIA devices older than Hopper, which Mosaic GPU does not compile for.

    With no such device on the host, as in interpret mode and ahead-of-time compilation, nothing
    is refused.

    Raises:
        NotImplementedError: with the compute capability found.

    Example:
        >>> check_device()
    """
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return
    capability = str(getattr(device, "compute_capability", "9.0"))
    if int(capability.split(".")[0]) < 9:
        raise NotImplementedError(
            f"the kernel needs compute capability 9.0 (Hopper) or newer; got {capability}."
        )


def launch(
    body: Callable[..., None],
    out_shape: jax.ShapeDtypeStruct,
    grid: tuple[int, int],
    *,
    name: str,
    interpret: bool,
) -> Callable[..., jax.Array]:
    """A function of the operands that runs `body(head, tile, *inputs, output)` over the grid.

    All references are to whole arrays in global memory.

    Args:
        body: the kernel, for one warpgroup (128 threads).
        out_shape: of the one output.
        grid: heads and tiles.
        name: of the kernel, in profiles.
        interpret: run it as ordinary JAX on whatever platform, by `pallas_call`, since the
            interpreter of `plgpu.kernel` needs more than these kernels use.

    Returns:
        The function.
    """
    if interpret:

        def by_index(*refs: Any) -> None:
            body(pl.program_id(0), pl.program_id(1), *refs)

        return pl.pallas_call(by_index, out_shape=out_shape, grid=grid, interpret=True, name=name)

    def by_name(*refs: Any) -> None:
        body(jax.lax.axis_index("head"), jax.lax.axis_index("tile"), *refs)

    by_name.__name__ = name

    def run(*operands: jax.Array) -> jax.Array:
        out = plgpu.kernel(
            by_name,
            out_type=_sharding.result(out_shape.shape, out_shape.dtype, *operands),
            grid=grid,
            grid_names=("head", "tile"),
            compiler_params=plgpu.CompilerParams(),
        )(*operands)
        return _sharding.vary(out, *operands)

    return run
