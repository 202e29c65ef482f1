"""Search, look-up and sampling against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxkit.quantize import (
    batch_statistics,
    code_counts,
    fsq_code,
    lfq_code,
    lookup,
    nearest_code,
    normalize,
    sample_code,
    squared_distances,
)
from tests.tolerance import tol


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def distances(z, codebook):
    z, codebook = np.asarray(z, np.float64), np.asarray(codebook, np.float64)
    return ((z[..., None, :] - codebook) ** 2).sum(-1)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_check_8_indices_are_the_float64_argmin(metric, dtype):
    z, codebook = random(7, 41, 12, dtype=dtype), random(67, 12, seed=1, dtype=dtype)
    got = jax.jit(nearest_code, static_argnames="metric")(z, codebook, metric=metric)
    assert got.dtype == jnp.int32
    assert got.shape == (7, 41)
    a, b = (unit(z), unit(codebook)) if metric == "cosine" else (z, codebook)
    all_ = distances(a, b)
    two = np.sort(all_, axis=-1)[..., :2]
    clear = two[..., 1] - two[..., 0] > 1e-4
    assert clear.mean() > 0.98
    np.testing.assert_array_equal(np.asarray(got)[clear], all_.argmin(-1)[clear])


def test_check_8_lowest_index_on_exact_ties():
    codebook = jnp.array([[5.0, 5], [1, 0], [-1, 0], [1, 0], [0, 1], [-1, 0]])
    z = jnp.array([[0.0, 0.0], [1.0, 0.0], [-3.0, 0.0], [0.5, 0.5]])
    assert nearest_code(z, codebook).tolist() == [1, 1, 2, 1]
    assert nearest_code(z[1:], codebook, metric="cosine").tolist() == [1, 2, 0]
    repeated = jnp.tile(random(9, 4), (5, 1))
    np.testing.assert_array_equal(nearest_code(repeated, repeated), jnp.tile(jnp.arange(9), 5))


def test_mixed_dtypes_masks_and_shapes():
    codebook = random(5, 3, dtype=jnp.float32)
    z = random(4, 3, seed=1, dtype=jnp.bfloat16)
    mask = jnp.array([True, False, True, False])
    got = nearest_code(z, codebook, mask=mask)
    expected = np.where(mask, distances(z, codebook).argmin(-1), 5)
    np.testing.assert_array_equal(got, expected)
    assert nearest_code(z[0], codebook).shape == ()
    assert nearest_code(z[:0], codebook).shape == (0,)
    by_head = jax.vmap(nearest_code)(random(2, 6, 3), random(2, 5, 3, seed=1))
    for head in range(2):
        np.testing.assert_array_equal(
            by_head[head], nearest_code(random(2, 6, 3)[head], random(2, 5, 3, seed=1)[head])
        )


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_code(bad, metric):
    codebook = random(5, 3)
    z = random(4, 3, seed=1).at[2, 1].set(bad)
    index = nearest_code(z, codebook, metric=metric)
    assert int(index[2]) == 5
    assert all(int(i) < 5 for i in index[jnp.array([0, 1, 3])])
    q = lookup(codebook, index)
    assert np.isnan(q[2]).all()
    assert np.isfinite(np.delete(np.asarray(q), 2, 0)).all()
    broken = nearest_code(random(4, 3), codebook.at[1, 1].set(bad), metric=metric)
    np.testing.assert_array_equal(broken, 5)


@pytest.mark.x32
def test_far_from_the_origin_the_centre_is_taken_off():
    """The card's e_k = 100 + 0.01 k: the plain expansion mis-assigns 43 of 64."""
    codebook = jnp.asarray(np.tile(100 + 0.01 * np.arange(64)[:, None], (1, 4)), jnp.float32)
    np.testing.assert_array_equal(nearest_code(codebook, codebook), np.arange(64))
    expanded = jnp.sum(codebook**2, 1)[None] - 2 * jnp.dot(
        codebook, codebook.T, precision="highest"
    )
    assert int(jnp.sum(jnp.argmin(expanded, 1) != jnp.arange(64))) > 20
    np.testing.assert_allclose(
        squared_distances(codebook, codebook), distances(codebook, codebook), atol=1e-5
    )


def test_a_code_without_direction_is_never_the_nearest():
    codebook = jnp.array([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    z = random(50, 2)
    np.testing.assert_array_equal(nearest_code(z, codebook, metric="cosine"), 1)


def test_search_is_constant_to_differentiation():
    z, codebook = random(4, 3), random(5, 3, seed=1)

    def loss(z, codebook):
        return jnp.sum(lookup(codebook, nearest_code(z, codebook)) ** 2 * 0.5)

    dz, dc = jax.grad(loss, (0, 1))(z, codebook)
    np.testing.assert_array_equal(dz, 0)
    index = np.asarray(nearest_code(z, codebook))
    expected = np.zeros((5, 3))
    np.add.at(expected, index, np.asarray(codebook)[index])
    np.testing.assert_allclose(dc, expected, atol=1e-14)


def test_normalize():
    x = random(6, 3).at[2].set(0.0).at[3].set(1e-9)
    got = normalize(x)
    keep = [0, 1, 4, 5]
    np.testing.assert_allclose(np.asarray(got)[keep], unit(np.asarray(x)[keep]), rtol=1e-14)
    np.testing.assert_array_equal(got[2:4], 0)
    gradient = jax.grad(lambda x: jnp.sum(normalize(x) * random(6, 3, seed=1)))(x)
    np.testing.assert_array_equal(gradient[2:4], 0)
    g = np.asarray(random(6, 3, seed=1))
    u = unit(np.asarray(x)[keep])
    expected = (g[keep] - u * (u * g[keep]).sum(-1, keepdims=True)) / np.linalg.norm(
        np.asarray(x)[keep], axis=-1, keepdims=True
    )
    np.testing.assert_allclose(np.asarray(gradient)[keep], expected, rtol=1e-12, atol=1e-14)
    assert normalize(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(normalize(jnp.full(3, 1e-9), eps=0.0), np.full(3, 3**-0.5))
    assert np.isnan(normalize(jnp.full(3, jnp.nan))).all()


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 5), st.integers(0, 99))
def test_squared_distances(codes, dim, tokens, seed):
    z, codebook = random(tokens, dim, seed=seed), random(codes, dim, seed=seed + 1)
    got = squared_distances(z, codebook)
    np.testing.assert_allclose(got, distances(z, codebook), atol=1e-13)
    assert got.shape == (tokens, codes)


def test_squared_distances_are_differentiable():
    z, codebook = random(4, 3), random(5, 3, seed=1)
    weights = random(4, 5, seed=2)
    dz, dc = jax.grad(lambda z, c: jnp.sum(weights * squared_distances(z, c)), (0, 1))(z, codebook)
    gap = 2 * (np.asarray(z)[:, None] - np.asarray(codebook)) * np.asarray(weights)[..., None]
    np.testing.assert_allclose(dz, gap.sum(1), atol=1e-13)
    np.testing.assert_allclose(dc, -gap.sum(0), atol=1e-13)


def test_lookup_shows_what_is_no_code():
    codebook = random(4, 2)
    index = jnp.array([[0, 3], [4, -1]])
    got = lookup(codebook, index)
    np.testing.assert_array_equal(got[0], codebook[jnp.array([0, 3])])
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(lookup(codebook, index, pad="zeros")[1], 0)
    gradient = jax.grad(lambda c: jnp.sum(lookup(c, index, pad="zeros")))(codebook)
    np.testing.assert_array_equal(gradient, np.array([1, 0, 0, 1])[:, None] * np.ones((4, 2)))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32, jnp.int64])
def test_codes_may_be_stored_in_few_bits(dtype):
    """K = 256 does not fit into the 8 bits that its codes do, nor 70000 into 16."""
    stored = jnp.asarray([0, 3, 100, 127], dtype)
    index = stored.astype(jnp.int32)
    codebook = random(256, 2)
    np.testing.assert_array_equal(lookup(codebook, stored), codebook[index])
    for codes in (256, 70000):
        np.testing.assert_array_equal(np.flatnonzero(code_counts(stored, codes)), np.asarray(index))
        counts = batch_statistics(random(4, 2), stored, codes)[1]
        np.testing.assert_array_equal(np.flatnonzero(counts), np.asarray(index))
    np.testing.assert_array_equal(fsq_code(stored, (8, 8, 4)), fsq_code(index, (8, 8, 4)))
    np.testing.assert_array_equal(lfq_code(stored, 8), lfq_code(index, 8))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_sampling_follows_the_distances(metric):
    codebook = random(4, 3)
    z = jnp.broadcast_to(random(3, seed=1), (20000, 3))
    for temperature in (0.5, 2.0):
        index = sample_code(jax.random.key(0), z, codebook, temperature=temperature, metric=metric)
        a, b = (unit(z[0]), unit(codebook)) if metric == "cosine" else (z[0], codebook)
        p = np.exp(-distances(a, b) / temperature)
        counts = np.bincount(np.asarray(index), minlength=4)
        assert stats.chisquare(counts, p / p.sum() * len(z)).pvalue > 1e-3
    cold = sample_code(jax.random.key(0), random(50, 3), codebook, temperature=1e-9, metric=metric)
    np.testing.assert_array_equal(cold, nearest_code(random(50, 3), codebook, metric=metric))
    bad = random(3, 3).at[0].set(jnp.nan)
    mask = jnp.array([True, False, True])
    index = sample_code(jax.random.key(0), bad, codebook, temperature=1.0, mask=mask)
    assert index[:2].tolist() == [4, 4]
    assert int(index[2]) < 4


@pytest.mark.x32
def test_float32_distances_to_their_roundoff():
    z, codebook = random(30, 16, dtype=jnp.float32), random(9, 16, seed=1, dtype=jnp.float32)
    got = squared_distances(z, codebook)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, distances(z, codebook), rtol=tol(jnp.float32, 16))


def test_errors_name_the_argument():
    z, codebook = jnp.ones((2, 3)), jnp.ones((4, 3))
    cases = [
        (lambda: nearest_code(z, jnp.ones((4, 2))), "z must have 2 features"),
        (lambda: nearest_code(z, jnp.ones((0, 3))), "codebook must be .* at least one code"),
        (lambda: nearest_code(z, jnp.ones(3)), "codebook must be"),
        (lambda: nearest_code(jnp.asarray(1.0), codebook), "z must be"),
        (lambda: nearest_code(z, codebook, metric="cos"), "metric must be one of"),
        (lambda: nearest_code(z, codebook, implementation="fast"), "implementation must be"),
        (lambda: nearest_code(z, codebook, mask=jnp.ones((2, 3), bool)), "mask must have shape"),
        (lambda: lookup(codebook, jnp.array(1), pad="zero"), "pad must be one of"),
        (lambda: sample_code(jax.random.key(0), z, codebook, temperature=0.0), "temperature"),
        (lambda: squared_distances(z, jnp.ones((4, 2))), "z must have 2 features"),
        (lambda: normalize(z, eps=-1.0), "eps must be at least 0"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    for call, words in [
        (lambda: nearest_code(z, codebook, mask=jnp.ones(2)), "mask must be a boolean"),
        (lambda: nearest_code(z.astype(int), codebook), "z must be an array of real"),
        (lambda: nearest_code(z, codebook.astype(int)), "codebook must be an array of real"),
        (lambda: lookup(codebook, jnp.array(1.0)), "index must be an array of integers"),
    ]:
        with pytest.raises(TypeError, match=words):
            call()


@pytest.mark.x32
@pytest.mark.parametrize("size", [1e-20, 1e20, 3e38])
def test_direction_survives_where_squares_leave_the_range(size):
    z = size * jnp.eye(3, dtype=jnp.float32)
    np.testing.assert_allclose(normalize(z, eps=0.0), np.eye(3), rtol=1e-6)
    if size > 1:
        index = nearest_code(z, jnp.eye(3, dtype=jnp.float32), metric="cosine")
        np.testing.assert_array_equal(index, [0, 1, 2])
    if size == 1e20:  # 1 / 3e38 is no normal number
        gradient = jax.grad(lambda z: jnp.sum(normalize(z)[:, 1]))(z)
        np.testing.assert_allclose(gradient * size, [[0, 1, 0], [0, 0, 0], [0, 1, 0]], rtol=1e-6)
