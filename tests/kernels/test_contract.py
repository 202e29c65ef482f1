"""Every operation against the shared contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import contract
from tests.kernels.cases import CASES
from tests.tolerance import tol

OPS = list(CASES)
FAST = ["xla", *contract.PALLAS]
# Tiny, odd, just past a tile of 128 nodes, several tiles of 8 x 128.
SHAPES = [(1, 1, 1), (2, 3, 2), (3, 5, 7), (2, 4, 258), (1, 9, 3001)]


@pytest.mark.parametrize("length", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("op", OPS)
def test_reference_is_the_definition(op, length):
    case = CASES[op]
    _, high = contract.operands(case, 2, 3, jnp.float64)
    got = case.function(*high, length=length, implementation="reference")
    want = case.oracle(*high, length=length)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        known = ~np.isnan(b)
        np.testing.assert_allclose(np.asarray(a)[known], b[known], atol=tol(jnp.float64, length))


@pytest.mark.parametrize(("heads", "modes", "length"), SHAPES)
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("op", OPS)
def test_values_and_cotangents(op, implementation, heads, modes, length):
    contract.check(CASES[op], implementation, jnp.float32, heads=heads, modes=modes, length=length)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_float64(op, implementation):
    shape = {"heads": 2, "modes": 3, "length": 37}
    contract.check(CASES[op], implementation, jnp.float64, **shape)


@pytest.mark.parametrize("implementation", ["auto", *contract.PALLAS])
@pytest.mark.parametrize("op", OPS)
def test_bfloat16_is_computed_in_float32(op, implementation):
    # Of the exact result rounded once: far below bfloat16 arithmetic.
    low, high = contract.operands(CASES[op], 2, 3, jnp.bfloat16)
    got = CASES[op].bind(implementation, 37)(*low)
    want = CASES[op].function(*high, length=37, implementation="reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        gap = np.abs(np.asarray(a, np.float64) - np.asarray(b))
        assert (gap <= 2.0**-8 * np.abs(b) + 1e-5 * np.abs(b).max()).all()


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("op", OPS)
def test_small_blocks(op, implementation):
    shape = {"heads": 2, "modes": 3, "length": 2500, "small": True}
    contract.check(CASES[op], implementation, jnp.float32, **shape)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("op", OPS)
def test_vmap(op, implementation):
    contract.check_vmap(CASES[op], implementation, heads=2, modes=3, length=140)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("op", OPS)
def test_deterministic(op, implementation):
    contract.check_deterministic(CASES[op], implementation, heads=2, modes=3, length=1100)


@pytest.mark.x32
@pytest.mark.parametrize("op", OPS)
def test_without_x64(op):
    case = CASES[op]
    low, _ = contract.operands(case, 2, 3, jnp.float32)
    got = case.bind("auto", 21)(*low)
    want = case.bind("reference", 21)(*low)
    assert contract.error(contract.joint(got), contract.joint(want)) <= 8 * tol(jnp.float32, 21)


@pytest.mark.parametrize("implementation", ["auto", "xla", "pallas_tpu"])
@pytest.mark.parametrize("op", OPS)
def test_lowers_for_tpu(op, implementation):
    texts = contract.lowered_text(CASES[op], implementation, "tpu", heads=3, modes=5, length=2500)
    for text in texts.values():
        assert ("tpu_custom_call" in text) == (implementation != "xla")


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_xla_form_on_cpu(op):
    texts = contract.lowered_text(CASES[op], "auto", "cpu", heads=2, modes=3, length=64)
    for text in texts.values():
        assert "tpu_custom_call" not in text
        assert "mosaic" not in text
    low, _ = contract.operands(CASES[op], 2, 3, jnp.float32)
    got = jax.jit(CASES[op].bind("auto", 64))(*low)
    want = jax.jit(CASES[op].bind("xla", 64))(*low)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("op", OPS)
def test_auto_falls_back_for_float64_on_tpu(op):
    case = CASES[op]
    spec = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float64),
        case.make(np.random.default_rng(0), 2, 3),
    )
    program = contract.programs(case, "auto", 64)["backward"]
    text = jax.jit(program).trace(*spec).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text


@pytest.mark.parametrize("implementation", contract.PALLAS)
@pytest.mark.parametrize("op", OPS)
def test_a_named_kernel_never_falls_back(op, implementation):
    _, high = contract.operands(CASES[op], 2, 3, jnp.float64)
    with pytest.raises(NotImplementedError, match=r"float32; got float64"):
        CASES[op].bind(implementation, 16)(*high)


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_checked(op):
    case = CASES[op]
    low, _ = contract.operands(case, 2, 3, jnp.float32)
    with pytest.raises(ValueError, match=r"implementation must be one of 'auto'.*got 'cuda'"):
        case.function(*low, length=8, implementation="cuda")
    with pytest.raises(ValueError, match=r"length must .*got 0"):
        case.function(*low, length=0)
    with pytest.raises(TypeError, match=r"length must be an int; got 8.0"):
        case.function(*low, length=8.0)
    with pytest.raises(TypeError, match=r"block_sizes must be one of .*got tuple"):
        case.function(*low, length=8, block_sizes=(8, 8))
    with pytest.raises(ValueError, match=r"beta must have .*shape"):
        case.function(low[0], low[1][:, :2], *low[2:], length=8)
    with pytest.raises(TypeError, match=r"beta must have alpha's dtype float32; got bfloat16"):
        case.function(low[0], low[1].astype(jnp.bfloat16), *low[2:], length=8)
    with pytest.raises(TypeError, match=r"alpha must be a real floating-point array; got complex"):
        case.function(low[0].astype(jnp.complex64), *low[1:], length=8)
    with pytest.raises(ValueError, match=r"alpha must be .heads, modes.; got shape"):
        case.function(low[0][0], *low[1:], length=8)
