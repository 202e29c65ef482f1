"""Transition matrices against the card's digits, their identities, and what they generate."""

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from jaxkit.ssm.hippo import MEASURES, basis_scale, transition


def radii(N):
    return np.sqrt(2 * np.arange(N) + 1.0)


def legt_polynomial(N):
    """det(sI − A_legt), w = 1, leading coefficient first: the [N−1/N] Padé denominator."""
    f = math.factorial
    return [Fraction(f(2 * N - 1 - j) * f(N), f(j) * f(N - j) * f(N - 1)) for j in range(N, -1, -1)]


def test_legs_digits():
    A, B = transition("legs", 4)
    rows = [
        [-1, 0, 0, 0],
        [-1.7320508, -2, 0, 0],
        [-2.2360680, -3.8729833, -3, 0],
        [-2.6457513, -4.5825757, -5.9160798, -4],
    ]
    np.testing.assert_allclose(A, rows, atol=5.1e-8)
    np.testing.assert_allclose(B, radii(4), rtol=1e-15)
    assert A.dtype == B.dtype == np.float64
    # Triangular: the diagonal is the spectrum, exactly.
    large = transition("legs", 300)[0]
    assert np.array_equal(np.diag(large), -np.arange(1.0, 301))
    assert not np.triu(large, 1).any()


@pytest.mark.parametrize("measure", ["legs", "legt", "fout", "fous"])
@pytest.mark.parametrize("N", [1, 3, 9, 33])
def test_a_constant_is_the_first_coefficient(measure, N):
    A, B = transition(measure, N)
    e = np.zeros(N)
    e[(N - 1) // 2 if measure == "fous" else 0] = 1
    np.testing.assert_allclose(A @ e, -B, atol=1e-14)
    np.testing.assert_allclose(-np.linalg.solve(A, B), e, atol=1e-11)


@pytest.mark.parametrize("N", [1, 2, 5, 16, 33])
def test_balance_identities(N):
    r = radii(N)
    odd = N | 1
    A, B = transition("legs", N)
    np.testing.assert_allclose((A + A.T + np.outer(B, B) + np.eye(N)) / N, 0, atol=1e-14)
    for decay in (0.0, 0.3, 1.0):
        A, B = transition("lagt", N, decay=decay)
        np.testing.assert_allclose(A + A.T + np.outer(B, B), -decay * np.eye(N), atol=1e-14)
    A, B = transition("fout", odd)
    np.testing.assert_allclose(A + A.T + np.outer(B, B), 0, atol=1e-14)
    for w in (1.0, 2.5):
        A, B = transition("legt", N, window=w)
        C = (-1.0) ** np.arange(N) * r
        total = w * (A + A.T) + w**2 * np.outer(B, B) + np.outer(C, C)
        np.testing.assert_allclose(total / N, 0, atol=1e-14)


@pytest.mark.parametrize(
    ("N", "digits"),
    [
        (1, [1, 1]),
        (2, [1, 4, 6]),
        (3, [1, 9, 36, 60]),
        (4, [1, 16, 120, 480, 840]),
    ],
)
def test_legt_characteristic_polynomial(N, digits):
    np.testing.assert_allclose(np.poly(transition("legt", N)[0]), digits, rtol=1e-13)
    assert legt_polynomial(N) == digits


@pytest.mark.parametrize("N", [1, 2, 3, 4, 6])
def test_legt_is_the_pade_approximant_of_a_delay(N):
    A, B = transition("legt", N)
    C = (-1.0) ** np.arange(N) * radii(N)
    with mpmath.workdps(40):
        taylor = [mpmath.mpf(-1) ** k / mpmath.factorial(k) for k in range(2 * N)]
        p, q = mpmath.pade(taylor, N - 1, N)
        for s in (0.0, 0.3j, 1 + 2j, 2 - 0.5j, 5j):
            ours = C @ np.linalg.solve(s * np.eye(N) - A, B)
            top, bottom = (
                sum(c * mpmath.mpmathify(s) ** i for i, c in enumerate(part)) for part in (p, q)
            )
            pade = complex(top / bottom)
            # 1e-15 times the condition of the solve (at most 20 here).
            assert abs(ours - pade) < 2e-14


def test_kernels():
    N = 32
    r = radii(N)
    n = np.arange(N)
    for t in (0.01, 0.4, 1.0, 3.0):
        A, B = transition("legs", N)
        kernel = math.exp(-t) * r * scipy.special.eval_legendre(n, 2 * math.exp(-t) - 1)
        np.testing.assert_allclose(scipy.linalg.expm(t * A) @ B, kernel, atol=1e-12)
        for decay in (0.0, 0.5, 1.0):
            A, B = transition("lagt", N, decay=decay)
            kernel = math.exp(-(1 + decay) * t / 2) * scipy.special.eval_laguerre(n, t)
            np.testing.assert_allclose(scipy.linalg.expm(t * A) @ B, kernel, atol=1e-12)


def test_fourier_window_needs_gain_two():
    K = 400
    expected = {
        "fout_post": [2 / 3, 2 / 3, 2 / 9, 2 / 27, 2 / 81],
        "fout": [1, 1, 0, 0, 0],
    }
    for measure, values in expected.items():
        A, x = transition(measure, 2 * K + 1)
        step = scipy.linalg.expm(0.1 * A)
        kernel = []
        for _ in range(34):
            kernel.append(x[0])
            x = step @ x
        np.testing.assert_allclose([kernel[i] for i in (3, 8, 13, 23, 33)], values, atol=2e-3)


@pytest.mark.parametrize("K", [1, 8, 64])
def test_fous_spectrum(K):
    A, _ = transition("fous", 2 * K + 1)
    n = np.arange(-K, K + 1)
    np.testing.assert_allclose(np.linalg.eigvals(A).real, -1, atol=1e-9)
    # The reason: A + I = diag(n) M with M skew-Hermitian and −iM positive semidefinite.
    difference = np.where(n[:, None] == n, 1, n[:, None] - n)
    M = np.where(n[:, None] == n, 1j * np.pi, -1 / difference)
    np.testing.assert_allclose(A + np.eye(2 * K + 1), n[:, None] * M, atol=1e-12)
    np.testing.assert_allclose(M, -M.conj().T, atol=0)
    assert np.linalg.eigvalsh(-1j * M).min() > -1e-12


@pytest.mark.parametrize("N", [1, 2, 7, 12])
def test_lmu_is_legt_reversed(N):
    A, B = transition("legt", N, window=3.0)
    D = (-1.0) ** np.arange(N) * radii(N)
    lmu_A, lmu_B = transition("lmu", N, window=3.0)
    np.testing.assert_allclose(lmu_A, D[:, None] * A / D, rtol=1e-14)
    np.testing.assert_allclose(lmu_B, D * B, rtol=1e-14)


def test_complex_and_real_fourier_are_one_system():
    K = 3
    # x_0, then √2 Re x_n and −√2 Im x_n, in terms of x_{−K..K} with x_{−n} = conj x_n.
    to_real = np.zeros((2 * K + 1, 2 * K + 1), complex)
    to_real[0, K] = 1
    for j in range(1, K + 1):
        to_real[2 * j - 1, [K + j, K - j]] = 1 / math.sqrt(2)
        to_real[2 * j, [K + j, K - j]] = [1j / math.sqrt(2), -1j / math.sqrt(2)]
    for measure in ("fout", "fout_post"):
        A, B = transition(measure, 2 * K + 1, window=2.0, complex_form=True)
        real_A, real_B = transition(measure, 2 * K + 1, window=2.0)
        np.testing.assert_allclose(to_real @ A @ to_real.conj().T, real_A, atol=1e-13)
        np.testing.assert_allclose(to_real @ B, real_B, atol=1e-13)


@pytest.mark.parametrize("measure", ["legt", "legs"])
def test_norms(measure):
    N = 6
    A, B = transition(measure, N)
    post = transition(measure, N, norm="post")
    np.testing.assert_allclose(post[0], A, rtol=1e-14)
    np.testing.assert_allclose(post[1], np.sqrt(2 * (2 * np.arange(N) + 1)), rtol=1e-15)
    lmu = transition(measure, N, norm="lmu")
    np.testing.assert_allclose(lmu[1], 2 * np.arange(N) + 1, rtol=1e-14)
    # The post's own λ counts from its basis: √(2/(2n+1)), not 2/√(2n+1).
    own = np.sqrt(2 / (2 * np.arange(N) + 1))
    np.testing.assert_allclose(post[1] / own, lmu[1], rtol=1e-14)
    scale = np.linspace(0.5, 2, N)
    custom = transition(measure, N, norm=scale)
    np.testing.assert_allclose(custom[0], A * scale[None] / scale[:, None], rtol=1e-14)
    np.testing.assert_allclose(custom[1], B / scale, rtol=1e-14)
    by_scale = transition(measure, N, norm=basis_scale(measure, N, "lmu"))
    np.testing.assert_array_equal(by_scale[0], lmu[0])


def roots_right_of_zero(coefficients):
    """Number of roots with positive real part, by Routh's table (leading coefficient first)."""
    first, second = list(coefficients[0::2]), list(coefficients[1::2])
    column = [first[0]]
    while second:
        column.append(second[0])
        padded = second + [mpmath.mpf(0)] * (len(first) - len(second))
        factor = first[0] / second[0]
        following = [first[i] - factor * padded[i] for i in range(1, len(first))]
        first, second = second, following
    return sum(a * b < 0 for a, b in itertools.pairwise(column))


def test_numerical_eigenvalues_of_legt_are_wrong():
    N = 64
    # Far left of the spectrum, which an error bound must not trust.
    assert np.linalg.eigvals(transition("legt", N)[0]).real.min() < -150
    with mpmath.workdps(300):
        p = [mpmath.mpf(c.numerator) / c.denominator for c in legt_polynomial(N)]

        def left_of(c):
            # q(z) = p(−c − z): roots of p left of −c are roots of q right of 0.
            moved = [mpmath.mpf(0)]
            for coefficient in p:
                # Horner in polynomials of z, constant first: moved·(−c − z) + coefficient.
                following = [mpmath.mpf(0)] * (len(moved) + 1)
                for i, value in enumerate(moved):
                    following[i] -= c * value
                    following[i + 1] -= value
                following[0] += coefficient
                moved = following
            while moved[-1] == 0:
                moved.pop()
            return roots_right_of_zero(moved[::-1])

        assert left_of(mpmath.mpf("84.47559")) == 0
        assert left_of(mpmath.mpf("84.47558")) > 0
        assert left_of(mpmath.mpf(0)) == N


@pytest.mark.parametrize(("N", "limit"), [(4, 5.2), (8, 17.8), (16, 59.8), (32, 196.9)])
def test_forward_euler_limit_of_legt(N, limit):
    A, _ = transition("legt", N)
    poles = np.linalg.eigvals(A)
    samples = 1 / (2 * np.min(-poles.real / np.abs(poles) ** 2))
    # The card rounds the number of samples in a window up.
    assert limit - 0.1 < samples <= limit
    for factor, stable in ((1.01, True), (0.99, False)):
        radius = np.abs(1 + poles / (samples * factor)).max()
        assert (radius < 1) == stable


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "words"),
    [
        (("legz", 4), {}, ValueError, "measure must be one of .*Did you mean 'leg"),
        (("legs", 0), {}, ValueError, "N must be at least 1; got 0"),
        (("legs", -3), {}, ValueError, "N must be at least 1"),
        (("legs", 2.0), {}, TypeError, "N must be an integer"),
        (("fout", 4), {}, ValueError, "N must be odd.*got 4"),
        (("fout_post", 4), {}, ValueError, "N must be odd"),
        (("fous", 4), {}, ValueError, "N must be odd"),
        (("legt", 4), {"window": 0.0}, ValueError, "window must be greater than 0"),
        (("legt", 4), {"window": -1.0}, ValueError, "window must be greater than 0"),
        (("legt", 4), {"window": float("inf")}, ValueError, "window must be greater than 0"),
        (("legt", 4), {"window": "1"}, TypeError, "window must be a real number"),
        (("lagt", 4), {"decay": 1.5}, ValueError, "decay must be at least 0.0 and at most 1.0"),
        (("lagt", 4), {"decay": -0.5}, ValueError, "decay must be"),
        (("legs", 4), {"norm": "units"}, ValueError, "norm must be one of .*Did you mean 'unit'"),
        (("fout", 5), {"norm": "post"}, ValueError, "norm must be 'unit'"),
        (("lagt", 5), {"norm": "lmu"}, ValueError, "norm must be 'unit'"),
        (("legs", 4), {"norm": np.ones(3)}, ValueError, "norm must be one of"),
        (("legs", 4), {"norm": np.zeros(4)}, ValueError, "norm must be one of"),
        (("legs", 4), {"norm": None}, TypeError, "norm must be one of"),
        (("legs", 4), {"complex_form": True}, ValueError, "complex_form must be False"),
    ],
)
def test_errors_name_the_argument(arguments, keywords, error, words):
    with pytest.raises(error, match=words):
        transition(*arguments, **keywords)


def test_every_measure_is_stable():
    for measure in MEASURES:
        A, _ = transition(measure, 9)
        assert np.linalg.norm(scipy.linalg.expm(30 * A)) < 1e-3, measure
