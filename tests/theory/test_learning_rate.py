"""Laws of learning rate and batch size: the card's digits, Monte Carlo, limits, fits, errors."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

from jaxkit.theory import learning_rate as lr
from tests.tolerance import tol

EPS = tol(np.float64, 16)

# Check 1.
G = jnp.array([1.0, -2.0, 0.5])
H = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]])
SIGMA = jnp.array([4.0, 9.0, 1.0])

# Check 5.
SURGE_G = jnp.array([1.0, 2.0, 0.5, 1.5])
SURGE_H = 0.2 * jnp.eye(4) + 0.8
SURGE = lr.sign_law(SURGE_G, SURGE_H, kappa2=40.0)

# Check 9.
ERF_G, ERF_SIGMA2 = jnp.array([0.2, 0.4, 0.8, 1.6]), jnp.full(4, 9.0)


# --- SGD ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("Sigma", [SIGMA, jnp.diag(SIGMA)])
def test_sgd_law_of_the_card(Sigma):
    law = lr.sgd_law(G, H, Sigma)
    np.testing.assert_allclose(law, [1.4893617, 4.9645390, 3.9095745], rtol=1e-7)
    B = jnp.array([1, 4, 16, 64])
    expected = [0.2497027, 0.6645570, 1.1366712, 1.3821473]
    np.testing.assert_allclose(law.lr(B), expected, rtol=1e-6)
    np.testing.assert_allclose(lr.optimal_lr_quadratic(G, H, Sigma, B).lr, expected, rtol=1e-6)
    simple = lr.sgd_law(G, jnp.eye(3), Sigma)
    assert float(simple.noise_scale) == pytest.approx(2.6666667, rel=1e-7)


def test_monte_carlo_decrease_of_the_card():
    """At B = 8 and its best rate: 2.4125."""
    best = lr.optimal_lr_quadratic(G, H, SIGMA, 8)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((400_000, 3)) * np.sqrt(np.asarray(SIGMA) / 8)
    step = float(best.lr) * (np.asarray(G) + noise)
    losses = -step @ np.asarray(G) + 0.5 * np.einsum("ni,ij,nj->n", step, np.asarray(H), step)
    assert -losses.mean() == pytest.approx(2.4125, rel=0.01)
    assert float(best.decrease) == pytest.approx(2.4125, rel=1e-4)


def test_full_covariance_is_more_than_its_diagonal():
    rng = np.random.default_rng(0)
    root = jnp.asarray(rng.standard_normal((3, 3)))
    law = lr.sgd_law(G, H, root @ root.T)
    assert float(law.noise_scale * (G @ H @ G)) == pytest.approx(
        float(jnp.trace(root @ root.T @ H))
    )


def test_matrix_free_law_is_that_of_the_matrices():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((50, 3))), jnp.asarray(rng.standard_normal(50))
    params = {"w": jnp.array([0.5, -1.0]), "b": jnp.array(0.3)}

    def loss(p, example):
        x, y = example
        return (jnp.tanh(x[:2] @ p["w"] + p["b"] * x[2]) - y) ** 2

    flat, unravel = jax.flatten_util.ravel_pytree(params)
    mean = lambda q: jnp.mean(jax.vmap(lambda *e: loss(unravel(q), e))(x, y))
    each = jax.vmap(lambda *e: jax.grad(lambda q: loss(unravel(q), e))(flat))(x, y)
    expected = lr.sgd_law(
        jax.grad(mean)(flat), jax.hessian(mean)(flat), jnp.asarray(np.cov(each.T, bias=True))
    )
    for chunk in (7, 64):
        law = jax.jit(lambda p, e, c=chunk: lr.sgd_law_matrix_free(loss, p, e, chunk=c))(
            params, (x, y)
        )
        np.testing.assert_allclose(law, expected, rtol=1e-11)


@pytest.mark.x32
def test_matrix_free_law_of_narrow_and_mixed_parameters():
    """As for the same parameters in float32: no sum is left to bfloat16."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((200, 3)), jnp.float32)
    params = {"w": jnp.array([0.5, -1.0], jnp.bfloat16), "b": jnp.array(0.25, jnp.float32)}
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    mix = lambda p, x: jnp.sum(x[:2] * p["w"].astype(jnp.float32)) + x[2] * p["b"]
    loss = lambda p, x: (jnp.tanh(mix(p, x)) - x[0]) ** 2
    law, expected = (
        jax.jit(lambda p: lr.sgd_law_matrix_free(loss, p, x))(p) for p in (params, wide)
    )
    assert law.noise_scale.dtype == jnp.float32
    np.testing.assert_allclose(law, expected, rtol=0.02)  # gradients in bfloat16


def test_no_best_rate_without_curvature():
    flat = lr.optimal_lr_quadratic(G, -H, SIGMA, jnp.array([1.0, 8.0]))
    assert np.isposinf(flat.lr).all()
    assert np.isposinf(flat.decrease).all()
    assert np.isposinf(lr.optimal_lr_quadratic(G, -H, SIGMA, 4, "sign").lr)
    falling = lr.sign_law(jnp.ones(3), jnp.eye(3) - (1 - jnp.eye(3)), kappa2=10.0)  # D + O = -3
    assert np.isposinf([falling.half, falling.decrease_max, falling.lr(jnp.inf)]).all()
    assert np.isfinite(falling.lr(1.0))


# --- sign ---------------------------------------------------------------------------------------


def test_surge_of_the_card():
    values = [SURGE.beta_n, SURGE.lr_max, SURGE.decrease_max, SURGE.half, SURGE.peak]
    expected = [0.6454972, 0.4034358, 0.9191176, 18.4799568, 44.8798951]
    np.testing.assert_allclose(values, expected, rtol=1e-7)
    B = jnp.stack([jnp.asarray(b) for b in (1.0, 10.0, 44.8798951, 1000.0, np.inf)])
    expected = [0.1507863, 0.3483794, 0.4034358, 0.3721439, 0.3676471]
    np.testing.assert_allclose(SURGE.lr(B), expected, rtol=1e-6)
    assert float(SURGE.lr(jnp.inf)) == pytest.approx(5 / 13.6)  # A / (D + O)


def test_identities_of_the_surge():
    assert float(1 / SURGE.half - 1 / SURGE.peak) == pytest.approx(4 / (np.pi * 40.0), rel=EPS)
    B = jnp.asarray(np.geomspace(0.1, 1e5, 20))
    # One κ for all components, in the formula that knows nothing of β.
    direct = lr.optimal_lr_quadratic(
        SURGE_G, SURGE_H, 40.0 * SURGE_G**2, B, "sign", law="algebraic"
    )
    np.testing.assert_allclose(
        direct.decrease, SURGE.decrease_max / (1 + SURGE.half / B), rtol=1e-12
    )
    np.testing.assert_allclose(SURGE.decrease(B), direct.decrease, rtol=1e-12)
    beta = (1 + 20 * np.pi / B) ** -0.5
    closed = 2 * SURGE.lr_max / (SURGE.beta_n / beta + beta / SURGE.beta_n)
    np.testing.assert_allclose(direct.lr, closed, rtol=1e-12)
    np.testing.assert_allclose(SURGE.lr(B), closed, rtol=1e-12)
    assert float(SURGE.decrease_max) == pytest.approx(
        float(SURGE.beta_n * SURGE.lr_max * SURGE.A / (1 + SURGE.beta_n**2)), rel=EPS
    )
    small = SURGE.A / SURGE.D * np.sqrt(2e-6 / (np.pi * 40.0))
    assert float(SURGE.lr(1e-6)) == pytest.approx(float(small), rel=1e-6)


def test_components_without_gradient_move_all_the_same():
    """Their sign is ±1 at random: they count in tr H, and in no product of two signs."""
    g = SURGE_G.at[1].set(0.0)
    law, B = lr.sign_law(g, SURGE_H, kappa2=40.0), jnp.array([1.0, 30.0])
    direct = lr.optimal_lr_quadratic(g, SURGE_H, 40.0 * g**2, B, "sign", law="algebraic")
    np.testing.assert_allclose(law.lr(B), direct.lr, rtol=1e-12)
    np.testing.assert_allclose([law.D, law.O], [4.0, 6 * 0.8], rtol=EPS)


def test_mean_field_constants():
    B_simple = 7.0
    law = lr.sign_law(SURGE_G, SURGE_H, noise_scale=B_simple)
    B = jnp.asarray([1.0, 30.0])
    direct = lr.optimal_lr_quadratic(
        SURGE_G, SURGE_H, B_simple * SURGE_G**2, B, "sign", law="mean_field"
    )
    np.testing.assert_allclose(law.lr(B), direct.lr, rtol=1e-12)
    np.testing.assert_allclose(law.decrease(B), direct.decrease, rtol=1e-12)
    assert float(1 / law.half - 1 / law.peak) == pytest.approx(2 / B_simple, rel=EPS)


@pytest.mark.parametrize("off", [-0.1, 0.0, 0.1])
def test_no_surge_without_enough_correlation(off):
    matrix = jnp.eye(3) + off * (1 - jnp.eye(3))
    law = lr.sign_law(jnp.ones(3), matrix, kappa2=10.0)
    assert np.isposinf(law.peak)
    assert np.isnan(law.beta_n) == (off <= 0)
    rates = np.asarray(law.lr(jnp.asarray(np.geomspace(0.1, 1e6, 40))))
    assert (np.diff(rates) > 0).all()
    assert float(law.lr_max) == pytest.approx(rates[-1], rel=1e-4)


def test_erf_law_of_the_card():
    """Both the best rate and the decrease peak."""
    best = lr.optimal_lr_quadratic(
        ERF_G, SURGE_H, ERF_SIGMA2, jnp.array([1, 4, 16, 64, 256, 1024]), "sign"
    )
    rates = [0.2024745, 0.3103647, 0.3366993, 0.2873621, 0.2424428, 0.2226910]
    decreases = [0.0881972, 0.2440220, 0.3910762, 0.3937495, 0.3551302, 0.3333031]
    np.testing.assert_allclose(best.lr, rates, rtol=1e-6)
    np.testing.assert_allclose(best.decrease, decreases, rtol=1e-6)


def test_errors_of_the_approximate_signs():
    x = np.linspace(0.01, 6, 6001)
    exact = np.asarray(lr.mean_sign(jnp.asarray(x * np.sqrt(2)), jnp.ones(6001), 1))
    assert exact[99] == pytest.approx(float(mpmath.erf(x[99])), rel=EPS)
    for law, worst, at in (
        ("algebraic", 0.1078, 1.330),
        ("mean_field", 0.0644, 0.523 / np.sqrt(2)),
    ):
        error = np.abs(
            exact - lr.mean_sign(jnp.asarray(x * np.sqrt(2)), jnp.ones(6001), 1, law=law)
        )
        assert error.max() == pytest.approx(worst, abs=6e-5)
        assert x[error.argmax()] == pytest.approx(at, abs=2e-3)


def test_signs_without_noise_or_gradient():
    g, sigma = jnp.array([2.0, -1.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 0.0, 1.0])
    for law in ("erf", "algebraic", "mean_field"):
        np.testing.assert_array_equal(lr.mean_sign(g, sigma, 4, law=law), [1, -1, 0, 0])
        slope = jax.grad(lambda g, law=law: jnp.sum(lr.mean_sign(g, sigma, 4, law=law)))(g)
        assert np.isfinite(slope).all()


@pytest.mark.x32
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_signs_of_tiny_and_huge_gradients_in_float32(size):
    g, sigma = jnp.float32(size) * jnp.array([[3.0, -3.0], [4.0, 0.0]])
    for law, expected in (("algebraic", 3 / np.sqrt(9 + 8 * np.pi)), ("mean_field", 0.6)):
        np.testing.assert_allclose(lr.mean_sign(g, sigma, 1, law=law), [expected, -1], rtol=1e-6)


def test_erf_saturates_for_huge_batches():
    assert np.all(lr.mean_sign(ERF_G, jnp.sqrt(ERF_SIGMA2), 1e30) == 1)


def test_sign_of_monte_carlo():
    rng = np.random.default_rng(0)
    best = lr.optimal_lr_quadratic(ERF_G, SURGE_H, ERF_SIGMA2, 16, "sign")
    draws = np.sign(np.asarray(ERF_G) + 3 / 4 * rng.standard_normal((300_000, 4)))
    curvature = np.einsum("ni,ij,nj->n", draws, np.asarray(SURGE_H), draws).mean()
    assert float(best.lr) == pytest.approx((draws @ np.asarray(ERF_G)).mean() / curvature, rel=0.01)


def test_soft_sign_goes_from_sign_to_gradient():
    B = jnp.array([2.0, 50.0])
    sign = lr.optimal_lr_quadratic(ERF_G, SURGE_H, ERF_SIGMA2, B, "sign", law="mean_field")
    soft = lr.optimal_lr_quadratic(ERF_G, SURGE_H, ERF_SIGMA2, B, "soft_sign")
    np.testing.assert_allclose(soft.lr, sign.lr, rtol=1e-12)
    # A huge ε makes it the gradient over ε.
    sgd = lr.optimal_lr_quadratic(ERF_G, SURGE_H, ERF_SIGMA2, B)
    soft = lr.optimal_lr_quadratic(ERF_G, SURGE_H, ERF_SIGMA2, B, "soft_sign", eps=1e4)
    np.testing.assert_allclose(soft.lr, 1e4 * sgd.lr, rtol=1e-5)
    np.testing.assert_allclose(soft.decrease, sgd.decrease, rtol=1e-5)


# --- rules --------------------------------------------------------------------------------------


def test_small_batches_scale_linearly_or_by_the_root():
    """Check 7: at B = 1e-4 B_noise, to 1e-3."""
    law = lr.sgd_law(G, H, SIGMA)
    B = 1e-4 * law.noise_scale
    assert float(law.lr(2 * B) / law.lr(B)) == pytest.approx(2, rel=1e-3)
    B = 1e-4 * SURGE.c
    assert float(SURGE.lr(2 * B) / SURGE.lr(B)) == pytest.approx(np.sqrt(2), rel=1e-3)


@pytest.mark.parametrize(
    ("rule", "options", "law"),
    [
        ("sgd", {"noise_scale": 4.9645390}, lr.sgd_law(G, H, SIGMA)),
        ("surge", {"kappa2": 40.0, "beta_n": 0.645497224}, SURGE),
        (
            "surge",
            {"noise_scale": 7.0, "beta_n": 0.645497224},
            lr.sign_law(SURGE_G, SURGE_H, noise_scale=7.0),
        ),
    ],
)
def test_rules_are_the_laws(rule, options, law):
    B = jnp.array([1.0, 10.0, 500.0])
    rates = lr.lr_rule(B, 32, law.lr(32), rule, **options)
    np.testing.assert_allclose(rates, law.lr(B), rtol=1e-8)
    assert float(lr.lr_rule(32, 32, 0.1, rule, **options)) == pytest.approx(0.1, rel=EPS)


def test_rules_by_hand():
    rate = lambda rule, **options: float(lr.lr_rule(256, 16, 0.1, rule, **options))
    assert rate("linear") == pytest.approx(1.6)
    assert rate("sqrt") == pytest.approx(0.4)
    assert rate("power", power=0.75) == pytest.approx(0.8)
    assert rate("power", power=0.75, noise_scale=48.0) == pytest.approx(0.1 * (4 / 1.1875) ** 0.75)
    assert rate("sgd", noise_scale=48.0) == pytest.approx(0.1 * 4 / 1.1875)
    beta = lambda B: (1 + 10 * np.pi / B) ** -0.5
    assert rate("sign", kappa2=20.0) == pytest.approx(0.1 * beta(256) / beta(16))
    assert rate("sign", noise_scale=10 * np.pi) == pytest.approx(rate("sign", kappa2=20.0))
    # η_max from a sweep at a small batch.
    assert float(lr.lr_rule(np.inf, 16, 0.1, "sgd", noise_scale=48.0)) == pytest.approx(0.4)


def test_rules_under_jit_vmap_and_grad():
    rule = lambda B: lr.lr_rule(B, 8.0, 0.1, "sgd", noise_scale=24.0)
    B = jnp.array([4.0, 8.0, 24.0])
    np.testing.assert_allclose(jax.jit(rule)(B), jax.vmap(rule)(B), rtol=EPS)
    # η = 0.4 / (1 + 24 / B): slope 0.4 · 24 / (B + 24)²
    np.testing.assert_allclose(jax.vmap(jax.grad(rule))(B), 9.6 / (B + 24) ** 2, rtol=EPS)
    assert lr.lr_rule(jnp.float32(8), 4, 0.1, "linear").dtype == jnp.float32
    assert lr.lr_rule(B[None], 4, 0.1, "sqrt").shape == (1, 3)
    schedule = lambda count: lr.lr_rule(8 + 8 * count, 8.0, 0.1, "linear")  # batch warm-up
    updates, _ = (opt := optax.sgd(schedule)).update(jnp.ones(1), opt.init(jnp.ones(1)))
    assert float(updates[0]) == pytest.approx(-0.1)


def test_adam_rule():
    settings = lr.adam_rule(64, 256, 1e-3, b1=0.9, b2=0.98, eps=1e-8)
    expected = {"learning_rate": 5e-4, "b1": 0.975, "b2": 0.995, "eps": 2e-8}
    assert settings == pytest.approx(expected, rel=1e-12)
    optax.adam(**settings)
    with pytest.raises(ValueError, match=r"b1 must be at least 1 - B0/B = 0.9375; got 0.9"):
        lr.adam_rule(256, 16, 1e-3)
    with pytest.raises(ValueError, match="eps must be at least 0"):
        lr.adam_rule(64, 256, 1e-3, eps=-1.0)


# --- steps and data -----------------------------------------------------------------------------

SWEEP_B = jnp.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
SWEEP_S = jnp.array([560, 365, 170, 110, 65, 45, 40, 40, 40, 35])


def test_fit_of_the_cards_sweep():
    """Ablation B: S_min 33.8, E_min 565, B_crit 16.7, rms residual of log S 0.08."""
    fit = lr.fit_steps_data(SWEEP_B, SWEEP_S)
    np.testing.assert_allclose([fit.S_min, fit.E_min, fit.B_crit], [33.8, 565, 16.7], rtol=5e-3)
    assert np.sqrt(np.mean(fit.residuals**2)) == pytest.approx(0.08, abs=5e-3)
    assert fit.interval[0] < fit.B_crit < fit.interval[1] < 2 * fit.B_crit
    again = np.log(SWEEP_S) - np.log(fit.steps(SWEEP_B))
    np.testing.assert_allclose(fit.residuals, again, atol=1e-12)


def test_fit_is_the_least_squares_of_scipy():
    from scipy.optimize import least_squares

    B, S = np.asarray(SWEEP_B, float), np.asarray(SWEEP_S, float)
    residual = lambda p: np.log(np.exp(p[0]) + np.exp(p[1]) / B) - np.log(S)
    oracle = np.exp(least_squares(residual, np.log([30.0, 500.0]), xtol=1e-14, ftol=1e-14).x)
    fit = jax.jit(lambda B, S: lr.fit_steps_data(B, S, bootstrap=0))(SWEEP_B, SWEEP_S)
    np.testing.assert_allclose([fit.S_min, fit.E_min], oracle, rtol=1e-7)
    assert np.isnan(fit.interval).all()


def test_hyperbola():
    """Check 6: (S/S_min - 1)(E/E_min - 1) = 1."""
    B = jnp.asarray(np.geomspace(1, 1000, 7))
    fit = lr.fit_steps_data(B, 30 + 480 / B)
    np.testing.assert_allclose([fit.S_min, fit.E_min, fit.B_crit], [30, 480, 16], rtol=1e-9)
    S, E = fit.steps(B), fit.examples(B)
    np.testing.assert_allclose(E, B * S, rtol=EPS)
    np.testing.assert_allclose((S / fit.S_min - 1) * (E / fit.E_min - 1), 1, rtol=1e-12)
    np.testing.assert_allclose(fit.interval, 16, rtol=1e-6)


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(0)
    B = jnp.asarray(2.0 ** np.arange(10))
    noisy = jnp.asarray(
        30 * (1 + 16 / np.asarray(B)) * np.exp(0.08 * rng.standard_normal((40, 10)))
    )
    fits = jax.vmap(lambda S: lr.fit_steps_data(B, S, bootstrap=200))(noisy)
    inside = (fits.interval[:, 0] <= 16) & (fits.interval[:, 1] >= 16)
    assert 0.6 <= np.mean(inside) <= 1.0  # residuals of 10 points less 2 constants are too small
    assert np.median(fits.B_crit) == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize(("S", "B_crit"), [([40, 40, 40], 0.0), ([400, 100, 25], np.inf)])
def test_degenerate_sweeps(S, B_crit):
    fit = lr.fit_steps_data(jnp.array([1, 4, 16]), jnp.array(S))
    assert fit.B_crit < 1e-2 if B_crit == 0 else fit.B_crit > 1e3
    assert np.abs(fit.residuals).max() < 1e-2


@pytest.mark.x32
def test_fit_in_float32():
    fit = lr.fit_steps_data(SWEEP_B.astype(jnp.int32), SWEEP_S.astype(jnp.int32))
    assert fit.B_crit.dtype == jnp.float32
    np.testing.assert_allclose([fit.S_min, fit.E_min], [33.8, 565], rtol=5e-3)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lr.lr_rule(0, 32, 0.1, "linear"), "B must be greater than 0"),
        (lambda: lr.lr_rule(8, -1, 0.1, "linear"), "B0 must be greater than 0"),
        (lambda: lr.lr_rule(8, 32, 0.0, "linear"), "lr0 must be greater than 0"),
        (lambda: lr.lr_rule(8, 32, 0.1, "lin"), r"rule must be one of.*'linear'"),
        (lambda: lr.lr_rule(8, 32, 0.1, "sgd"), "noise_scale must be given for rule 'sgd'"),
        (lambda: lr.lr_rule(8, 32, 0.1, "power"), "power must be given"),
        (lambda: lr.lr_rule(8, 32, 0.1, "sign"), "kappa2 or noise_scale"),
        (lambda: lr.lr_rule(8, 32, 0.1, "sign", kappa2=-1.0), "kappa2 must be at least 0"),
        (lambda: lr.lr_rule(8, 32, 0.1, "surge", kappa2=1.0), "beta_n must be given"),
        (lambda: lr.lr_rule(8, 32, 0.1, "surge", kappa2=1.0, beta_n=0.0), "beta_n must be greater"),
        (lambda: lr.lr_rule(8, 32, 0.1, "sqrt", power=1.0), "power must be left out"),
        (lambda: lr.sgd_law(G, H[:2], SIGMA), r"H must be square.*\(2, 3\)"),
        (lambda: lr.sgd_law(G, H.at[0, 1].set(0.6), SIGMA), "H must be symmetric"),
        (lambda: lr.sgd_law(G, H, SIGMA[:2]), "Sigma must have shape"),
        (lambda: lr.sign_law(G, H), "kappa2 or noise_scale"),
        (lambda: lr.sign_law(G, H, kappa2=-1.0), "kappa2 must be at least 0"),
        (lambda: lr.optimal_lr_quadratic(G, H, SIGMA, 0), "B must be greater than 0"),
        (lambda: lr.optimal_lr_quadratic(G, H, SIGMA, 1, "adam"), "kind must be one of"),
        (lambda: lr.optimal_lr_quadratic(G, H, SIGMA, 1, "soft_sign", eps=-1.0), "eps must be"),
        (lambda: lr.mean_sign(G, SIGMA, 1, law="probit"), "law must be one of"),
        (lambda: lr.fit_steps_data(jnp.array([1, 2]), jnp.array([2, 1])), "3 at least"),
        (lambda: lr.fit_steps_data(jnp.arange(1, 5), jnp.arange(1, 4)), "one length"),
        (lambda: lr.fit_steps_data(jnp.arange(1, 4), jnp.array([3.0, 2, np.inf])), "S must be fin"),
        (lambda: lr.fit_steps_data(jnp.arange(3), jnp.ones(3)), "B must be greater than 0"),
        (lambda: lr.sgd_law_matrix_free(lambda p, x: p, 1.0, (1.0,)), "one leading axis"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
