"""Arrays on a mesh with explicit axes (the default of `jax.make_mesh`).

There every operation must say how its result is spread, which searches, scatters and draws cannot.
Their functions therefore run with the mesh's axes left to the compiler, as on any other mesh, and
say it for their results: vectors and indices are spread like `z`, everything else is on all
devices.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

F = TypeVar("F", bound=Callable[..., Any])

# How a result is spread.
VECTORS, BATCH, EVERYWHERE = "vectors", "batch", "everywhere"


def _explicit(x: Any) -> NamedSharding | None:
    """The sharding in the type of `x`, if it is explicit about some axis."""
    if not isinstance(x, jax.Array):
        return None
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    return sharding


def automatic(results: Any, *, like: str = "z") -> Callable[[F], F]:
    """Decorate a function whose `results` (a prefix of its output) are `VECTORS`, `BATCH`, ….

    `like` is the argument, [..., dim] (for `index`: [...]), that vectors and indices go with.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            leaves, treedef = jax.tree.flatten((args, kwargs))
            if not any(_explicit(leaf) for leaf in leaves):
                return function(*args, **kwargs)
            array = signature.bind(*args, **kwargs).arguments[like]
            sharding = next(filter(None, map(_explicit, (array, *leaves))))
            spec = tuple(jax.typeof(array).sharding.spec) if _explicit(array) else ()
            spec = spec + (None,) * (array.ndim - len(spec))
            # What a name stands for; features are on one device.
            batch = spec if like == "index" else spec[:-1]
            specs = {VECTORS: (*batch, None), BATCH: batch, EVERYWHERE: ()}
            mesh = sharding.mesh
            places = jax.tree.map(
                lambda name: NamedSharding(mesh, PartitionSpec(*specs[name])), results
            )
            arrays = [leaf if isinstance(leaf, jax.Array) else None for leaf in leaves]

            def inner(arrays):
                merged = [
                    leaf if array is None else array
                    for leaf, array in zip(leaves, arrays, strict=True)
                ]
                args, kwargs = jax.tree.unflatten(treedef, merged)
                return function(*args, **kwargs)

            axes = tuple(
                name
                for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
                if kind == AxisType.Explicit
            )
            return jax.sharding.auto_axes(inner, axes=axes, out_sharding=places)(arrays)

        return cast(F, call)

    return decorate
