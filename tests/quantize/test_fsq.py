"""Finite scalar quantization against the card's digits and a loop in NumPy."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.quantize import RECOMMENDED_LEVELS, fsq, fsq_code, fsq_codebook, fsq_index

CONVENTIONS = ["default", "paper", "symmetric"]


def random(*shape, seed=0, scale=1.0, dtype=jnp.float64):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def oracle(z, level, convention, eps=1e-3):
    """(code, ∂code/∂z) of numbers, as the card has them."""
    tanh = np.tanh
    if convention == "symmetric":
        code = 2 * np.floor((level - 1) * (tanh(z) + 1) / 2 + 0.5) / (level - 1) - 1
        return code, 1 - tanh(z) ** 2
    offset = 0.5 if level % 2 == 0 else 0.0
    half = (level - 1) * (1 + (eps if convention == "default" else -eps)) / 2
    shift = np.arctanh(offset / half) if convention == "default" else np.tan(offset / half)
    code = np.round(tanh(z + shift) * half - offset) / (level // 2)
    return code, (1 - tanh(z + shift) ** 2) * half / (level // 2)


@pytest.mark.parametrize("convention", ["default", "paper"])
def test_check_4_codes_and_indices(convention):
    levels = (8, 5, 5, 5)
    z = jnp.array([[-2.0, -0.3, 0.0, 0.4], [0.1, 1.5, -1.2, 3.0]])
    out = fsq(z, levels, convention=convention)
    np.testing.assert_array_equal(out.z_q, [[-1, -0.5, 0, 0.5], [0, 1, -1, 1]])
    assert out.index.tolist() == [688, 836]
    assert out.index.dtype == jnp.int32


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("level", range(2, 12))
def test_check_4_exactly_that_many_levels(level, convention):
    z = jnp.linspace(-12, 12, 40001)[:, None]
    out = jax.jit(partial(fsq, levels=(level,), convention=convention))(z)
    values = np.unique(out.z_q)
    if convention == "symmetric":
        expected = 2 * np.arange(level) / (level - 1) - 1
    else:
        expected = (np.arange(level) - level // 2) / (level // 2)
    np.testing.assert_allclose(values, expected, atol=1e-15)
    assert sorted(set(np.asarray(out.index).tolist())) == list(range(level))
    code, _ = oracle(np.asarray(z[:, 0]), level, convention)
    np.testing.assert_allclose(out.z_q[:, 0], code, atol=1e-14)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("levels", [(8, 6, 5), (2, 3, 4, 7), (5,)])
def test_check_4_index_and_code_are_bijective(levels, convention):
    total = math.prod(levels)
    codebook = fsq_codebook(levels, convention=convention, dtype=jnp.float64)
    assert codebook.shape == (total, len(levels))
    np.testing.assert_array_equal(
        fsq_index(codebook, levels, convention=convention), np.arange(total)
    )
    assert len(np.unique(np.asarray(codebook), axis=0)) == total
    z = random(500, len(levels), scale=2)
    out = fsq(z, levels, convention=convention)
    np.testing.assert_allclose(codebook[out.index], out.z_q, atol=1e-15)
    digits = np.stack(np.unravel_index(np.asarray(out.index), levels[::-1]), -1)[:, ::-1]
    own = [
        fsq(z[:, i : i + 1], levels[i : i + 1], convention=convention).index
        for i in range(len(levels))
    ]
    np.testing.assert_array_equal(digits, np.stack(own, -1))


@pytest.mark.parametrize("bits", RECOMMENDED_LEVELS)
def test_recommended_levels(bits):
    sizes = {8: 240, 10: 1000, 12: 4375, 14: 15360, 16: 64000}
    levels = RECOMMENDED_LEVELS[bits]
    assert math.prod(levels) == sizes[bits]
    index = jnp.arange(sizes[bits], dtype=jnp.int32)
    np.testing.assert_array_equal(fsq_index(fsq_code(index, levels), levels), index)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_straight_through_on_the_rounding_alone(convention):
    levels = (8, 5, 2, 3, 6)
    z = random(40, 5)
    gradient = jax.grad(lambda z: jnp.sum(fsq(z, levels, convention=convention).z_q))(z)
    for i, level in enumerate(levels):
        code, slope = oracle(np.asarray(z[:, i]), level, convention)
        np.testing.assert_allclose(gradient[:, i], slope, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(
            fsq(z, levels, convention=convention).z_q[:, i], code, atol=1e-14
        )


def test_two_levels_need_the_symmetric_form():
    gradient = lambda convention: float(
        jax.grad(lambda z: fsq(z, (2,), convention=convention).z_q[0])(jnp.zeros(1))[0]
    )
    assert f"{gradient('default'):.1e}" == "1.0e-03"
    assert gradient("symmetric") == 1.0
    np.testing.assert_array_equal(
        fsq(jnp.array([[-0.1], [0.0], [0.1]]), (2,), convention="symmetric").z_q[:, 0], [-1, 1, 1]
    )
    # One name for every feature.
    z = random(30, 3)
    mixed = fsq(z, (8, 2, 5), convention=("default", "symmetric", "paper"))
    for i, name in enumerate(("default", "symmetric", "paper")):
        code, _ = oracle(np.asarray(z[:, i]), (8, 2, 5)[i], name)
        np.testing.assert_allclose(mixed.z_q[:, i], code, atol=1e-14)
    np.testing.assert_array_equal(
        fsq_index(mixed.z_q, (8, 2, 5), convention=("default", "symmetric", "default")), mixed.index
    )


def test_what_the_paper_code_gives_at_zero():
    """tan in the place of artanh: not quite 0."""
    for level, value in {4: -4.3e-4, 6: -5.4e-5, 8: -1.4e-5}.items():
        half = (level - 1) * (1 - 1e-3) / 2
        b = np.tanh(np.tan(0.5 / half)) * half - 0.5
        assert abs(b / value - 1) < 0.06
        # The bound is visible in the slope: (half² - (b + ½)²)/half/⌊L/2⌋.
        got = jax.grad(lambda z, level=level: fsq(z, (level,), convention="paper").z_q[0])(
            jnp.zeros(1)
        )
        expected = (half**2 - (b + 0.5) ** 2) / half / (level // 2)
        np.testing.assert_allclose(got[0], expected, rtol=1e-12)


def test_conventions_agree_but_near_boundaries():
    z = random(20000, 4)
    default = fsq(z, (8, 5, 6, 4)).z_q
    paper = fsq(z, (8, 5, 6, 4), convention="paper").z_q
    share = float(jnp.mean(default != paper))
    assert 0 < share < 5e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_masks_nan_and_infinity(dtype):
    levels = (7, 5)
    z = random(5, 2, dtype=dtype).at[1, 0].set(jnp.nan).at[2].set(jnp.inf).at[3].set(jnp.nan)
    mask = jnp.array([True, True, True, False, True])
    out = fsq(z, levels, mask=mask)
    assert out.z_q.dtype == dtype
    assert np.isnan(out.z_q[1, 0])
    assert out.index[1] == 35
    np.testing.assert_array_equal(out.z_q[2], [1, 1])
    assert out.index[2] == 34
    np.testing.assert_array_equal(out.z_q[3], [0, 0])
    assert out.index[3] == 35
    gradient = jax.grad(
        lambda z: jnp.sum(jnp.where(jnp.isnan(z), 0, fsq(z, levels, mask=mask).z_q))
    )(z)
    np.testing.assert_array_equal(gradient[3], 0)
    good = jnp.array([0, 4])
    np.testing.assert_array_equal(fsq_index(out.z_q[good], levels), out.index[good])
    assert np.isnan(fsq_code(jnp.array([35, -1]), levels)).all()
    assert fsq_index(jnp.array([1.4, 0.0]), levels) == 35
    assert fsq_index(jnp.array([jnp.nan, 0.0]), levels) == 35


def test_jit_and_vmap():
    z = random(3, 4, 2)
    levels = (8, 5)
    got = jax.jit(jax.vmap(jax.vmap(partial(fsq, levels=levels))))(z)
    expected = fsq(z, levels)
    np.testing.assert_array_equal(got.z_q, expected.z_q)
    np.testing.assert_array_equal(got.index, expected.index)


def test_errors_name_the_argument():
    z = jnp.ones((3, 2))
    cases = [
        (lambda: fsq(z, (8, 5, 5)), "z must have 3 features"),
        (lambda: fsq(z, (8, 1)), "levels must be at least 2"),
        (lambda: fsq(z, ()), "levels must hold at least one"),
        (lambda: fsq(z, (2**16, 2**15)), "levels must have a product below"),
        (lambda: fsq(z, (8, 5), convention="papr"), "Did you mean 'paper'"),
        (lambda: fsq(z, (8, 5), convention=("paper",)), "convention must be one name or one"),
        (lambda: fsq(z, (8, 1002)), "levels must be at most 1/eps"),
        (lambda: fsq(z, (8, 2), eps=0.0), "eps must be above 0"),
        (lambda: fsq(z, (8, 5), mask=jnp.ones(2, bool)), "mask must have shape"),
        (lambda: fsq_index(z, (8, 5, 5)), "code must have 3 features"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="levels must be an integer"):
        fsq(z, (8, 2.5))
    with pytest.raises(TypeError, match="z must be an array of real"):
        fsq(z.astype(int), (8, 5))
    with pytest.raises(TypeError, match="index must be an array of integers"):
        fsq_code(jnp.ones(2), (8, 5))
