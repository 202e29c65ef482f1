"""k-means against scikit-learn and the card's digits; codebooks drawn from data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.datasets import load_digits

from jaxkit.quantize import data_init, kmeans, uniform_init


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_check_6_lloyd_on_the_digits():
    data = load_digits().data / 16
    run = jax.jit(lambda z, steps: kmeans(None, z, 16, init=z[:16], steps=steps), static_argnums=1)
    expected = {0: 7249.015625, 5: 4083.968912870, 10: None, 100: 4046.978322550}
    for steps, inertia in expected.items():
        found = run(jnp.asarray(data), steps)
        if inertia is not None:
            np.testing.assert_allclose(found.inertia, inertia, rtol=1e-11)
        assert int(found.steps) == min(steps, 13)
        if steps == 0:
            continue
        oracle = SklearnKMeans(
            16, init=data[:16], n_init=1, max_iter=steps, tol=0, algorithm="lloyd"
        ).fit(data)
        np.testing.assert_allclose(found.inertia, oracle.inertia_, rtol=1e-11)
        np.testing.assert_array_equal(found.index, oracle.labels_)
        np.testing.assert_allclose(found.codebook, oracle.cluster_centers_, atol=1e-12)


def test_masked_and_nan_rows_do_not_enter():
    z = random(40, 3)
    mask = np.arange(40) % 4 > 0
    dirty = jnp.where(jnp.asarray(mask)[:, None], z, jnp.inf).at[5].set(jnp.nan)
    clean = np.delete(np.asarray(z)[mask], 3, 0)  # row 5 is the fourth of those that remain
    start = random(4, 3, seed=1)
    got = kmeans(None, dirty.reshape(8, 5, 3), 4, init=start, mask=jnp.asarray(mask.reshape(8, 5)))
    expected = kmeans(None, jnp.asarray(clean), 4, init=start)
    np.testing.assert_allclose(got.codebook, expected.codebook, atol=1e-13)
    np.testing.assert_allclose(got.inertia, expected.inertia, rtol=1e-13)
    index = np.asarray(got.index).reshape(-1)
    keep = mask & (np.arange(40) != 5)
    np.testing.assert_array_equal(index[keep], expected.index)
    np.testing.assert_array_equal(index[~keep], 4)


def test_a_centre_without_vectors_stays():
    z = jnp.array([[0.0], [1.0], [2.0]])
    found = kmeans(None, z, 3, init=jnp.array([[0.0], [50.0], [1.5]]))
    np.testing.assert_allclose(found.codebook[:, 0], [0.0, 50.0, 1.5])


def test_spherical_kmeans_keeps_centres_on_the_sphere():
    z = 5 * random(60, 3)
    found = kmeans(None, z, 4, init=z[:4], metric="cosine")
    np.testing.assert_allclose(jnp.linalg.norm(found.codebook, axis=1), 1, rtol=1e-14)
    unit = np.asarray(z) / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_array_equal(found.index, (unit @ np.asarray(found.codebook).T).argmax(1))
    for code in range(4):
        mean = unit[np.asarray(found.index) == code].mean(0)
        np.testing.assert_allclose(found.codebook[code], mean / np.linalg.norm(mean), atol=1e-12)


def test_random_starts():
    centres = 20 * random(5, 3, seed=2)
    z = (centres[:, None] + 0.1 * random(5, 30, 3)).reshape(-1, 3)
    worst = float(kmeans(jax.random.key(0), z, 1, steps=1).inertia)
    run = jax.jit(lambda key: kmeans(key, z, 5, init="kmeans++"))
    # k-means++ finds well separated clusters from every seed.
    for seed in range(4):
        found = run(jax.random.key(seed))
        assert float(found.inertia) < 1e-3 * worst
        gap = np.abs(np.asarray(found.codebook)[:, None] - np.asarray(centres)).max(-1)
        assert gap.min(0).max() < 0.2
    first = kmeans(jax.random.key(0), z, 5, steps=0).codebook
    assert (np.abs(np.asarray(z)[:, None] - np.asarray(first)).max(-1) == 0).any(0).all()
    # Fewer points than centres.
    few = kmeans(jax.random.key(0), z[:2], 4, init="kmeans++").codebook
    assert np.isfinite(few).all()


def test_data_init_draws_different_rows():
    z = random(12, 3).at[4].set(jnp.nan)
    mask = jnp.arange(12) != 7
    rows = np.delete(np.asarray(z), [4, 7], 0)
    got = np.asarray(data_init(jax.random.key(0), z, 10, mask=mask))
    order = np.abs(rows[:, None] - got).max(-1).argmin(1)
    assert sorted(order) == list(range(10))
    np.testing.assert_array_equal(got[order], rows)
    repeated = np.asarray(data_init(jax.random.key(0), z, 25, mask=mask))
    assert set(np.abs(rows[:, None] - repeated).max(-1).argmin(0)) == set(range(10))
    assert data_init(jax.random.key(0), z.astype(jnp.bfloat16), 2).dtype == jnp.float32
    # No row: NaN, rather than codes that look like some.
    assert np.isnan(data_init(jax.random.key(0), z, 3, mask=jnp.zeros(12, bool))).all()
    for init in ("data", "kmeans++"):
        none = kmeans(jax.random.key(0), z, 3, init=init, mask=jnp.zeros(12, bool))
        assert np.isnan(none.codebook).all()
        np.testing.assert_array_equal(none.index, 3)


def test_uniform_init():
    codes = uniform_init(jax.random.key(0), 500, 4)
    assert codes.dtype == jnp.float32
    assert 0.95 / 500 < float(jnp.max(jnp.abs(codes))) <= 1 / 500
    assert abs(float(jnp.mean(codes))) < 1e-4
    assert float(jnp.max(uniform_init(jax.random.key(0), 50, 4, scale=3.0))) > 2.5


def test_errors_name_the_argument():
    z, key = jnp.ones((4, 3)), jax.random.key(0)
    cases = [
        (lambda: kmeans(key, z, 0), "num_codes must be at least 1"),
        (lambda: kmeans(key, z, 2, steps=-1), "steps must be at least 0"),
        (lambda: kmeans(key, z, 2, init="kmean++"), r"Did you mean 'kmeans\+\+'"),
        (lambda: kmeans(None, z, 2), "key must be a random key"),
        (lambda: kmeans(key, z, 2, init=jnp.ones((3, 3))), "init must have shape"),
        (lambda: kmeans(key, z, 2, metric="l1"), "metric must be one of"),
        (lambda: kmeans(key, z, 2, init="kmeans++", axis_name="data"), "axis_name must be None"),
        (lambda: data_init(key, z, 2, mask=jnp.ones(3, bool)), "mask must have shape"),
        (lambda: data_init(key, z, 0), "num_codes must be at least 1"),
        (lambda: uniform_init(key, 2, 0), "dim must be at least 1"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="z must be an array of real"):
        data_init(key, z.astype(int), 2)
