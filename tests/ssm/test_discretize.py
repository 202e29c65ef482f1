"""Discretization against SciPy, the card's digits, and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.signal

from jaxkit.ssm.discretize import LTI_METHODS, discretize, gbt, zoh
from jaxkit.ssm.hippo import transition
from tests.tolerance import tol

LEGT_2 = {
    "zoh": (
        [[0.8921575198, 0.1413361043], [-0.1413361043, 0.7289566441]],
        [0.1078424802, 0.1413361043],
    ),
    "bilinear": (
        [[0.8930041152, 0.1425556220], [-0.1425556220, 0.7283950617]],
        [0.1069958848, 0.1425556220],
    ),
}


@pytest.mark.parametrize("method", LEGT_2)
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_legt_digits(method, array):
    A, B = transition("legt", 2)
    A_bar, B_bar = discretize(array(A), array(B), 0.1, method=method)
    np.testing.assert_allclose(A_bar, LEGT_2[method][0], atol=6e-11)
    np.testing.assert_allclose(B_bar, LEGT_2[method][1], atol=6e-11)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_double_integrator_has_no_inverse(array):
    A_bar, B_bar = zoh(array([[0.0, 1.0], [0.0, 0.0]]), array([0.0, 1.0]), 0.5)
    np.testing.assert_allclose(A_bar, [[1, 0.5], [0, 1]], atol=1e-15)
    np.testing.assert_allclose(B_bar, [0.125, 0.5], atol=1e-15)


@pytest.mark.parametrize("measure", ["legt", "lmu", "legs", "lagt", "fout", "fout_post"])
@pytest.mark.parametrize("method", LTI_METHODS)
def test_equals_scipy(measure, method):
    A, B = transition(measure, 5, window=2.0)
    name = {"forward": "euler", "backward": "backward_diff"}.get(method, method)
    A_bar, B_bar, *_ = scipy.signal.cont2discrete(
        (A, B[:, None], np.eye(5), np.zeros((5, 1))), 0.05, method=name, alpha=0.3
    )
    for array in (np.asarray, jnp.asarray):
        ours = discretize(array(A), array(B), 0.05, method=method, alpha=0.3)
        np.testing.assert_allclose(ours[0], A_bar, atol=1e-14)
        np.testing.assert_allclose(ours[1], B_bar[:, 0], atol=1e-14)


@pytest.mark.parametrize("method", ["backward", "zoh"])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_varying_steps_and_several_inputs(method, array):
    A, B = transition("legt", 4)
    inputs = np.stack([B, np.arange(4.0)], axis=1)
    dt = np.array([[0.01, 0.02, 0.3], [0.04, 0.5, 0.06]])
    A_bar, B_bar = discretize(array(A), array(inputs), array(dt), method=method)
    assert A_bar.shape == (2, 3, 4, 4)
    assert B_bar.shape == (2, 3, 4, 2)
    for i in np.ndindex(dt.shape):
        one = discretize(A, inputs, dt[i], method=method)
        np.testing.assert_allclose(A_bar[i], one[0], atol=1e-13)
        np.testing.assert_allclose(B_bar[i], one[1], atol=1e-13)


def test_complex_system():
    A, B = transition("fout", 5, complex_form=True)
    for method in ("bilinear", "zoh"):
        host = discretize(A, B, 0.1, method=method)
        device = discretize(jnp.asarray(A), B, jnp.asarray(0.1), method=method)
        assert host[0].dtype == np.complex128
        np.testing.assert_allclose(device[0], host[0], atol=1e-13)
        np.testing.assert_allclose(device[1], host[1], atol=1e-13)


def test_small_step_does_not_cancel():
    A, B = transition("legs", 8)
    _, B_bar = zoh(A, B, 1e-12)
    np.testing.assert_allclose(B_bar, 1e-12 * B, rtol=1e-10)
    _, B_bar = zoh(jnp.asarray(A), jnp.asarray(B), 1e-12)
    np.testing.assert_allclose(B_bar, 1e-12 * B, rtol=1e-10)


def test_stiff_step_on_device_is_finite():
    # The largest step LegS ever takes is ln 2, at a norm where 16 squarings would not do.
    A, B = transition("legs", 256)
    A_bar, _ = zoh(jnp.asarray(A), jnp.asarray(B), 100.0)
    assert np.isfinite(A_bar).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_output_dtype_is_that_of_the_arguments(dtype):
    A, B = transition("legt", 4)
    for method in ("bilinear", "zoh"):
        A_bar, B_bar = discretize(jnp.asarray(A, dtype), jnp.asarray(B, dtype), 0.1, method=method)
        assert A_bar.dtype == B_bar.dtype == dtype
        exact = discretize(np.asarray(jnp.asarray(A, dtype), np.float64), B, 0.1, method=method)
        np.testing.assert_allclose(np.asarray(A_bar, np.float64), exact[0], atol=tol(dtype, 4))


def test_gradient_in_the_step():
    A, B = transition("legt", 3)
    for method in ("bilinear", "zoh"):

        def f(dt, method=method):
            A_bar, B_bar = discretize(A, B, dt, method=method)
            return jnp.sum(jnp.sin(A_bar)) + jnp.sum(B_bar**2)

        h = 1e-6
        slope = (f(jnp.asarray(0.1 + h)) - f(jnp.asarray(0.1 - h))) / (2 * h)
        # A central difference of float64 values is good to about h² + eps / h.
        np.testing.assert_allclose(jax.jit(jax.grad(f))(jnp.asarray(0.1)), slope, rtol=1e-8)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"dt": 0.0}, ValueError, "dt must be greater than 0"),
        ({"dt": -1.0}, ValueError, "dt must be greater than 0"),
        ({"dt": np.array([0.1, np.nan])}, ValueError, "dt must be greater than 0"),
        ({"dt": jnp.asarray([0.1, -0.1])}, ValueError, "dt must be greater than 0"),
        ({"dt": 1j}, TypeError, "dt must be real"),
        ({"dt": "x"}, TypeError, "dt must be real"),
        ({"alpha": 1.5, "method": "gbt"}, ValueError, "alpha must be at least 0.0"),
        ({"alpha": -0.1, "method": "gbt"}, ValueError, "alpha must be at least 0.0"),
        ({"method": "tustin"}, ValueError, "method must be one of"),
        ({"A": np.ones((2, 3))}, ValueError, "A must be a square"),
        ({"B": np.ones(4)}, ValueError, "B must be"),
    ],
)
def test_errors_name_the_argument(keywords, error, words):
    arguments = {"A": np.eye(3), "B": np.ones(3), "dt": 0.1} | keywords
    with pytest.raises(error, match=words):
        discretize(arguments.pop("A"), arguments.pop("B"), arguments.pop("dt"), **arguments)


def test_gbt_weight_is_on_the_implicit_side():
    A, B = np.array([[-2.0]]), np.array([1.0])
    assert gbt(A, B, 0.25, alpha=0.0)[0] == 0.5
    assert gbt(A, B, 0.5, alpha=1.0)[0] == 0.5


def test_held_input_kernel_of_two_legs_states():
    A, B = transition("legs", 2)
    A_bar, B_bar = (np.asarray(part) for part in discretize(A, B, 0.5, method="zoh"))
    state, kernel = B_bar, []
    for _ in range(4):
        kernel.append(state.sum())  # C = [1, 1]
        state = A_bar @ state
    printed = [0.8068253761, 0.2280734793, 0.0422100266, -0.0097601957]
    np.testing.assert_allclose(kernel, printed, atol=6e-11)
