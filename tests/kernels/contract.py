"""What every kernel is held to, whatever the operation: one `Case` an operation, one check a claim.

The checks compare an implementation with the float64 reference; `case.oracle` ties the reference
itself to NumPy.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.tolerance import tol

PALLAS = ("pallas_tpu", "pallas_gpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation.

    Attributes:
        name: of the operation.
        function: `function(*operands, length=, implementation=, block_sizes=, interpret=)`.
        make: `make(rng, heads, modes)` gives the operands as a tuple of float64 pytrees.
        oracle: `oracle(*operands, length=)` in NumPy, complex128 or float64.
        small_blocks: for each implementation, block sizes that cut small problems in many.
        scale: error units of the operation over those of `tol`, for values and for cotangents.
    """

    name: str
    function: Callable[..., Any]
    make: Callable[..., tuple[Any, ...]]
    oracle: Callable[..., Any]
    small_blocks: dict[str, Any]
    scale: float = 1.0

    def bind(self, implementation: str, length: int, *, small: bool = False) -> Callable[..., Any]:
        """The operation as a function of its operands, in interpret mode where that applies."""
        return partial(
            self.function,
            length=length,
            implementation=implementation,
            block_sizes=self.small_blocks.get(implementation) if small else None,
            interpret=implementation in PALLAS,
        )


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation whose arguments are not [heads, modes].

    Attributes:
        name: of the operation.
        function: `function(*operands, implementation=, block_sizes=, interpret=)`.
        arguments: `arguments(*shape)` gives the operands' shapes, as a tuple.
        make: `make(rng, *shape)` gives the operands in float64, all of them bfloat16 numbers.
        oracle: `oracle(*operands)` in NumPy float64, as `function`.
        shapes: tiny, odd, just past a tile, several tiles.
        small_blocks: for each implementation, block sizes that cut the last of `shapes` in many.
        large: a shape for compilations, of the size of the benchmark.
        dense: `dense(*shape)` gives the size of the intermediate that must not be there.
        differentiable: indices of the operands with gradients.
        scale: error units of the operation over those of `tol`.
        compiled: dtype of the operands in compilations.
    """

    name: str
    function: Callable[..., Any]
    arguments: Callable[..., tuple[tuple[int, ...], ...]]
    make: Callable[..., tuple[Any, ...]]
    oracle: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    small_blocks: dict[str, Any]
    large: tuple[int, ...]
    dense: Callable[..., int]
    differentiable: tuple[int, ...] = ()
    scale: float = 1.0
    compiled: Any = jnp.float32

    def bind(self, implementation: str, *, small: bool = False) -> Callable[..., Any]:
        """The operation as a function of its operands, in interpret mode where that applies."""
        return partial(
            self.function,
            implementation=implementation,
            block_sizes=self.small_blocks.get(implementation) if small else None,
            interpret=implementation in PALLAS,
        )

    def operands(self, shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Any:
        return cast(self.make(np.random.default_rng(seed), *shape), dtype)

    def specs(self, shape: tuple[int, ...], dtype: Any = None, sharding: Any = None) -> Any:
        dtype = self.compiled if dtype is None else dtype
        return [jax.ShapeDtypeStruct(s, dtype, sharding=sharding) for s in self.arguments(*shape)]

    def programs(self, implementation: str) -> dict[str, Callable[..., Any]]:
        """Forward, and with gradients the pull-back of all-ones, without interpret mode."""
        forward = partial(self.function, implementation=implementation)

        def backward(*args):
            out, pull = jax.vjp(forward, *args)
            return out, pull(jax.tree.map(jnp.ones_like, out))

        return {"forward": forward, **({"backward": backward} if self.differentiable else {})}


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def as64(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)


def error(got: Any, want: Any) -> float:
    """Largest difference over the largest value, leaf by leaf; the worst leaf's."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (a.shape, b.shape)
        assert np.isfinite(a).all()
        worst = max(worst, np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    return worst


def joint(tree: Any) -> np.ndarray:
    """All outputs in one array, since parts that vanish in exact arithmetic have no scale."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def operands(case: Case, heads: int, modes: int, dtype: Any, seed: int = 0) -> tuple[Any, Any]:
    """Operands in `dtype`, and the very same numbers in float64."""
    low = cast(case.make(np.random.default_rng(seed), heads, modes), dtype)
    return low, as64(low)


def check(case, implementation, dtype, *, heads, modes, length, small=False) -> None:
    """Values and every cotangent against the float64 reference; shapes and dtypes.

    Values are compared on their joint scale, since parts of them vanish in exact arithmetic; each
    cotangent on its own.
    """
    low, high = operands(case, heads, modes, dtype)
    reference = partial(case.function, length=length, implementation="reference")
    want, pull_reference = jax.vjp(reference, *high)
    rng = np.random.default_rng(1)
    cotangent = cast(jax.tree.map(lambda x: rng.standard_normal(x.shape), want), dtype)

    @jax.jit
    def run(cotangent, *args):
        out, pull = jax.vjp(case.bind(implementation, length, small=small), *args)
        return out, pull(cotangent)

    got, bars = run(cotangent, *low)
    for leaf in jax.tree.leaves((got, bars)):
        assert leaf.dtype == jnp.dtype(dtype)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
    assert error(joint(got), joint(want)) <= case.scale * tol(dtype, modes)
    # Sums over the nodes.
    assert error(bars, pull_reference(as64(cotangent))) <= case.scale * tol(dtype, modes + length)


def check_vmap(case, implementation, *, heads, modes, length) -> None:
    """A batch of problems equals the problems one by one, values and cotangents."""
    several = [operands(case, heads, modes, jnp.float32, seed=seed)[0] for seed in range(3)]
    batched = jax.tree.map(lambda *x: jnp.stack(x), *several)
    function = case.bind(implementation, length)

    def loss(*args):
        return sum(jnp.sum(x * x) for x in jax.tree.leaves(function(*args)))

    both = lambda *args: (function(*args), jax.grad(loss, tuple(range(len(args))))(*args))
    got = jax.jit(jax.vmap(both))(*batched)
    single = jax.jit(both)
    for index, one in enumerate(several):
        part = jax.tree.map(lambda x, index=index: x[index], got)
        # The loss squares the outputs, and the order of sums may differ in a batch.
        assert error(part, single(*one)) <= case.scale * tol(jnp.float32, modes + length)


def check_deterministic(case, implementation, *, heads, modes, length) -> None:
    """Two runs give the same bits, cotangents included."""
    low, _ = operands(case, heads, modes, jnp.float32)
    function = case.bind(implementation, length, small=True)

    @jax.jit
    def both(*args):
        out, pull = jax.vjp(function, *args)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    first, second = both(*low), both(*low)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def specs(case: Case, heads: int, modes: int, sharding: Any = None) -> Any:
    made = case.make(np.random.default_rng(0), heads, modes)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32, sharding=sharding), made
    )


def programs(case: Case, implementation: str, length: int) -> dict[str, Callable[..., Any]]:
    """Forward, and forward with the pull-back of all-ones, without interpret mode."""
    forward = partial(case.function, length=length, implementation=implementation)

    def backward(*args):
        out, pull = jax.vjp(forward, *args)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return {"forward": forward, "backward": backward}


def lowered_text(
    case: Case, implementation: str, platform: str, *, heads, modes, length
) -> dict[str, str]:
    """The programs lowered for a platform that need not be present."""
    spec = specs(case, heads, modes)
    return {
        name: jax.jit(program).trace(*spec).lower(lowering_platforms=(platform,)).as_text()
        for name, program in programs(case, implementation, length).items()
    }


def temporary_bytes(function: Callable[..., Any], *spec: Any) -> int:
    """Temporary memory of the compiled function."""
    return jax.jit(function).lower(*spec).compile().memory_analysis().temp_size_in_bytes
