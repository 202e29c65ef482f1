"""Losses, regularisers and statistics against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxkit.quantize import (
    code_counts,
    code_entropies,
    codebook_loss,
    commitment_loss,
    entropy_loss,
    orthogonality_loss,
    perplexity,
    usage,
)


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("loss", [commitment_loss, codebook_loss])
def test_means_over_all_elements_or_sums_over_features(loss):
    z, q = random(4, 5, 3), random(4, 5, 3, seed=1)
    gap = np.asarray(z - q)
    np.testing.assert_allclose(loss(z, q), (gap**2).mean(), rtol=1e-14)
    np.testing.assert_allclose(loss(z, q, reduction="sum"), (gap**2).sum(-1).mean(), rtol=1e-14)
    mask = np.random.default_rng(2).random((4, 5)) > 0.5
    dirty = jnp.where(jnp.asarray(mask)[..., None], z, jnp.nan)
    run = partial(loss, mask=jnp.asarray(mask))
    np.testing.assert_allclose(run(dirty, q), (gap[mask] ** 2).mean(), rtol=1e-14)
    moving = 0 if loss is commitment_loss else 1
    sign = 1 - 2 * moving
    got = jax.grad(run, (0, 1))(dirty, q)
    expected = np.where(mask[..., None], sign * 2 * gap / (mask.sum() * 3), 0)
    np.testing.assert_allclose(got[moving], expected, atol=1e-15)
    np.testing.assert_array_equal(got[1 - moving], 0)
    assert float(loss(z, q, mask=jnp.zeros((4, 5), bool))) == 0.0
    half = loss(z.astype(jnp.bfloat16), q.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("masked", [True, False])
def test_the_mean_is_over_the_vectors_of_all_devices(masked):
    """Devices with few and with many vectors, one with none; and the gradients inside."""
    z, q = random(16, 3, 2), random(16, 3, 2, seed=1)
    share = np.linspace(-0.2, 1, 16)[:, None]
    mask = jnp.asarray(np.random.default_rng(0).random((16, 3)) < share) if masked else None
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def both(z, q, mask, axis_name=None):
        def loss(z, q):
            common = {"mask": mask, "axis_name": axis_name}
            return commitment_loss(z, q, **common) + 3 * codebook_loss(z, q, **common)

        return jax.value_and_grad(loss, (0, 1))(z, q)

    where = P("data")
    spread = jax.shard_map(
        partial(both, axis_name="data"), mesh=mesh, in_specs=where, out_specs=(P(), (where, where))
    )
    got, expected = jax.jit(spread)(z, q, mask), both(z, q, mask)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("codes", [3, 7])
def test_orthogonality_is_the_mean_squared_cosine(codes):
    codebook = random(codes, 4).at[1].set(0.0)
    with np.errstate(invalid="ignore"):
        unit = np.nan_to_num(codebook / np.linalg.norm(codebook, axis=1, keepdims=True))
    cosines = unit @ unit.T
    expected = (cosines[~np.eye(codes, dtype=bool)] ** 2).sum() / codes**2
    np.testing.assert_allclose(orthogonality_loss(codebook), expected, rtol=1e-13)
    assert np.isfinite(jax.grad(orthogonality_loss)(codebook)).all()
    # As printed in popular code, for codes that all have a direction: mean cos² - 1/K.
    whole = random(codes, 4)
    unit = np.asarray(whole) / np.linalg.norm(whole, axis=1, keepdims=True)
    expected = ((unit @ unit.T) ** 2).mean() - 1 / codes
    np.testing.assert_allclose(orthogonality_loss(whole), expected, rtol=1e-12)


def test_entropies_of_soft_assignments():
    z, codebook = random(3, 6, 4), random(5, 4, seed=1)
    mask = np.random.default_rng(3).random((3, 6)) > 0.3
    rows = np.asarray(z)[mask]
    logits = -((rows[:, None] - np.asarray(codebook)) ** 2).sum(-1) / 0.7
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    own = -(p * np.log(p)).sum(1).mean()
    mean = -(p.mean(0) * np.log(p.mean(0))).sum()
    dirty = jnp.where(jnp.asarray(mask)[..., None], z, jnp.nan)
    common = {"temperature": 0.7, "mask": jnp.asarray(mask)}
    got = code_entropies(dirty, codebook, **common)
    np.testing.assert_allclose(got, (own, mean), rtol=1e-12)
    loss = partial(entropy_loss, diversity_weight=0.5, **common)
    np.testing.assert_allclose(loss(dirty, codebook), own - 0.5 * mean, rtol=1e-12)
    gradient = jax.grad(loss, (0, 1))(dirty, codebook)
    assert all(np.isfinite(g).all() for g in gradient)
    np.testing.assert_array_equal(np.asarray(gradient[0])[~mask], 0)
    cold = jax.grad(lambda z: entropy_loss(z, 100 * codebook))(z)  # probabilities of exactly 0
    assert np.isfinite(cold).all()


def test_check_7_perplexity_and_usage():
    p = jnp.array([0.5, 0.25, 0.125, 0.125])
    np.testing.assert_allclose(perplexity(p), 3.363585661015, atol=1e-12)
    np.testing.assert_allclose(perplexity(jnp.array([4, 2, 1, 1])), 3.363585661015, rtol=1e-6)
    np.testing.assert_allclose(perplexity(jnp.ones((2, 9))), [9, 9], rtol=1e-14)
    np.testing.assert_allclose(perplexity(jnp.array([0.0, 3.0, 0.0])), 1.0)
    assert np.isnan(perplexity(jnp.zeros(3)))
    assert float(usage(jnp.array([4, 0, 1, 0]))) == 0.5


def test_counts_of_codes():
    index = jnp.array([[0, 2, 3], [-1, 2, 9]])
    assert code_counts(index, 3).tolist() == [1, 0, 2]
    mask = jnp.array([[False, True, True], [True, False, True]])
    assert code_counts(index, 3, mask=mask).tolist() == [0, 0, 1]
    assert code_counts(index, 3).dtype == jnp.int32


def test_errors_name_the_argument():
    z = jnp.ones((4, 3))
    cases = [
        (lambda: commitment_loss(z, z[:2]), "q must have the shape"),
        (lambda: codebook_loss(z, z, reduction="max"), "reduction must be one of"),
        (lambda: codebook_loss(z, z, mask=jnp.ones(3, bool)), "mask must have shape"),
        (lambda: orthogonality_loss(jnp.ones(3)), "codebook must be"),
        (lambda: entropy_loss(z, z, temperature=0.0), "temperature must be greater than 0"),
        (lambda: entropy_loss(z, z, diversity_weight=-1.0), "diversity_weight must be"),
        (lambda: code_counts(jnp.zeros(3, int), 0), "num_codes must be at least 1"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="index must be an array of integers"):
        code_counts(jnp.zeros(3), 2)
