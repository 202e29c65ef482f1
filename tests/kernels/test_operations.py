"""Every operation of `OPERATIONS` against one contract, as `test_contract` does for `CASES`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tests.kernels import contract
from tests.kernels.cases import CASES, OPERATIONS
from tests.tolerance import tol

FAST = ["xla", *contract.PALLAS]
every_operation = pytest.mark.parametrize("op", list(OPERATIONS.values()), ids=list(OPERATIONS))


def compare(op, shape, got, want, dtype):
    """Integers are equal; floats within the error of sums over the longest axis."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if np.issubdtype(b.dtype, np.integer):
            assert a.dtype == np.int32
            np.testing.assert_array_equal(a, b)
            continue
        assert a.dtype == jnp.dtype(dtype)
        scale = 1.0 if dtype == jnp.bfloat16 else op.scale
        length = 1 if dtype == jnp.bfloat16 else max(shape)
        assert contract.error(a, b) <= scale * tol(dtype, length)


def cotangents(op, function, operands):
    """Of the sum of squares of the floating outputs, for the differentiable operands."""

    def loss(*args):
        leaves = [x for x in jax.tree.leaves(function(*args)) if jnp.issubdtype(x, jnp.floating)]
        return sum(jnp.sum(x * x) for x in leaves)

    return jax.grad(loss, op.differentiable)(*operands) if op.differentiable else ()


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["reference", "auto", *contract.PALLAS])
@every_operation
def test_values_and_cotangents(op, implementation, dtype):
    if dtype == jnp.float64 and implementation in contract.PALLAS:
        with pytest.raises(NotImplementedError, match=r"float32; got float64"):
            op.bind(implementation)(*op.operands(op.shapes[0], dtype))
        return
    for shape in op.shapes if dtype == jnp.float32 else op.shapes[-1:]:
        low, high = op.operands(shape, dtype), op.operands(shape, jnp.float64)
        function = op.bind(implementation)
        got, bars = jax.jit(lambda *x, f=function: (f(*x), cotangents(op, f, x)))(*low)
        compare(op, shape, got, op.oracle(*high), dtype)
        compare(op, shape, bars, cotangents(op, op.bind("reference"), high), dtype)


@pytest.mark.parametrize("implementation", FAST)
@every_operation
def test_small_blocks(op, implementation):
    shape = op.shapes[-1]
    function = op.bind(implementation, small=True)
    got = jax.jit(function)(*op.operands(shape, jnp.float32))
    compare(op, shape, got, op.oracle(*op.operands(shape, jnp.float64)), jnp.float32)


@pytest.mark.parametrize("implementation", FAST)
@every_operation
def test_vmap(op, implementation):
    """A batch of problems, and a batch in each operand alone, equals the problems one by one."""
    shape, function = op.shapes[1], op.bind(implementation)
    several = [op.operands(shape, jnp.float32, seed=seed) for seed in range(3)]
    got = jax.jit(jax.vmap(function))(*jax.tree.map(lambda *x: jnp.stack(x), *several))
    for index, one in enumerate(several):
        part = jax.tree.map(lambda x, index=index: x[index], got)
        compare(op, shape, part, op.oracle(*contract.as64(one)), jnp.float32)
    for batched in range(len(several[0])):
        axes = [0 if k == batched else None for k in range(len(several[0]))]
        stacked = list(several[0])
        stacked[batched] = jnp.stack([one[batched] for one in several])
        got = jax.jit(jax.vmap(function, axes))(*stacked)
        for index, one in enumerate(several):
            mixed = [one[k] if k == batched else x for k, x in enumerate(several[0])]
            part = jax.tree.map(lambda x, index=index: x[index], got)
            want = jax.jit(function)(*mixed)
            compare(op, shape, part, jax.tree.map(np.asarray, want), jnp.float32)


@pytest.mark.parametrize("implementation", FAST)
@every_operation
def test_deterministic(op, implementation):
    function = jax.jit(op.bind(implementation, small=True))
    low = op.operands(op.shapes[-1], jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, function(*low), function(*low))


@pytest.mark.x32
@every_operation
def test_without_x64(op):
    shape = op.shapes[-1]
    high = jax.tree.map(np.asarray, op.make(np.random.default_rng(0), *shape))
    compare(
        op, shape, op.bind("auto")(*contract.cast(high, jnp.float32)), op.oracle(*high), "float32"
    )


@pytest.mark.parametrize("implementation", ["auto", "xla", "pallas_tpu"])
@every_operation
def test_lowers_for_tpu(op, implementation):
    for shape in (op.shapes[1], op.large):
        for program in op.programs(implementation).values():
            lowered = jax.jit(program).trace(*op.specs(shape)).lower(lowering_platforms=("tpu",))
            assert ("tpu_custom_call" in lowered.as_text()) == (implementation != "xla")


@every_operation
def test_auto_falls_back_for_float64_on_tpu(op):
    spec = op.specs(op.shapes[1], jnp.float64)
    for program in op.programs("auto").values():
        text = jax.jit(program).trace(*spec).lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" not in text


@every_operation
def test_auto_takes_the_xla_form_on_cpu(op):
    for program in op.programs("auto").values():
        lowered = jax.jit(program).trace(*op.specs(op.shapes[1])).lower(lowering_platforms=("cpu",))
        assert "custom_call @" not in lowered.as_text()
    low = op.operands(op.shapes[-1], jnp.float32)
    got, want = (jax.jit(op.bind(name))(*low) for name in ("auto", "xla"))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@every_operation
def test_the_big_intermediate_is_gone(op):
    limit = op.dense(*op.large) / 16
    for program in op.programs("xla").values():
        assert contract.temporary_bytes(program, *op.specs(op.large)) < limit


@every_operation
def test_arguments_are_checked(op):
    low = op.operands(op.shapes[1], jnp.float32)
    with pytest.raises(ValueError, match=r"implementation must be one of 'auto'.*got 'cuda'"):
        op.function(*low, implementation="cuda")
    with pytest.raises(TypeError, match=r"block_sizes must be one of .*got tuple"):
        op.function(*low, block_sizes=(8, 8))
    with pytest.raises(TypeError, match=r"must be a real floating-point array; got int32"):
        op.function(low[0].astype(jnp.int32), *low[1:])


# How the operands of each operation are spread over the devices, by their first axis.
SPREAD = {
    "cauchy": (True, True, True, True, True, True),
    "vandermonde": (True, True, True, True),
    "nearest_code": (True, False),
    "vq_attention": (True, True, True, False, True, True, False),
}


@pytest.mark.parametrize("op", [*CASES.values(), *OPERATIONS.values()], ids=lambda op: op.name)
def test_inside_shard_map(op):
    """The default implementation on a part for each device: values, and gradients of all."""
    if op.name in CASES:
        function = partial(op.function, length=21)
        low, _ = contract.operands(op, 8, 3, jnp.float32)
    else:
        shape = {"nearest_code": (16, 5, 3), "vq_attention": (8, 2, 1, 3, 4, 5, 3, 2)}[op.name]
        low = op.operands(shape, jnp.float32)
        function = op.function
        if op.name == "nearest_code":  # counts are of a part each
            function = lambda *x: op.function(*x)._replace(counts=None)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    whole, spread = PartitionSpec(), PartitionSpec("data")
    specs = tuple(spread if part else whole for part in SPREAD[op.name])
    parts = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=spread, check_vma=True)
    differentiable = tuple(range(len(low))) if op.name in CASES else op.differentiable

    def both(function):
        def loss(*args):
            leaves = [x for x in jax.tree.leaves(function(*args)) if x.dtype == jnp.float32]
            return sum(jnp.sum(x * x) for x in leaves)

        def run(*args):
            grads = jax.grad(loss, differentiable)(*args) if differentiable else ()
            return function(*args), grads

        return jax.jit(run)(*low)

    got, want = both(parts), both(function)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(b.dtype, jnp.integer):
            np.testing.assert_array_equal(a, b)
        else:
            assert contract.error(a, b) <= 4 * tol(jnp.float32, 21)
