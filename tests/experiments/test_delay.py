import numpy as np
import pytest
from jaxkit_experiments.ssm import delay, tasks
from scipy.signal import cont2discrete

from jaxkit.ssm.hippo import transition

# The card's table: N = 16, 32, 64, and the best Δτ where it names one.
CARD = {
    "legt": ((0.4507, 0.0002, 0.0), (None, 1.0, None)),
    "fout": ((0.4392, 0.0735, 0.0352), (None, 1.0, None)),
    "legs": ((0.8303, 0.1156, 0.0), (None, 2.0, None)),
    "s4d-lin": ((0.5439, 0.3654, 0.3637), (None, 2.0, None)),
    "s4d-inv": ((0.8151, 0.1583, 0.0266), (None, 4.0, 8.0)),
    "s4d-real": ((0.9445, 0.934, 0.926), (None, None, None)),
}


@pytest.mark.parametrize("system", delay.SYSTEMS)
def test_card_table(system):
    scores = delay.delay_table([system])
    for size, want, best in zip((16, 32, 64), *CARD[system], strict=True):
        score = scores[system, size]
        assert score.nrmse == pytest.approx(want, rel=0.05, abs=1e-4)
        assert best is None or score.timescale == best
        assert score.nrmse == min(score.errors.values()) == score.errors[score.timescale]
        assert tuple(score.errors) == delay.TIMESCALES


def test_scales_must_be_those_of_training():
    """The card's trap: LegT's 2e-4 becomes .33 with the test set's own deviations."""
    assert delay.delay_nrmse("legt", 32) == pytest.approx(2e-4, abs=1e-4)
    assert delay.delay_nrmse("legt", 32, scale_by="test") == pytest.approx(0.33, rel=0.05)


@pytest.mark.parametrize("system", ["legt", "legs", "fout"])
def test_states_of_a_dense_system_equal_scipy(system):
    u = tasks.white(50, 0.2, 0)
    A, B = transition(system, 5)
    a, b, *_ = cont2discrete((A, B[:, None], np.eye(5), np.zeros((5, 1))), 0.1, "zoh")
    x, want = np.zeros(5), []
    for now in u:
        x = a @ x + b[:, 0] * now
        want.append(x)
    np.testing.assert_allclose(delay.delay_states(system, 5, 0.1, u), want, atol=1e-12)


@pytest.mark.parametrize(
    ("system", "eigenvalues"),
    [
        ("s4d-lin", -0.5 + 1j * np.pi * np.arange(3)),
        ("s4d-inv", -0.5 + 1j * (6 / np.pi) * (6 / (2 * np.arange(3) + 1) - 1)),
        ("s4d-real", -np.arange(1.0, 7)),
    ],
)
def test_states_of_a_diagonal_system_are_a_convolution(system, eigenvalues):
    u = tasks.white(40, 0.2, 0)
    got = delay.delay_states(system, 6, 0.3, u)
    assert got.shape == (40, 6)
    age = np.arange(40)
    modes = len(eigenvalues)
    for n, eigenvalue in enumerate(eigenvalues):
        # The input held over one step leaves ∫ e^{λs} ds, and decays from then on.
        taps = np.exp(0.3 * age * eigenvalue) * (np.exp(0.3 * eigenvalue) - 1) / eigenvalue
        want = np.convolve(u, taps)[:40]
        np.testing.assert_allclose(got[:, n], want.real, atol=1e-12)
        if modes == 3:
            np.testing.assert_allclose(got[:, modes + n], want.imag, atol=1e-12)


def test_even_fout_has_one_state_less():
    assert delay.delay_states("fout", 16, 0.1, np.ones(3)).shape == (3, 15)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: delay.delay_nrmse("legt", 8, lag=64, samples=64), ValueError, r"\(τ < T\)"),
        (lambda: delay.delay_nrmse("legt", 8, lag=64, samples=500), ValueError, "warmup must"),
        (lambda: delay.delay_nrmse("legt", 8, lag=0), ValueError, "lag must be at least 1"),
        (lambda: delay.delay_nrmse("s4d-line", 8), ValueError, "Did you mean 's4d-lin'"),
        (lambda: delay.delay_nrmse("s4d-lin", 7), ValueError, "state_size must be even"),
        (lambda: delay.delay_nrmse("legt", 0), ValueError, "state_size must be at least 1"),
        (lambda: delay.delay_nrmse("legt", 8, timescale=0.0), ValueError, "timescale must be"),
        (lambda: delay.delay_nrmse("legt", 8, ridge=-1.0), ValueError, "ridge must be"),
        (lambda: delay.delay_nrmse("legt", 8, scale_by="both"), ValueError, "scale_by must be"),
        (lambda: delay.delay_nrmse("legt", 8, cutoff=0.7), ValueError, "cutoff must be"),
        (lambda: delay.delay_table(["lstm"]), ValueError, "systems must be one of"),
        (lambda: delay.delay_table(["legt"], timescales=[]), ValueError, "timescales must"),
        (lambda: delay.delay_states("legt", 4, -1.0, np.ones(2)), ValueError, "step must be"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()
