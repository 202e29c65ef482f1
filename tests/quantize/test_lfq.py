"""Look-up-free and binary spherical quantization against sums over all codes."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.quantize import (
    lfq,
    lfq_code,
    lfq_entropies,
    lfq_entropy_loss,
    lfq_index,
    spherical,
    spherical_entropies,
)

CARD = jnp.array([[0.3, -0.2, 0.1, -0.4], [-0.5, 0.6, 0.7, 0.8]])


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def enumerate_(z, scale=1.0, tau=1.0):
    """Both entropies from the softmax over all 2^d codes."""
    z = np.asarray(z).reshape(-1, z.shape[-1])
    codes = scale * np.array(list(itertools.product([-1, 1], repeat=z.shape[1])))
    logits = 2 * tau * z @ codes.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    h = lambda p: -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    return h(p).mean(), h(p.mean(0))


def test_check_5_entropies_and_indices():
    own, mean = lfq_entropies(CARD)
    np.testing.assert_allclose(own, 1.661496982479, atol=1e-12)
    np.testing.assert_allclose(mean, 2.207146585333, atol=1e-12)
    assert lfq(CARD).index.tolist() == [5, 14]
    assert lfq(CARD, bit_order="big").index.tolist() == [10, 7]
    np.testing.assert_array_equal(lfq(CARD).z_q, np.sign(CARD))


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize(("scale", "tau"), [(1.0, 1.0), (0.5, 3.0)])
def test_entropies_are_those_of_the_softmax_over_all_codes(dim, scale, tau):
    z = random(3, 7, dim)
    got = jax.jit(partial(lfq_entropies, scale=scale, inv_temperature=tau))(z)
    np.testing.assert_allclose(got, enumerate_(z, scale, tau), rtol=1e-12)
    loss = lfq_entropy_loss(z, scale=scale, inv_temperature=tau, diversity_weight=0.3)
    np.testing.assert_allclose(loss, got[0] - 0.3 * got[1], rtol=1e-12)


def test_gradient_by_differences_and_at_extremes():
    z, direction = random(6, 4), random(6, 4, seed=1)
    loss = partial(lfq_entropy_loss, diversity_weight=0.7)
    slope = float(jnp.sum(jax.grad(loss)(z) * direction))
    step = 1e-5
    numeric = float(loss(z + step * direction) - loss(z - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, numeric, rtol=1e-7)
    extreme = jnp.array([[0.0, 300.0, -300.0, 1e-30]])
    assert np.isfinite(jax.grad(loss)(extreme)).all()
    sure, _ = lfq_entropies(jnp.full((1, 3), 1e4))
    assert float(sure) == 0.0
    # An infinite feature is a sure bit, and has no gradient; the others are as if it were large.
    large = jnp.array([[1e5, -1e5, 0.2], [-1e5, 0.1, -1e5]])
    infinite = jnp.where(jnp.abs(large) > 1, large * jnp.inf, large)
    np.testing.assert_array_equal(lfq_entropies(infinite), lfq_entropies(large))
    np.testing.assert_array_equal(jax.grad(loss)(infinite), jax.grad(loss)(large))
    np.testing.assert_array_equal(jax.grad(loss)(infinite)[:, 0], 0)


def test_groups_bound_the_entropy_of_the_mean():
    z = random(200, 6)
    own, whole = lfq_entropies(z)
    for size in (1, 2, 4, 6, 9):
        same, grouped = lfq_entropies(z, group_size=size)
        assert float(same) == float(own)
        assert float(grouped) >= float(whole) - 1e-12
        parts = [enumerate_(z[:, i : i + size])[1] for i in range(0, 6, size)]
        np.testing.assert_allclose(grouped, sum(parts), rtol=1e-12)
    # 40 groups would be no trouble; one table of 2^30 is refused.
    wide = random(2, 30)
    assert np.isfinite(lfq_entropies(wide, group_size=5)[1])
    with pytest.raises(ValueError, match="group_size must be at most 24"):
        lfq_entropies(wide)


def test_memory_is_that_of_half_the_bits():
    """T = 512, d = 16: the table of all probabilities would hold 2^25 numbers."""
    spec = jax.ShapeDtypeStruct((512, 16), jnp.float32)
    compiled = jax.jit(jax.grad(lfq_entropy_loss)).lower(spec).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 2**16 * 4 / 8


def test_zero_goes_down_and_straight_through():
    z = jnp.array([[0.0, -0.0, 1e-30, 2.0]])
    out = lfq(z, scale=0.5)
    np.testing.assert_array_equal(out.z_q, [[-0.5, -0.5, 0.5, 0.5]])
    assert out.index.tolist() == [12]
    weights = random(1, 4)
    np.testing.assert_array_equal(jax.grad(lambda z: jnp.sum(weights * lfq(z).z_q))(z), weights)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_masks_nan_and_dtypes(dtype):
    z = random(4, 3, dtype=dtype).at[1, 2].set(jnp.nan).at[2].set(jnp.nan)
    mask = jnp.array([True, True, False, True])
    out = lfq(z, mask=mask)
    assert out.z_q.dtype == dtype
    assert out.index[1:3].tolist() == [8, 8]
    assert np.isnan(out.z_q[1, 2])
    np.testing.assert_array_equal(out.z_q[2], 0)
    finite = z.at[1].set(0.5)
    for function, given in ((lfq_entropies, {}), (spherical_entropies, {})):
        got = function(finite, mask=mask, **given)
        expected = function(finite[jnp.array([0, 1, 3])], **given)
        np.testing.assert_allclose(got, expected, rtol=1e-5)

    @jax.jit
    @jax.grad
    def gradient_of(z):
        codes = jnp.sum(spherical(z, mask=mask).z_q.astype(jnp.float32))
        return codes + lfq_entropy_loss(z, mask=mask)

    gradient = gradient_of(finite)
    np.testing.assert_array_equal(gradient[2], 0)
    assert np.isfinite(gradient).all()
    assert np.isnan(lfq_entropies(z)[0])  # it shows


@pytest.mark.parametrize("bit_order", ["little", "big"])
def test_index_and_code_are_inverse(bit_order):
    index = jnp.arange(32)
    code = lfq_code(index, 5, scale=0.3, bit_order=bit_order, dtype=jnp.float64)
    assert set(np.unique(code)) == {-0.3, 0.3}
    np.testing.assert_array_equal(lfq_index(code, bit_order=bit_order), index)
    assert np.isnan(lfq_code(jnp.array([32, -1]), 5)).all()
    bits = (np.asarray(index)[:, None] >> np.arange(5)) % 2
    bits = bits if bit_order == "little" else bits[:, ::-1]
    np.testing.assert_array_equal(code > 0, bits == 1)


def test_spherical_codes_lie_on_the_sphere():
    z = 7 * random(50, 6)
    out = spherical(z)
    np.testing.assert_allclose(jnp.linalg.norm(out.z_q, axis=-1), 1, rtol=1e-14)
    np.testing.assert_array_equal(np.sign(out.z_q), np.sign(z))
    unit = np.asarray(z) / np.linalg.norm(z, axis=-1, keepdims=True)
    assert ((unit - np.asarray(out.z_q)) ** 2).sum(-1).max() <= 2 - 2 / 6**0.5
    # Straight-through to z/‖z‖: no gradient along z.
    gradient = jax.grad(lambda z: jnp.sum(spherical(z).z_q * random(50, 6, seed=1)))(z)
    np.testing.assert_allclose((np.asarray(gradient) * unit).sum(-1), 0, atol=1e-14)
    expected = enumerate_(unit, scale=6**-0.5, tau=2.0)
    np.testing.assert_allclose(spherical_entropies(z, inv_temperature=2.0), expected, rtol=1e-12)
    zero = jax.grad(lambda z: jnp.sum(spherical(z).z_q))(jnp.zeros((1, 3)))
    np.testing.assert_array_equal(zero, 0)


def test_errors_name_the_argument():
    z = jnp.ones((2, 4))
    cases = [
        (lambda: lfq(z, num_codes=15), r"num_codes must be 2\^4 = 16; got 15"),
        (lambda: lfq(z, scale=0.0), "scale must be greater than 0"),
        (lambda: lfq(z, bit_order="middle"), "bit_order must be one of"),
        (lambda: lfq(jnp.ones((2, 31))), "at most 30 features"),
        (lambda: lfq(z, mask=jnp.ones(4, bool)), "mask must have shape"),
        (lambda: lfq_entropies(z, inv_temperature=-1.0), "inv_temperature must be greater"),
        (lambda: lfq_entropies(z, group_size=0), "group_size must be at least 1"),
        (lambda: lfq_entropy_loss(z, diversity_weight=-1.0), "diversity_weight must be"),
        (lambda: lfq_code(jnp.array(1), 0), "dim must be at least 1"),
        (lambda: spherical(z, mask=jnp.ones(3, bool)), "mask must have shape"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="z must be an array of real"):
        lfq(z.astype(int))
