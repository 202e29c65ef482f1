"""Initial state matrices against closed forms, dense matrices and the digits of the card."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from jaxkit.ssm import init as inits


def stacked(system):
    """The dense matrix and input on both members of every pair."""
    eigenvalues = np.concatenate([system.eigenvalues, system.eigenvalues.conj()])
    low_rank = np.concatenate([system.low_rank, system.low_rank.conj()], axis=1)
    input_ = np.concatenate([system.input, system.input.conj()])
    return np.diag(eigenvalues) - low_rank.T @ low_rank.conj(), input_


def hippo(name, size):
    """The matrices of the HiPPO card in the real basis, written out entry by entry."""
    r = np.sqrt(2.0 * np.arange(size) + 1)
    matrix = np.zeros((size, size))
    for n in range(size):
        for k in range(size):
            if name == "legs":
                matrix[n, k] = -(r[n] * r[k] if k < n else n + 1 if k == n else 0)
            elif name == "legt":
                matrix[n, k] = -r[n] * r[k] * (1 if k < n else (-1) ** (n - k))
            else:
                matrix[n, k] = 0.5 * (n == k) - (k <= n)
    return matrix, np.ones(size) if name == "lagt" else r


def autocorrelation(matrix, input_, times):
    """`B^* e^{tA} B`, which no orthonormal change of basis alters."""
    return np.array([np.vdot(input_, scipy.linalg.expm(t * matrix) @ input_) for t in times])


@pytest.mark.parametrize(
    ("size", "beta", "weight"),
    [
        (4, [0.5565011151, 4.6032930071], [0.4674779436, 3.5325220564]),
        (
            8,
            [0.4274887123, 1.9577941509, 5.3542085150, 19.8574103710],
            [0.3195710139, 0.6902654388, 1.6999262796, 13.2902372677],
        ),
    ],
)
def test_legs_digits_of_the_card(size, beta, weight):
    system = inits.dplr("legs", size)
    np.testing.assert_allclose(system.eigenvalues.imag, beta, atol=5e-11)
    np.testing.assert_allclose(abs(system.low_rank[0]) ** 2, weight, atol=5e-11)
    np.testing.assert_array_equal(system.eigenvalues.real, -0.5)


def test_legs_64_spectrum_and_identities():
    system = inits.dplr("legs", 64)
    assert abs(system.eigenvalues.imag.min() - 0.2638569311) < 5e-11
    assert abs(system.eigenvalues.imag.max() - 1303.2738430) < 5e-8
    assert abs((abs(system.low_rank) ** 2).sum() / (64**2 / 4) - 1) < 1e-13
    np.testing.assert_allclose(system.input, np.sqrt(2) * system.low_rank[0], rtol=1e-13)


@pytest.mark.parametrize("step", [0.01, 0.1, 0.2])
def test_legs_spectral_radius_of_the_bilinear_transition(step):
    size = 8
    assert size * step**2 < 4
    matrix, _ = stacked(inits.dplr("legs", size))
    eye = np.eye(size)
    transition = np.linalg.solve(eye - step / 2 * matrix, eye + step / 2 * matrix)
    radius = abs(np.linalg.eigvals(transition)).max()
    assert abs(radius - (1 - step / 2) / (1 + step / 2)) < 1e-8


@pytest.mark.parametrize("name", ["legs", "legt", "lagt"])
@pytest.mark.parametrize("size", [2, 4, 16])
def test_dplr_is_the_hippo_matrix_in_another_orthonormal_basis(name, size):
    dense, dense_input = hippo(name, size)
    matrix, input_ = stacked(inits.dplr(name, size))
    times = [0.0, 0.1, 0.37, 1.0, 2.5]
    expected = autocorrelation(dense, dense_input, times)
    np.testing.assert_allclose(
        autocorrelation(matrix, input_, times), expected, atol=1e-12 * abs(expected).max()
    )
    # The symmetric part is invariant too, and tells the rank.
    rank = {"legs": 1, "legt": 2, "lagt": 1}[name]
    shift = -1.0 if name == "legs" else 0.0
    remainder = matrix + matrix.conj().T - shift * np.eye(size)
    values = np.linalg.svd(remainder, compute_uv=False)
    assert values[rank:].max(initial=0.0) < 1e-12 * values[0]
    assert values[rank - 1] > 1e-3 * values[0]


def test_legs_impulse_response_closed_form():
    size = 8
    n = np.arange(size)
    matrix, input_ = stacked(inits.dplr("legs", size))
    times = np.array([0.0, 0.2, 1.0, 3.0])
    # x_n(t) = e^{-t} r_n P_n(2e^{-t} - 1), so B·x(t) = Σ r_n² e^{-t} P_n.
    decay = np.exp(-times)[:, None]
    legendre = scipy.special.eval_legendre(n, 2 * decay - 1)
    expected = (decay * (2 * n + 1) * legendre).sum(-1)
    np.testing.assert_allclose(autocorrelation(matrix, input_, times), expected, atol=1e-11)


def test_lagt_impulse_response_closed_form():
    n = np.arange(6)
    matrix, input_ = stacked(inits.dplr("lagt", 6))
    times = np.array([0.0, 0.5, 2.0])
    laguerre = scipy.special.eval_laguerre(n, times[:, None])
    expected = (np.exp(-times[:, None] / 2) * laguerre).sum(-1)
    np.testing.assert_allclose(autocorrelation(matrix, input_, times), expected, atol=1e-12)


def test_fout_real_mode_counts_once():
    modes = 4
    n = np.arange(-(modes - 1), modes)
    dense = np.diag(2j * np.pi * n) - 2.0
    dense_input = np.full(len(n), 2.0)
    times = [0.0, 0.1, 0.5, 1.0, 1.7]
    expected = autocorrelation(dense, dense_input, times)
    system = inits.dplr("fout", 2 * modes)
    matrix, input_ = stacked(system)
    np.testing.assert_allclose(autocorrelation(matrix, input_, times), expected, atol=1e-11)
    np.testing.assert_allclose(system.low_rank[0], system.input / np.sqrt(2), rtol=1e-15)


def test_random_is_stable_and_follows_its_seed():
    first, again, other = (inits.dplr("random", 64, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.eigenvalues, again.eigenvalues)
    assert abs(first.eigenvalues - other.eigenvalues).min() > 0
    assert first.eigenvalues.real.max() < 0
    assert first.eigenvalues.imag.min() >= 0
    np.testing.assert_array_equal(
        inits.diagonal("random", 64, seed=0).eigenvalues, first.eigenvalues
    )


def test_tied_low_rank_is_stable_and_untied_is_not():
    rng = np.random.default_rng(0)
    for _ in range(50):
        real, imag = -np.exp(rng.standard_normal(8)), rng.standard_normal(8)
        p = rng.standard_normal((8, 2)) + 1j * rng.standard_normal((8, 2))
        matrix = np.diag(real + 1j * imag) - p @ p.conj().T
        assert np.linalg.eigvals(matrix).real.max() < 0
    untied = -0.5 * np.eye(2) - np.outer([1.0, 1.0], [1.0, -3.0])
    assert abs(np.linalg.eigvals(untied).real.max() - 1.5) < 1e-12


def test_diagonal_formulas():
    n = np.arange(4)
    np.testing.assert_allclose(inits.diagonal("lin", 8).eigenvalues, -0.5 + 1j * np.pi * n)
    inv = -0.5 + 1j * 8 / np.pi * (8 / (2 * n + 1) - 1)
    np.testing.assert_allclose(inits.diagonal("inv", 8).eigenvalues, inv)
    real = inits.diagonal("real", 7)
    np.testing.assert_array_equal(real.eigenvalues, -np.arange(1.0, 8.0))
    assert real.eigenvalues.dtype == real.input.dtype == np.float64
    for name in ("lin", "inv", "random"):
        np.testing.assert_array_equal(inits.diagonal(name, 8).input, 1)
    legs, dplr = inits.diagonal("legs", 8), inits.dplr("legs", 8)
    np.testing.assert_array_equal(legs.eigenvalues, dplr.eigenvalues)
    np.testing.assert_array_equal(legs.input, dplr.input)
    np.testing.assert_array_equal(inits.diagonal("legs", 8, halve_input=True).input, dplr.input / 2)


def test_diagonal_legs_converges_weakly_with_half_the_input():
    """Averaged over windows of 0.1 the halved response tends to LegS; pointwise it never does."""
    averaged, pointwise = {}, {}
    edges = np.arange(0.0, 2.05, 0.1)
    for size in (64, 256):
        # Read out x_0, the mean of the past: its LegS response is e^{-t}. In the mode basis
        # e_0 = -A^{-1}B, by Woodbury on the pair-stacked system.
        system = inits.dplr("legs", size)
        matrix, input_ = stacked(system)
        read = np.linalg.solve(matrix, -input_).conj()
        eigenvalues = np.diag(matrix) + abs(np.concatenate([system.low_rank[0]] * 2)) ** 2
        weights = read * input_ / 2
        primitive = (weights / eigenvalues * np.exp(np.outer(edges, eigenvalues))).sum(-1).real
        averages = np.diff(primitive) / 0.1
        expected = -np.diff(np.exp(-edges)) / 0.1
        averaged[size] = abs(averages - expected).max()
        times = np.linspace(0.01, 2, 400)
        response = (weights * np.exp(np.outer(times, eigenvalues))).sum(-1).real
        pointwise[size] = abs(response - np.exp(-times)).max()
    # The card has 0.03 and 0.003.
    assert 0.02 < averaged[64] < 0.04
    assert averaged[256] < 0.006
    assert min(pointwise.values()) > 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: inits.dplr("legs", 5), "state_size must be even"),
        (lambda: inits.diagonal("lin", 3), "state_size must be even"),
        (lambda: inits.dplr("legs", 0), "state_size must be at least 1"),
        (lambda: inits.dplr("leg", 4), "init must be one of"),
        (lambda: inits.diagonal("lini", 4), "Did you mean 'lin'"),
        (lambda: inits.diagonal("lin", 4, halve_input=True), "halve_input"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_state_size_must_be_an_integer():
    with pytest.raises(TypeError, match="state_size must be an integer"):
        inits.dplr("legs", 4.0)
