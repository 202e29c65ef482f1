"""Generating function: ranks, the tied form, the accuracy and memory that the card states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxkit_kernels import dplr_generating_function
from jaxkit_kernels.cauchy.nodes import half_angles

from tests.kernels import contract
from tests.kernels.cases import CAUCHY, cauchy_oracle, make_cauchy
from tests.tolerance import tol


def legs(state):
    """Lambda, P, B of LegS: A + P P^T + I/2 is skew."""
    root = np.sqrt(2 * np.arange(state) + 1.0)
    low = np.sqrt(np.arange(state) + 0.5)
    a = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(state) + 1.0)
    beta, vectors = np.linalg.eigh(-1j * (a + np.outer(low, low) + 0.5 * np.eye(state)))
    half = beta > 0
    vectors = vectors[:, half].conj().T
    return -0.5 + 1j * beta[half], vectors @ low, vectors @ root


def legs_operands(state, steps, seed=0):
    lam, p, b = legs(state)
    rng = np.random.default_rng(seed)
    shape = (len(steps), state // 2)
    c = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    step = np.asarray(steps)[:, None]
    pair = lambda v: (v.real, v.imag)
    return (
        np.broadcast_to(-lam.real * step / 2, shape),
        lam.imag * step / 2,
        pair(c * step * b),
        pair((c * step * p)[:, None]),
        pair((p.conj() * step * b)[:, None]),
        (step * np.abs(p) ** 2)[:, None, None],
    )


def kernel(*operands, length, **options):
    re, im = dplr_generating_function(*operands, length=length, **options)
    return jnp.fft.irfft(jax.lax.complex(re, im), n=length)


@pytest.mark.parametrize("length", [1, 2, 9, 10])
def test_half_angles(length):
    sine, cosine = half_angles(length, padded=length // 2 + 4)
    index = np.arange(length // 2 + 1)
    np.testing.assert_allclose(sine[: index.size], np.sin(np.pi * index / length), atol=1e-15)
    np.testing.assert_allclose(cosine[: index.size], np.cos(np.pi * index / length), atol=1e-15)
    assert length % 2 or cosine[length // 2] == 0.0
    assert (sine[index.size :] == 1).all()
    assert (cosine[index.size :] == 0).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("rank", [2, 3])
def test_higher_rank(rank, implementation):
    operands = contract.as64(make_cauchy(np.random.default_rng(0), 2, 4, rank=rank))
    got = CAUCHY.bind(implementation, 9)(*operands)
    want = cauchy_oracle(*operands, length=9)
    assert contract.error(contract.joint(got), contract.joint(want)) < tol(jnp.float64, 4)


def test_higher_rank_cotangents():
    operands = contract.as64(make_cauchy(np.random.default_rng(0), 2, 4, rank=2))
    bars = []
    for implementation in ("xla", "reference"):
        out, pull = jax.vjp(CAUCHY.bind(implementation, 12), *operands)
        bars.append(pull(jax.tree.map(jnp.cos, out)))
    assert contract.error(*bars) < tol(jnp.float64, 16)


@pytest.mark.parametrize("implementation", contract.PALLAS)
def test_kernels_refuse_higher_rank(implementation):
    operands = contract.cast(make_cauchy(np.random.default_rng(0), 2, 4, rank=2), jnp.float32)
    with pytest.raises(NotImplementedError, match=r"rank 1; got rank 2"):
        CAUCHY.bind(implementation, 9)(*operands)


def test_tied_is_a_pair_with_zero_imaginary_part():
    operands = contract.as64(make_cauchy(np.random.default_rng(0), 2, 4, tied=True))
    pp = operands[-1]
    tied = kernel(*operands, length=12)
    paired = kernel(*operands[:-1], (pp, jnp.zeros_like(pp)), length=12)
    np.testing.assert_array_equal(tied, paired)
    bar = jax.grad(lambda pp: jnp.sum(kernel(*operands[:-1], pp, length=12) ** 2))(pp)
    assert bar.shape == pp.shape


def test_pairs_are_checked():
    operands = contract.cast(make_cauchy(np.random.default_rng(0), 2, 4, rank=2), jnp.float32)
    with pytest.raises(TypeError, match=r"cb must be a pair \(re, im\)"):
        kernel(*operands[:2], operands[2][0], *operands[3:], length=8)
    with pytest.raises(ValueError, match=r"pb \(re\) must have shape \(2, 2, 4\)"):
        kernel(*operands[:4], operands[2], operands[5], length=8)
    with pytest.raises(ValueError, match=r"pp as one real array takes rank 1; got rank 2"):
        kernel(*operands[:5], operands[5][0], length=8)


# The card: max|dK| / max|K| for steps in [1e-3, 0.1] and lengths 256 to 16384.
@pytest.mark.parametrize(("state", "bound"), [(16, 6e-7), (64, 1.5e-6), (256, 1e-5)])
@pytest.mark.parametrize("length", [256, 16384])
def test_float32_accuracy(state, bound, length):
    low = contract.cast(legs_operands(state, [1e-3, 1e-2, 1e-1]), jnp.float32)
    got = kernel(*low, length=length)
    assert got.dtype == jnp.float32
    # The float64 `xla` form, itself held to the reference above, in little memory.
    want = np.asarray(kernel(*contract.as64(low), length=length))
    gap = np.abs(np.asarray(got, np.float64) - want).max(-1) / np.abs(want).max(-1)
    assert gap.max() <= bound


@pytest.mark.parametrize("implementation", contract.PALLAS)
def test_float32_accuracy_of_the_kernels(implementation):
    low = contract.cast(legs_operands(64, [1e-3, 1e-1]), jnp.float32)
    want = np.asarray(kernel(*contract.as64(low), length=1024))
    got = kernel(*low, length=1024, implementation=implementation, interpret=True)
    gap = np.abs(np.asarray(got, np.float64) - want).max(-1) / np.abs(want).max(-1)
    assert gap.max() <= 1.5e-6


def test_memory_is_a_tenth_of_the_broadcast_form():
    heads, state, length = 64, 64, 16384
    spec = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), legs_operands(state, [0.01] * heads)
    )
    forward = lambda *args: kernel(*args, length=length)

    def both(cotangent, *args):
        out, pull = jax.vjp(forward, *args)
        return out, pull(cotangent)

    limit = heads * state * length * 4 / 10
    assert contract.temporary_bytes(forward, *spec) < limit
    cotangent = jax.ShapeDtypeStruct((heads, length), jnp.float32)
    assert contract.temporary_bytes(both, cotangent, *spec) < limit
