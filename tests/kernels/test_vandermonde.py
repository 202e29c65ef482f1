"""Vandermonde: phases, and the accuracy in float32 that the card states."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jaxkit_kernels import vandermonde
from jaxkit_kernels.vandermonde import phase

from tests.kernels import contract
from tests.kernels.test_cauchy import legs


@pytest.mark.parametrize("beta", [1e-6, 0.5, 3.0, 65.0, 1303.25])
def test_phases_to_the_last_bit(beta):
    """Against 50 digits; a float32 product would be off by 2^-24 of the whole angle."""
    position = np.array([0, 1, 4095, 4096, 65537, 2**24 - 1])

    def run(beta):
        turns = tuple(x[None] for x in phase.split_turns(beta))
        return phase.fraction(jnp.asarray(position, jnp.int32), turns)

    value = jnp.asarray(beta, jnp.float32)
    with mpmath.workdps(50):
        exact = [mpmath.mpf(float(value)) * int(l) / (2 * mpmath.pi) for l in position]
        want = np.array([float(turn - mpmath.nint(turn)) for turn in exact])
    for got in (run(value), jax.jit(run)(value)):  # the compiler must not simplify it away
        gap = np.abs(np.asarray(got, np.float64) - want)
        gap = np.minimum(gap, 1 - gap)
        # Twelve spare bits below the last of beta: |beta| 2^-44 turns a position.
        assert (gap <= 2.0**-23 + beta * position * 2.0**-44).all()


def initial(kind, state):
    n = np.arange(state // 2)
    if kind == "lin":
        return -0.5 + 1j * np.pi * n
    if kind == "inv":
        return -0.5 + 1j * state / np.pi * (state / (2 * n + 1) - 1)
    return legs(state)[0]


def problem(lam, step, seed=0):
    rng = np.random.default_rng(seed)
    v = rng.standard_normal(lam.shape) + 1j * rng.standard_normal(lam.shape)
    parts = (-lam.real * step, lam.imag * step, v.real, v.imag)
    return tuple(jnp.asarray(x[None], jnp.float32) for x in parts)


def relative_gap(operands, length, implementation, **options):
    got = vandermonde(*operands, length=length, implementation=implementation, **options)
    want = np.asarray(vandermonde(*contract.as64(operands), length=length))
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


# (2/e) 2^-24 max|Im Lambda|: the digits of the card, for Re Lambda = -1/2 and any step and length.
@pytest.mark.parametrize(
    ("kind", "state", "bound"),
    [("lin", 64, 4.3e-6), ("inv", 64, 5.7e-5), ("legs", 64, 5.7e-5), ("legs", 256, 9e-4)],
)
def test_direct_form_in_float32(kind, state, bound):
    lam = initial(kind, state)
    assert 2 / np.e * 2.0**-24 * np.abs(lam.imag).max() == pytest.approx(bound, rel=0.02)
    for step in (1e-3, 1e-2):
        gap = relative_gap(problem(lam, step), 4096, "reference")
        assert gap <= bound


@pytest.mark.parametrize("implementation", ["xla", *contract.PALLAS])
def test_reduced_phases_in_float32(implementation):
    """Hardly damped modes, where the direct form loses three digits with the length."""
    lam = initial("legs", 64)
    lam = -1e-4 + 1j * lam.imag
    operands = problem(lam, 0.01)
    interpret = implementation in contract.PALLAS
    assert relative_gap(operands, 16384, implementation, interpret=interpret) <= 1e-6
    if implementation == "xla":
        direct = relative_gap(operands, 16384, "reference")
        assert direct > 1e-4


def test_real_spectrum():
    """beta = 0 with half the weights: a sum of real exponentials."""
    rate, weight = jnp.array([[0.1, 0.7, 2.0]]), jnp.array([[1.0, -2.0, 0.5]])
    zero = jnp.zeros_like(rate)
    got = vandermonde(rate, zero, weight / 2, zero, length=20)
    want = np.exp(-np.arange(20)[:, None] * np.asarray(rate)) @ np.asarray(weight)[0]
    np.testing.assert_allclose(got[0], want, rtol=1e-14, atol=1e-15)


def test_length_limit():
    operands = problem(initial("lin", 4), 0.1)
    with pytest.raises(ValueError, match=r"length must lie in \[1, 2\^24\); got 16777216"):
        vandermonde(*operands, length=1 << 24)
