"""Scans, closed forms and reconstruction against digits, dense float64 oracles and structure."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special

from jaxkit.ssm import discretize, hippo
from tests.tolerance import tol

METHODS = ("bilinear", "exact", "gbt", "gbt_t", "repo", "forward", "backward")


def midpoints(T):
    return (np.arange(T) + 0.5) / T


def smooth(T):
    s = midpoints(T)
    return np.sin(6 * s) + s**2


def e0(N):
    return np.eye(N)[0]


def dense_legs(u, times, N, method, alpha=0.5, weight="trapezoid"):
    """LegS by dense NumPy solves, written from the card's formulas; states after every sample."""
    A, B = hippo.transition("legs", N)
    identity = np.eye(N)
    x, t, states = np.zeros(N), 0.0, []
    for u_k, t_next in zip(u, times, strict=True):
        h = t_next - t
        delta = math.log(t_next / t) if t else None
        if method == "repo":
            left, right, w = alpha * h / t_next, (1 - alpha) * h / t_next, h / t_next
        elif not t:
            x, t = u_k * e0(N), t_next
            states.append(x)
            continue
        elif method == "exact":
            P = scipy.linalg.expm(delta * A)
            x, t = P @ x + np.linalg.solve(A, (P - identity) @ B) * u_k, t_next
            states.append(x)
            continue
        elif method in ("bilinear", "gbt"):
            a = 0.5 if method == "bilinear" else alpha
            left, right, w = a * delta, (1 - a) * delta, delta
        else:
            a = {"forward": 0.0, "backward": 1.0}.get(method, alpha)
            left, right = a * h / t_next, (1 - a) * h / t
            w = {
                "trapezoid": left + right,
                "log": delta,
                "paper": h / t,
            }[weight if method == "gbt_t" else "trapezoid"]
        x = np.linalg.solve(identity - left * A, (identity + right * A) @ x + w * B * u_k)
        t = t_next
        states.append(x)
    return np.stack(states)


# --- digits ---------------------------------------------------------------------------------


def test_digits_of_three_samples():
    u = jnp.asarray([1.0, 2.0, 4.0])
    exact = [2.3333333333, 1.1547005384, 0.1656346650]
    np.testing.assert_allclose(hippo.legs_coefficients(u, 3), exact, atol=5.1e-11)
    np.testing.assert_allclose(hippo.legs_scan(u, 3, method="exact")[-1], exact, atol=5.1e-11)
    bilinear = [2.3525765176, 1.2552628152, 0.3480300155]
    np.testing.assert_allclose(hippo.legs_scan(u, 3)[-1], bilinear, atol=5.1e-11)
    np.testing.assert_allclose(hippo.project(u, 3, last_only=True), bilinear, atol=5.1e-11)


def test_first_exact_coefficient_is_the_mean():
    u = np.random.default_rng(0).standard_normal(100)
    x = hippo.legs_scan(jnp.asarray(u), 7, method="exact", chunk=16)
    np.testing.assert_allclose(x[:, 0], np.cumsum(u) / np.arange(1, 101), atol=1e-14)


@pytest.mark.parametrize(
    ("T", "paper", "default"),
    [
        (250, 6.23e-3, 9.77e-5),
        (500, 3.09e-3, 2.46e-5),
        (1000, 1.54e-3, 6.38e-6),
        (2000, 7.66e-4, 1.72e-6),
    ],
)
def test_orders_of_the_input_weights(T, paper, default):
    u = jnp.asarray(smooth(T))
    exact = hippo.legs_coefficients(u, 8)
    for value, keywords in ((paper, {"method": "gbt_t", "weight": "paper"}), (default, {})):
        x = hippo.legs_scan(u, 8, last_only=True, **keywords)
        # The card gives three digits.
        np.testing.assert_allclose(np.linalg.norm(x - exact), value, rtol=3.5e-3)


def test_constants():
    u = jnp.ones(100)
    for keywords in ({}, {"method": "gbt_t", "weight": "trapezoid"}, {"method": "exact"}):
        x = hippo.legs_scan(u, 8, last_only=True, **keywords)
        np.testing.assert_allclose(x, e0(8), atol=1e-15 * 8)
    x = hippo.legs_scan(u, 8, last_only=True, method="gbt_t", weight="paper")
    off = np.asarray(x - e0(8))
    np.testing.assert_allclose(np.abs(off).max(), 0.0234, atol=6e-5)


@pytest.mark.parametrize(
    ("T", "errors"),
    [
        (100, (0.128, 1.20e-3, 0.102)),
        (200, (0.0595, 2.99e-4, 0.0537)),
        (400, (0.0290, 7.47e-5, 0.0275)),
    ],
)
def test_legt_against_zero_order_hold(T, errors):
    u = jnp.asarray(np.sin(7 * (np.arange(2 * T) + 0.5) / T))
    run = functools.partial(
        hippo.project, u, 16, measure="legt", dt=1 / T, last_only=True, parallel=True
    )
    exact = run()
    for method, value in zip(("forward", "bilinear", "backward"), errors, strict=True):
        # The card gives three digits.
        np.testing.assert_allclose(np.linalg.norm(run(method=method) - exact), value, rtol=4e-3)


def test_forward_euler_is_unusable():
    u = smooth(4000)
    for N, value in ((8, 7.99), (32, 2.4e18), (64, 2.7e42)):
        x = hippo.legs_scan(jnp.asarray(u[:200]), N, method="forward", unsafe=True)
        np.testing.assert_allclose(np.abs(x).max(), value, rtol=0.02)
    x = hippo.legs_scan(jnp.asarray(u[:200], jnp.float32), 64, method="forward", unsafe=True)
    assert not np.isfinite(x).all()
    hippo.legs_scan(jnp.ones(3), 16, method="forward")


def test_gradient_of_a_sample():
    T, N = 4000, 16
    row = jax.jacobian(lambda u: hippo.legs_coefficients(u, N))(jnp.zeros(T))
    norms = np.linalg.norm(row, axis=0) * T
    s = midpoints(T)
    P = np.polynomial.legendre.legvander(2 * s - 1, N - 1)
    curve = np.sqrt(P**2 @ (2 * np.arange(N) + 1))
    # A sample's interval is short against the basis, but for N³/T at the ends.
    np.testing.assert_allclose(norms[50:-50], curve[50:-50], rtol=1e-4)
    np.testing.assert_allclose(norms[[0, -1]], N, rtol=0.02)
    np.testing.assert_allclose(norms[T // 2], 3.1421, rtol=1e-4)
    assert abs(math.sqrt(2 * N / math.pi) - 3.1421) < 0.06


def blwn(T, F, seed):
    z = np.random.default_rng(seed).standard_normal((2, 2 * F))
    c = np.zeros(T + 1, complex)
    c[1 : 2 * F + 1] = z[0] + 1j * z[1]
    u = np.fft.irfft(c, 2 * T)[:T]
    return u / np.sqrt(np.mean(u**2))


@pytest.mark.parametrize(
    ("F", "N", "errors"),
    [(4, 8, (0.4933, 0.0633, 0.1744, 0.385)), (16, 32, (0.5547, 0.0015, 0.1571, 0.426))],
)
def test_reconstruction_of_band_limited_noise(F, N, errors):
    T = 2048
    u = np.stack([blwn(T, F, seed) for seed in range(3)])
    odd = N - 1 + N % 2
    for (measure, size), value in zip(
        (("legs", N), ("legt", N), ("fout", odd), ("fout_post", odd)), errors, strict=True
    ):
        keywords = {"method": "exact"} if measure == "legs" else {"dt": 1.0, "window": T / 2}
        x = hippo.project(
            jnp.asarray(u), size, measure=measure, parallel=True, last_only=True, **keywords
        )
        past = u if measure == "legs" else u[:, T // 2 :]
        back = hippo.reconstruct(x, midpoints(past.shape[1]), measure=measure)
        error = np.linalg.norm(back - past, axis=1) / np.linalg.norm(past, axis=1)
        np.testing.assert_allclose(error.mean(), value, rtol=0.05, atol=1e-4)


# --- LegS: primitives and closed forms ------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 7, 33])
def test_apply_and_solve_are_linear_in_n(N):
    A, _ = hippo.transition("legs", N)
    v = np.random.default_rng(N).standard_normal((2, 3, N))
    np.testing.assert_allclose(
        hippo.legs_apply(jnp.asarray(v)), v @ A.T, atol=tol("float64", N) * N
    )
    lam = np.array([[0.0, 0.01, 0.3], [0.5, 2.0, 1e4]])
    dense = np.linalg.solve(np.eye(N) - lam[..., None, None] * A, v[..., None])[..., 0]
    for form in ("sequential", "associative"):
        z = hippo.legs_solve(jnp.asarray(v), jnp.asarray(lam), form=form)
        np.testing.assert_allclose(z, dense, atol=tol("float64", N) * 4)
    one = hippo.legs_solve(jnp.asarray(v), 0.3)
    np.testing.assert_allclose(one[0, 2], dense[0, 2], atol=tol("float64", N) * 4)


@pytest.mark.parametrize("ratio", [1.0, 1.01, 2.0, 50.0])
def test_gap_transition(ratio):
    N = 12
    A, _ = hippo.transition("legs", N)
    T = hippo.legs_transition(N, ratio)
    np.testing.assert_allclose(T, scipy.linalg.expm(A * math.log(ratio)), atol=1e-12)
    assert not np.triu(T, 1).any()
    np.testing.assert_allclose(np.diag(T), ratio ** -(np.arange(N) + 1.0), atol=1e-14)
    x = np.random.default_rng(0).standard_normal((3, N))
    np.testing.assert_allclose(hippo.legs_propagate(jnp.asarray(x), ratio), x @ T.T, atol=1e-13)


def test_gap_transition_of_a_large_state():
    # Contraction: projecting a signal anew on a longer past cannot grow it.
    T = hippo.legs_transition(256, 1.001)
    assert np.linalg.norm(T, 2) < 1
    np.testing.assert_allclose(T @ T, hippo.legs_transition(256, 1.001**2), atol=1e-12)


def test_coefficients_are_integrals():
    rng = np.random.default_rng(1)
    ends = np.cumsum(rng.uniform(0.1, 2, 6))
    u = rng.standard_normal(6)
    x = hippo.legs_coefficients(jnp.asarray(u), 5, times=ends)
    edges = np.concatenate([[0], ends]) / ends[-1]
    for n in range(5):
        phi = math.sqrt(2 * n + 1) * scipy.special.sh_legendre(n)
        P = np.polyint(np.poly1d(phi))
        np.testing.assert_allclose(x[n], np.sum(u * np.diff(P(edges))), atol=1e-13)


def test_timescale_never_enters():
    u = np.random.default_rng(2).standard_normal(20)
    x = hippo.legs_scan(jnp.asarray(u), 9, method="exact")
    for r in (2, 5):
        slow = hippo.legs_scan(jnp.asarray(np.repeat(u, r)), 9, method="exact", chunk=7)
        np.testing.assert_allclose(slow[r - 1 :: r], x, atol=1e-13)
    for method in ("bilinear", "exact"):
        one = hippo.project(jnp.asarray(u), 9, method=method)
        for dt in (1e-3, 17.0):
            other = hippo.project(jnp.asarray(u), 9, method=method, times=dt * np.arange(1, 21))
            np.testing.assert_allclose(other, one, atol=1e-13)
            np.testing.assert_array_equal(
                hippo.project(jnp.asarray(u), 9, method=method, dt=dt), one
            )


# --- LegS: scans ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("irregular", [False, True])
def test_every_method_equals_dense_solves(method, irregular):
    rng = np.random.default_rng(3)
    T, N = 23, 6
    u = rng.standard_normal((2, T))
    times = np.cumsum(rng.uniform(0.2, 3, T)) if irregular else np.arange(1.0, T + 1)
    weights = ("trapezoid", "log", "paper") if method == "gbt_t" else ("trapezoid",)
    for weight in weights:
        alpha = 0.7 if method in ("gbt", "gbt_t", "repo") else 0.5
        dense = np.stack([dense_legs(row, times, N, method, alpha, weight) for row in u])
        run = functools.partial(
            hippo.legs_scan, jnp.asarray(u), N, method=method, alpha=alpha, weight=weight
        )
        keywords = {"times": times} if irregular else {}
        scale = np.abs(dense).max()
        x = run(**keywords)
        np.testing.assert_allclose(x, dense, atol=tol("float64", T) * scale)
        # The same by associative scans over time (by other chunks, for `exact`).
        again = run(form="associative", chunk=5, **keywords)
        np.testing.assert_allclose(again, dense, atol=tol("float64", T) * scale)
        np.testing.assert_allclose(
            run(last_only=True, **keywords), x[:, -1], atol=tol("float64", T) * scale
        )


@pytest.mark.parametrize("method", ["bilinear", "exact", "repo"])
@pytest.mark.parametrize("form", ["sequential", "associative"])
def test_going_on_from_a_state(method, form):
    u = jnp.asarray(np.random.default_rng(4).standard_normal(30))
    run = functools.partial(hippo.legs_scan, N=5, method=method, form=form, chunk=4)
    whole = run(u)
    for cut in (1, 13):
        first = run(u[:cut])
        rest = run(u[cut:], state=first[-1], start=float(cut))
        np.testing.assert_allclose(first, whole[:cut], atol=1e-13)
        np.testing.assert_allclose(rest, whole[cut:], atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_steps_equal_the_scan(method):
    u = jnp.asarray(np.random.default_rng(5).standard_normal((2, 9)))
    scan = hippo.legs_scan(u, 4, method=method)
    step = jax.jit(functools.partial(hippo.legs_step, method=method))
    x = jnp.zeros((2, 4))
    for k in range(9):
        x = step(x, u[:, k], float(k), float(k + 1))
        np.testing.assert_allclose(x, scan[:, k], atol=1e-12)


def test_step_forms_agree():
    x = jnp.asarray(np.random.default_rng(6).standard_normal(7))
    one = hippo.legs_step(x, jnp.asarray(0.3), 2.0, 3.5)
    other = hippo.legs_step(x, jnp.asarray(0.3), 2.0, 3.5, form="associative")
    np.testing.assert_allclose(other, one, atol=1e-14)


@pytest.mark.parametrize("method", ["bilinear", "exact"])
def test_gradients(method):
    rng = np.random.default_rng(7)
    u = jnp.asarray(rng.standard_normal(8))
    times = jnp.asarray(np.cumsum(rng.uniform(0.5, 2, 8)))

    def loss(u, times, form="sequential"):
        x = hippo.legs_scan(u, 4, method=method, times=times, form=form, chunk=3)
        return jnp.sum(jnp.sin(x))

    gradient = jax.jit(jax.grad(loss, (0, 1)))(u, times)
    h = 1e-6
    value = jax.jit(loss)
    for which in range(2):
        for i in (0, 3, 7):
            shift = jnp.zeros(8).at[i].set(h)
            up = (u + shift, times) if which == 0 else (u, times + shift)
            down = (u - shift, times) if which == 0 else (u, times - shift)
            slope = (value(*up) - value(*down)) / (2 * h)
            np.testing.assert_allclose(gradient[which][i], slope, rtol=1e-7, atol=1e-8)
    other = jax.grad(functools.partial(loss, form="associative"), (0, 1))(u, times)
    np.testing.assert_allclose(other[0], gradient[0], atol=1e-12)
    np.testing.assert_allclose(other[1], gradient[1], atol=1e-12)


def test_gradient_of_the_first_step_is_finite():
    for method in ("bilinear", "exact", "gbt_t"):
        g = jax.grad(
            lambda u, t, method=method: jnp.sum(
                hippo.legs_step(jnp.zeros(3), u, t, 1.0, method=method)
            ),
            (0, 1),
        )(jnp.asarray(2.0), jnp.asarray(0.0))
        assert g == (1.0, 0.0)


@pytest.mark.parametrize("N", [64, 128])
def test_float32_error(N):
    u = smooth(1000)
    x = hippo.legs_scan(jnp.asarray(u), N)
    for form in ("sequential", "associative"):
        y = hippo.legs_scan(jnp.asarray(u, jnp.float32), N, form=form)
        assert y.dtype == jnp.float32
        # The card's 3e-7 is for |x| ~ 0.4; the states here reach 1.3 in the first half.
        assert np.abs(np.asarray(y, np.float64) - x).max() < 1.2e-6


@pytest.mark.x32
def test_half_precision_works_in_float32():
    u = np.asarray(jnp.asarray(smooth(300), jnp.bfloat16))
    for keywords in ({}, {"method": "exact"}, {"measure": "legt", "dt": 1.0, "window": 100.0}):
        x = hippo.project(jnp.asarray(u), 8, **keywords)
        assert x.dtype == jnp.bfloat16
        full = hippo.project(jnp.asarray(u, jnp.float32), 8, **keywords)
        assert full.dtype == jnp.float32
        np.testing.assert_array_equal(x, full.astype(jnp.bfloat16))
        assert hippo.reconstruct(x, np.linspace(0, 1, 5)).dtype == jnp.bfloat16


def test_vmap_and_jit():
    u = jnp.asarray(np.random.default_rng(8).standard_normal((3, 10)))
    for keywords in ({"measure": "legs"}, {"measure": "legt", "dt": 0.2}, {"measure": "fous"}):
        run = functools.partial(hippo.project, N=5, **keywords)
        one = run(u)
        np.testing.assert_allclose(jax.jit(jax.vmap(run))(u), one, atol=1e-13)
        np.testing.assert_allclose(run(u[1]), one[1], atol=1e-13)
    # Irregular times of their own for every example.
    times = jnp.cumsum(1 + u**2, axis=-1)
    each = jax.jit(jax.vmap(lambda u, t: hippo.project(u, 5, times=t)))(u, times)
    for i in range(3):
        np.testing.assert_allclose(
            each[i], hippo.project(u[i], 5, times=np.asarray(times[i])), atol=1e-13
        )


# --- the other measures ---------------------------------------------------------------------


def test_window_measures_with_varying_steps():
    rng = np.random.default_rng(9)
    T = 25
    u = rng.standard_normal((2, T))
    few, many = rng.choice([0.1, 0.2], T), rng.uniform(0.05, 0.3, T)
    for measure, method in (("legt", "zoh"), ("lagt", "bilinear"), ("fout", "gbt")):
        A, B = hippo.transition(measure, 5, window=2.0)
        for dt in (few, many):
            x, dense = np.zeros((2, 5)), []
            for k in range(T):
                if method == "zoh":
                    block = scipy.linalg.expm(
                        np.block([[A, B[:, None]], [np.zeros((1, 6))]]) * dt[k]
                    )
                    A_bar, B_bar = block[:5, :5], block[:5, 5]
                else:
                    a = 0.5 if method == "bilinear" else 0.8
                    left = np.eye(5) - a * dt[k] * A
                    A_bar = np.linalg.solve(left, np.eye(5) + (1 - a) * dt[k] * A)
                    B_bar = np.linalg.solve(left, dt[k] * B)
                x = x @ A_bar.T + u[:, k, None] * B_bar
                dense.append(x)
            run = functools.partial(
                hippo.project,
                jnp.asarray(u),
                5,
                measure=measure,
                method=method,
                window=2.0,
                alpha=0.8,
            )
            x = run(dt=dt)
            np.testing.assert_allclose(x, np.stack(dense, 1), atol=1e-12)
        np.testing.assert_allclose(run(times=np.cumsum(many)), x, atol=1e-12)
        np.testing.assert_allclose(run(dt=jnp.asarray(many), last_only=True), x[:, -1], atol=1e-12)


@pytest.mark.parametrize("T", [1, 7, 12, 30])
def test_chunks_equal_steps(T):
    rng = np.random.default_rng(T)
    A_bar, B_bar = rng.standard_normal((4, 4)) / 3, rng.standard_normal(4)
    u, start = rng.standard_normal((2, T)), rng.standard_normal((2, 4))
    x, dense = start, []
    for k in range(T):
        x = x @ A_bar.T + u[:, k, None] * B_bar
        dense.append(x)
    dense = np.stack(dense, 1)
    for chunk in (None, 1, 6, 100):
        run = functools.partial(
            hippo.lti_scan, A_bar, B_bar, jnp.asarray(u), state=jnp.asarray(start), chunk=chunk
        )
        np.testing.assert_allclose(run(), dense, atol=1e-12)
        np.testing.assert_allclose(run(last_only=True), dense[:, -1], atol=1e-12)


def test_fous_is_the_fourier_series_of_the_whole_past():
    T, K = 400, 6
    u = smooth(T)
    n = np.arange(-K, K + 1)
    A, B = hippo.transition("fous", 2 * K + 1)
    # Each method against its own dense recurrence in log time.
    x = {"exact": u[0] * (n == 0), "bilinear": u[0] * (n == 0)}
    identity = np.eye(2 * K + 1)
    for k in range(1, T):
        delta = math.log((k + 1) / k)
        P = scipy.linalg.expm(delta * A)
        x["exact"] = P @ x["exact"] + np.linalg.solve(A, (P - identity) @ B) * u[k]
        v = (identity + delta / 2 * A) @ x["bilinear"] + delta * B * u[k]
        x["bilinear"] = np.linalg.solve(identity - delta / 2 * A, v)
    for method, dense in x.items():
        got = hippo.project(
            jnp.asarray(u), 2 * K + 1, measure="fous", method=method, last_only=True
        )
        assert got.dtype == jnp.complex128
        np.testing.assert_allclose(got, dense, atol=1e-11)
    # A constant is its own series in every method.
    c = hippo.project(jnp.full(9, 2.5), 5, measure="fous")
    np.testing.assert_allclose(c, np.tile(2.5 * np.eye(5)[2], (9, 1)), atol=1e-14)


def test_lmu_holds_the_same_window_as_legt():
    u = jnp.asarray(smooth(200))
    s = np.linspace(0, 1, 17)
    keywords = {"dt": 1.0, "window": 120.0, "last_only": True}
    legt = hippo.project(u, 10, measure="legt", **keywords)
    lmu = hippo.project(u, 10, measure="lmu", **keywords)
    sign = (-1.0) ** np.arange(10) * np.sqrt(2 * np.arange(10) + 1)
    np.testing.assert_allclose(lmu, sign * legt, atol=1e-12)
    back = hippo.reconstruct(lmu, s, measure="lmu")
    np.testing.assert_allclose(back, hippo.reconstruct(legt, s, measure="legt"), atol=1e-12)
    # Its basis is that of the delay: P_n(2τ/w − 1).
    direct = np.polynomial.legendre.legvander(2 * (1 - s) - 1, 9) @ np.asarray(lmu)
    np.testing.assert_allclose(back, direct, atol=1e-13)


def test_norms_give_the_same_signal():
    u = jnp.asarray(smooth(60))
    s = np.linspace(0, 1, 9)
    for measure in ("legs", "legt"):
        plain = hippo.project(u, 6, measure=measure, dt=1.0, window=30.0, last_only=True)
        for norm in ("post", "lmu", np.linspace(1, 3, 6)):
            x = hippo.project(u, 6, measure=measure, dt=1.0, window=30.0, norm=norm, last_only=True)
            scale = hippo.basis_scale(measure, 6, norm)
            np.testing.assert_allclose(x * scale, plain, atol=1e-13)
            np.testing.assert_allclose(
                hippo.reconstruct(x, s, measure=measure, norm=norm),
                hippo.reconstruct(plain, s, measure=measure),
                atol=1e-12,
            )


def test_learnable_step_and_weight():
    u = jnp.asarray(smooth(12))

    def loss(log_step, alpha):
        x = hippo.project(
            u, 4, measure="legt", method="gbt", dt=jnp.exp(log_step), alpha=alpha, parallel=True
        )
        return jnp.sum(x**2)

    args = (jnp.asarray(-2.0), jnp.asarray(0.6))
    gradient = jax.jit(jax.grad(loss, (0, 1)))(*args)
    h = 1e-6
    for i in range(2):
        up = [a + h * (i == j) for j, a in enumerate(args)]
        down = [a - h * (i == j) for j, a in enumerate(args)]
        np.testing.assert_allclose(gradient[i], (loss(*up) - loss(*down)) / (2 * h), rtol=1e-7)


# --- reconstruction -------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 9, 64])
def test_series_equal_their_definitions(N):
    rng = np.random.default_rng(N)
    x, s = rng.standard_normal((2, 3, N)), rng.uniform(0, 1, (4, 2))
    scale = np.sqrt(2 * np.arange(N) + 1)
    direct = np.einsum(
        "abn,cdn->abcd", x, np.polynomial.legendre.legvander(2 * s - 1, N - 1) * scale
    )
    np.testing.assert_allclose(
        hippo.legendre_series(jnp.asarray(x), s), direct, atol=tol("float64", N) * N
    )
    tau = 3 * s
    for decay in (0.0, 1.0):
        basis = np.stack([scipy.special.eval_laguerre(n, tau) for n in range(N)], -1)
        basis = basis * np.exp(-(1 - decay) * tau / 2)[..., None]
        direct = np.einsum("abn,cdn->abcd", x, basis)
        np.testing.assert_allclose(
            hippo.laguerre_series(jnp.asarray(x), tau, decay=decay),
            direct,
            atol=tol("float64", N) * N,
        )
    if N % 2:
        K = N // 2
        angle = 2 * np.pi * s[..., None] * np.arange(1, K + 1)
        cosines, sines = math.sqrt(2) * np.cos(angle), math.sqrt(2) * np.sin(angle)
        basis = np.concatenate(
            [np.ones((4, 2, 1)), np.stack([cosines, sines], -1).reshape(4, 2, 2 * K)], -1
        )
        np.testing.assert_allclose(
            hippo.fourier_series(jnp.asarray(x), s),
            np.einsum("abn,cdn->abcd", x, basis),
            atol=tol("float64", N) * N,
        )
        z = x + 1j * rng.standard_normal(x.shape)
        waves = np.exp(2j * np.pi * s[..., None] * np.arange(-K, K + 1))
        np.testing.assert_allclose(
            hippo.fourier_series(jnp.asarray(z), s),
            np.einsum("abn,cdn->abcd", z, waves).real,
            atol=tol("float64", N) * N,
        )


def test_fourier_series_in_float32_near_the_jump():
    K = 400
    x = np.random.default_rng(0).standard_normal(2 * K + 1)
    s = np.array([0.0, 1e-4, 0.5, 0.9999, 1.0])
    exact = hippo.fourier_series(jnp.asarray(x), s)
    single = hippo.fourier_series(jnp.asarray(x, jnp.float32), s)
    # Rounding e^{2πis} alone turns frequency K by K units of roundoff.
    atol = float(np.finfo(np.float32).eps) * K * np.linalg.norm(x)
    np.testing.assert_allclose(single, exact, atol=atol)


def test_times_and_ages():
    x = jnp.asarray(np.random.default_rng(1).standard_normal(5))
    t = np.array([3.0, 4.5, 7.0])
    for measure, s in (
        ("legs", t / 8),
        ("legt", 1 - (8 - t) / 5),
        ("lmu", 1 - (8 - t) / 5),
        ("fout", 1 - (8 - t) / 5),
        ("lagt", 1 - (8 - t) / 5),
        ("fous", t / 8),
    ):
        a = hippo.reconstruct(x, measure=measure, times=t, now=8.0, window=5.0)
        np.testing.assert_allclose(a, hippo.reconstruct(x, s, measure=measure), atol=1e-13)


def test_laguerre_memory_reconstructs():
    # A signal that is e^{−τ/2} times a polynomial of degree 2 in the age is held by 3 states (β=0).
    T, dt = 4000, 0.01
    age = (T - np.arange(T) - 0.5) * dt
    u = np.exp(-age / 2) * (1 - age + 0.3 * age**2)
    x = hippo.project(
        jnp.asarray(u), 3, measure="lagt", decay=0.0, dt=dt, parallel=True, last_only=True
    )
    tau = np.array([0.1, 1.0, 3.0])
    back = hippo.reconstruct(x, 1 - tau, measure="lagt", decay=0.0)
    # Held input: second order in dt.
    np.testing.assert_allclose(back, np.exp(-tau / 2) * (1 - tau + 0.3 * tau**2), atol=1e-4)


def test_fourier_error_decays_slowly():
    T = 2000
    u = smooth(T)
    errors = []
    for K in (8, 32):
        x = hippo.project(
            jnp.asarray(u), 2 * K + 1, measure="fout", dt=1 / T, parallel=True, last_only=True
        )
        back = hippo.reconstruct(x, midpoints(T), measure="fout")
        errors.append(np.linalg.norm(back - u) / np.linalg.norm(u))
    # K^{−1/2} (Gibbs): a factor 2 for four times the states.
    assert 1.7 < errors[0] / errors[1] < 2.4


# --- errors ---------------------------------------------------------------------------------

U = np.ones(4)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"N": 0}, ValueError, "N must be at least 1"),
        ({"measure": "foud", "N": 3}, ValueError, "measure must be one of"),
        ({"measure": "fout", "N": 4, "dt": 1.0}, ValueError, "N must be odd"),
        ({"measure": "legt", "window": 0.0, "dt": 1.0}, ValueError, "window must be greater"),
        ({"measure": "legt"}, ValueError, "dt or times must be given"),
        ({"measure": "legt", "dt": 0.0}, ValueError, "dt must be greater than 0"),
        ({"measure": "legt", "dt": -np.ones(4)}, ValueError, "dt must be greater than 0"),
        ({"measure": "legt", "dt": np.ones(3)}, ValueError, "dt must be a scalar or"),
        ({"measure": "legt", "dt": np.ones(4), "parallel": True}, ValueError, "parallel must be"),
        ({"measure": "legt", "dt": 1.0, "method": "exact"}, ValueError, "method must be one of"),
        ({"measure": "legt", "dt": 1.0, "times": U}, ValueError, "dt and times must not both"),
        ({"measure": "legt", "times": [1.0, 2.0, 2.0, 3.0]}, ValueError, "times must increase"),
        ({"measure": "legt", "dt": 1.0, "alpha": 2.0}, ValueError, "alpha must be at least"),
        ({"times": [1.0, 2.0, 2.0, 3.0]}, ValueError, "times must increase strictly; got 2.0"),
        ({"times": [1.0, 3.0, 2.0, 4.0]}, ValueError, "times must increase strictly; got 3.0"),
        ({"times": [0.0, 1.0, 2.0, 3.0]}, ValueError, "times must start after time 0.0; got 0.0"),
        ({"times": [-1.0, 1.0, 2.0, 3.0]}, ValueError, "times must start after time 0.0"),
        ({"times": [1.0, 2.0, 3.0, np.nan]}, ValueError, "times must be finite"),
        ({"times": [1.0, 2.0]}, ValueError, "times must be .4., one for each sample"),
        ({"times": ["a"] * 4}, TypeError, "times must be real"),
        ({"alpha": 1.1, "method": "gbt"}, ValueError, "alpha must be at least 0.0 and at most 1.0"),
        ({"method": "euler"}, ValueError, "method must be one of"),
        ({"method": "gbt_t", "weight": "exp"}, ValueError, "weight must be one of"),
        ({"N": 17, "method": "forward"}, ValueError, "LegS cannot take.*unsafe=True"),
        ({"N": 17, "method": "gbt_t", "alpha": 0.0}, ValueError, "LegS cannot take.*unsafe=True"),
        ({"N": 17, "method": "repo", "alpha": 0.4}, ValueError, "LegS cannot take.*unsafe=True"),
        ({"measure": "fous", "N": 3, "method": "repo"}, ValueError, "method must be one of"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"u": np.ones(4, int)}, TypeError, "u must be an array of real floating-point"),
        ({"u": np.ones(4, complex)}, TypeError, "u must be an array of real floating-point"),
        ({"u": np.ones(0)}, ValueError, "u must be"),
        ({"u": np.ones(())}, ValueError, "u must be"),
    ],
)
def test_project_errors(keywords, error, words):
    arguments = {"u": U, "N": 4} | keywords
    with pytest.raises(error, match=words):
        hippo.project(arguments.pop("u"), arguments.pop("N"), **arguments)


def test_other_errors():
    x = jnp.ones(4)
    cases = [
        (lambda: hippo.legs_scan(x, 3, state=jnp.ones(3)), "state and start"),
        (lambda: hippo.legs_scan(x, 3, start=1.0), "state and start"),
        (lambda: hippo.legs_scan(x, 3, state=jnp.ones(2), start=1.0), "state must be"),
        (lambda: hippo.legs_scan(x, 3, state=jnp.ones(3), start=0.0), "start must be"),
        (lambda: hippo.legs_scan(x, 3, form="tree"), "form must be"),
        (
            lambda: hippo.legs_scan(x, 3, state=jnp.ones(3), start=2.0, times=[1.0, 3.0, 4.0, 5.0]),
            "times must start after time 2.0",
        ),
        (lambda: hippo.legs_step(x, jnp.ones(()), 1.0, 1.0), "t_next must be greater"),
        (lambda: hippo.legs_step(x, jnp.ones(()), -1.0, 1.0), "t must be at least"),
        (lambda: hippo.legs_step(x, jnp.ones(2), 1.0, 2.0), "u must be"),
        (lambda: hippo.legs_solve(x, -0.1), "lam must be"),
        (lambda: hippo.legs_solve(x, jnp.ones(2)), "lam must be"),
        (lambda: hippo.legs_transition(3, 0.5), "ratio must be"),
        (lambda: hippo.legs_propagate(x, 0.5), "ratio must be"),
        (lambda: hippo.lti_scan(np.eye(2), np.ones(3), x), "B must be"),
        (lambda: hippo.lti_scan(np.ones((2, 3)), np.ones(2), x), "A must be"),
        (lambda: hippo.lti_scan(np.eye(2), np.ones(2), x, state=x), "state must be"),
        (lambda: hippo.lti_scan_varying(np.eye(2), np.ones(2), x, np.ones(3)), "dt must be"),
        (lambda: hippo.reconstruct(x), "s or times must be"),
        (lambda: hippo.reconstruct(x, 0.5, times=0.5, now=1.0), "s or times must be"),
        (lambda: hippo.reconstruct(x, times=0.5), "times and now"),
        (lambda: hippo.reconstruct(x, times=0.5, now=0.0), "now must be"),
        (lambda: hippo.reconstruct(x, 0.5, measure="fout"), "N must be odd"),
        (lambda: hippo.reconstruct(x, 0.5, measure="legt", window=-1.0), "window must be"),
        (lambda: hippo.reconstruct(x, 0.5, measure="lagt", decay=2.0), "decay must be"),
        (lambda: hippo.fourier_series(x, 0.5), "x must have an odd number"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="x must be an array"):
        hippo.legs_apply(jnp.arange(3))
    with pytest.raises(TypeError, match="x must be an array"):
        hippo.reconstruct(jnp.arange(3), 0.5)


@pytest.mark.x32
def test_chunks_of_a_host_system_keep_steps_that_float32_would_lose():
    # A window of 1e5 samples: the float32 step matrix is off by 0.3 % of its distance to I.
    A, B = hippo.transition("legt", 8, window=1e5)
    u = np.cos(np.linspace(0, 3, 200_000))
    A_bar, B_bar = (np.asarray(part) for part in discretize.zoh(A, B, 1.0))
    x = np.zeros(8)
    for value in u:
        x = A_bar @ x + B_bar * value
    signal = jnp.asarray(u, jnp.float32)
    in_chunks = hippo.lti_scan(A_bar, B_bar, signal, chunk=447, last_only=True)
    one_by_one = hippo.lti_scan(A_bar, B_bar, signal, last_only=True)
    scale = np.linalg.norm(x)
    assert np.linalg.norm(in_chunks - x) < 1e-5 * scale
    assert np.linalg.norm(one_by_one - x) > 5e-5 * scale
