"""Stochastic rounding: neighbours, means, and the numbers at the edges of a type."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxkit.optim import stochastic_round

NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
KEY = jax.random.key(0)


def neighbours(x, dtype):
    """The numbers of `dtype` on either side of every x, by a search in float64."""
    near = np.asarray(x, np.float64).astype(dtype)
    back = near.astype(np.float64)
    up, down = np.nextafter(near, dtype(np.inf)), np.nextafter(near, dtype(-np.inf))
    low = np.where(back > x, down.astype(np.float64), back)
    high = np.where(back < x, up.astype(np.float64), back)
    return low, high


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounds_to_a_neighbour_and_the_mean_is_exact(dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=12), [3e-3, -700.3, 1.0, 0.9999999, 0.0]])
    draws = 4000
    many = np.broadcast_to(x[:, None], (x.size, draws))
    rounded = np.asarray(
        jax.jit(lambda v: stochastic_round(v, dtype, key=KEY).astype(jnp.float64))(many)
    )
    low, high = neighbours(x, NUMPY[dtype])
    assert np.all((rounded == low[:, None]) | (rounded == high[:, None]))
    # The mean of a coin of two sides `high - low` apart is known to within its own deviation.
    room = 5 * (high - low) / (2 * np.sqrt(draws))
    assert np.all(np.abs(rounded.mean(axis=1) - x) <= room)


def test_subnormals_of_float16_round_to_their_spacing():
    smallest = float(jnp.finfo(jnp.float16).smallest_subnormal)
    x = jnp.asarray([0.25, -0.25, 2.5], jnp.float32) * smallest
    rounded = stochastic_round(jnp.broadcast_to(x[:, None], (3, 8000)), jnp.float16, key=KEY)
    units = np.asarray(rounded, np.float64) / smallest
    for row, sides in zip(units, ({0.0, 1.0}, {0.0, -1.0}, {2.0, 3.0}), strict=True):
        assert set(row) == sides
    np.testing.assert_allclose(units.mean(axis=1), [0.25, -0.25, 2.5], atol=0.03)


def test_exact_numbers_and_those_that_are_none_stay():
    x = jnp.asarray([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 65504.0, 65510.0], jnp.float32)
    rounded = np.asarray(stochastic_round(x, jnp.float16, key=KEY), np.float32)
    beyond = stochastic_round(jnp.full(64, 65530.0, jnp.float32), jnp.float16, key=KEY)
    assert np.all(np.isposinf(beyond))
    np.testing.assert_array_equal(rounded[:8], np.asarray(x)[:8])
    assert rounded[8] == 65504.0  # its other neighbour is no number
    assert np.signbit(rounded[1])
    wider = stochastic_round(jnp.asarray([1.5, 0.1], jnp.bfloat16), jnp.float32, key=KEY)
    assert wider.dtype == jnp.float32
    np.testing.assert_array_equal(wider, jnp.asarray([1.5, 0.1], jnp.bfloat16).astype(jnp.float32))


def test_half_types_of_different_ranges():
    x = jnp.full(2000, 1 + 2**-9, jnp.float16)  # a quarter of the way in bfloat16
    rounded = stochastic_round(x, jnp.bfloat16, key=KEY).astype(jnp.float32)
    assert set(np.asarray(rounded)) == {1.0, 1.0 + 2**-7}
    assert abs(float(rounded.mean()) - (1 + 2**-9)) < 5 * 2**-8 / np.sqrt(2000)


def test_derivative_is_that_of_the_mean():
    x = jnp.broadcast_to(jnp.asarray([1 + 2**-9, -0.1, 0.0, 3.0], jnp.float32), (64, 4))
    rounded = lambda x: stochastic_round(x, jnp.bfloat16, key=KEY).astype(jnp.float32)
    assert len(np.unique(rounded(x))) == 6  # both neighbours of the first two
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(rounded(x)))(x), 1.0)


def test_exact_numbers_are_not_a_matter_of_nan():
    """A search for NaN passes zeros."""
    with jax.debug_nans(True):
        rounded = stochastic_round(jnp.asarray([0.0, -0.0, 1.0]), jnp.float16, key=KEY)
    np.testing.assert_array_equal(rounded, [0.0, 0.0, 1.0])


def test_wrong_arguments():
    with pytest.raises(TypeError, match="x must be"):
        stochastic_round(jnp.arange(3), jnp.bfloat16, key=KEY)
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32"):
        stochastic_round(jnp.ones(3), jnp.int8, key=KEY)
