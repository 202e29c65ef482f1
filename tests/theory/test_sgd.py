"""SGD's bounds and certificates: the card's digits, random convex problems, broken assumptions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit.theory import (
    RegretTracker,
    ball,
    bound,
    box,
    certify,
    closed_form,
    convexity_slack,
    intersection,
    projected,
    sampled_convexity,
    solve_comparator,
    unbounded,
)
from jaxkit.theory.sgd import _SUMS
from tests.tolerance import tol

EPS = tol(np.float64, 64)


def inverse_sqrt(alpha, T, dtype=jnp.float64):
    return alpha / jnp.sqrt(jnp.arange(1, T + 1, dtype=dtype))


# --- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "value"), [(100, 0.6), (10_000, 0.06)])
def test_constant_steps_of_the_card(T, value):
    eta, closed = closed_form("constant", T, 2.0, 3.0)
    assert (eta, closed) == (pytest.approx(2 / (3 * np.sqrt(T))), pytest.approx(value, rel=EPS))
    assert float(bound(jnp.full(T, eta), T, 2.0, 3.0)) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("T", "value"),
    [(1, 6.3639610), (10, 2.4067554), (100, 0.8186091), (1000, 0.2652638), (10_000, 0.0845441)],
)
def test_inverse_root_steps_of_the_card(T, value):
    alpha, closed = closed_form("inverse_sqrt", T, 2.0, 3.0)
    assert alpha == pytest.approx(2 / (3 * np.sqrt(2)))
    assert closed == pytest.approx(8.4852814 / np.sqrt(T), rel=1e-7)
    exact = float(bound(inverse_sqrt(alpha, T), T, 2.0, 3.0))
    assert exact == pytest.approx(value, abs=1e-6)
    assert exact < closed
    # An optax schedule counts from 0.
    schedule = lambda count: alpha / jnp.sqrt((count + 1).astype(jnp.float64))
    assert float(bound(schedule, T, 2.0, 3.0)) == pytest.approx(exact, rel=EPS)


def test_sum_of_the_card():
    assert float(2 * 100 * bound(inverse_sqrt(1.0, 100), 100, 1e-9, 1.0)) == pytest.approx(
        18.5896038, rel=1e-8
    )


def test_vacuous_average_bound_of_the_card():
    eta = 0.1 * (1 - jnp.arange(1, 101) / 101)
    assert float(bound(eta, 100, 2.0, 3.0)) == pytest.approx(20.425, rel=1e-4)
    assert float(bound(eta, 100, 1.0, 3.0, "weighted")) == pytest.approx(0.3985149, abs=1e-6)
    assert float(bound(eta, 100, 1.0, 3.0, "last_refined")) == pytest.approx(1.0327687, abs=1e-6)


def by_hand(eta, D, G):
    """Every form, by loops over t = 1..T."""
    T, last = len(eta), eta[-1]
    at = dict(enumerate(eta, start=1))
    tail = lambda k: sum(at[j] for j in range(k, T + 1))
    steps = range(1, T + 1)
    half = G**2 / 2
    return {
        "average": D**2 / (2 * T * last) + half / T * sum(eta),
        "expected": D**2 / (2 * T * last) + half / T * sum(e**2 / last for e in eta),
        "weighted": (D**2 + G**2 * sum(e**2 for e in eta)) / (2 * sum(eta)),
        "last": D**2 / (2 * T * last)
        + half * sum(at[t] ** 2 / last / max(1, T - t) for t in steps),
        "last_refined": D**2 / (2 * sum(eta))
        + half * sum(at[t] ** 2 / tail(min(t + 1, T)) for t in steps),
    }


@pytest.mark.parametrize("T", [1, 2, 7])
def test_every_form_by_hand(T):
    eta = np.sort(np.random.default_rng(T).random(T))[::-1] + 0.1
    for form, value in by_hand(eta.tolist(), 2.0, 3.0).items():
        assert float(bound(jnp.asarray(eta), T, 2.0, 3.0, form)) == pytest.approx(value, rel=EPS)


def test_linear_decay_has_no_logarithm():
    """Its refined bound is at most R²/(αT) + 2 G² α at every T, and O(1/√T) at the best α."""
    for T in (1, 10, 1000):
        alpha, closed = closed_form("linear_decay", T, 1.0, 3.0)
        eta = alpha * (1 - jnp.arange(1, T + 1) / (T + 1))
        assert float(bound(eta, T, 1.0, 3.0, "last_refined")) <= closed
        assert closed == pytest.approx(2 * np.sqrt(2) * 3 / np.sqrt(T))


def test_a_last_step_of_zero_gives_infinity():
    eta = jnp.array([0.2, 0.1, 0.0])
    for form in ("average", "expected", "last", "last_refined"):
        assert np.isposinf(bound(eta, 3, 2.0, 3.0, form))
    assert np.isfinite(bound(eta, 3, 2.0, 3.0, "weighted"))


def test_schedules_can_be_optimised():
    """Gradient descent on log η finds the best constant step."""
    T, D, G = 50, 2.0, 3.0
    value = jax.jit(jax.value_and_grad(lambda s: bound(jnp.full(T, jnp.exp(s)), T, D, G)))
    log_eta = jnp.array(-3.0)
    for _ in range(60):
        _, slope = value(log_eta)
        log_eta = log_eta - slope
    assert float(jnp.exp(log_eta)) == pytest.approx(closed_form("constant", T, D, G)[0], rel=1e-6)
    for form in ("expected", "weighted", "last", "last_refined"):
        slope = jax.grad(lambda e, form=form: bound(e, 5, D, G, form))(jnp.full(5, 0.1))
        assert np.isfinite(slope).all()
        assert slope.any()


@pytest.mark.parametrize("form", ["average", "expected", "weighted", "last", "last_refined"])
def test_narrow_schedules_are_summed_in_float32(form):
    eta = inverse_sqrt(0.5, 300).astype(jnp.bfloat16)
    value = bound(eta, 300, 2.0, 3.0, form)
    assert value.dtype == jnp.float32
    wide = bound(eta.astype(jnp.float64), 300, 2.0, 3.0, form)
    assert float(value) == pytest.approx(float(wide), rel=1e-6)


@pytest.mark.x32
def test_a_million_terms_in_float32():
    T = 1_000_000
    alpha, _ = closed_form("inverse_sqrt", T, 2.0, 3.0)
    t = np.arange(1, T + 1)
    exact = 4 / (2 * T * alpha / np.sqrt(T)) + 9 / (2 * T) * np.sum(alpha / np.sqrt(t))
    value = bound(inverse_sqrt(alpha, T, jnp.float32), T, 2.0, 3.0)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(exact, rel=2e-6)


# --- runs ---------------------------------------------------------------------------------------


def run(loss, domain, theta, data, eta, comparator, *, track_next=True):
    """Projected SGD over the leading axis of `data`; the tracker's state and the last θ."""
    tracker = RegretTracker(domain, comparator)

    def step(carry, now):
        theta, state = carry
        x, rate = now
        value, grads = jax.value_and_grad(loss)(theta, x)
        new = domain.project(theta - rate * grads)
        state = tracker.update(
            state,
            value,
            grads,
            rate,
            theta,
            comparator_loss=None if comparator is None else loss(comparator, x),
            next_params=new if track_next else None,
        )
        return (new, state), None

    scan = jax.jit(lambda theta, state: jax.lax.scan(step, (theta, state), (data, eta))[0])
    theta, state = scan(theta, tracker.init())
    return state, theta


def alternating(dtype=jnp.float64, T=1000):
    return jnp.where(jnp.arange(T) % 2 == 0, 1, -1).astype(dtype)


def distance_loss(theta, x):
    return jnp.abs(theta - x)


@pytest.mark.parametrize(
    ("kind", "gap", "value", "average"),
    [("constant", 0.0316228, 0.0632456, 1.0316228), ("inverse_sqrt", 0.0430022, 0.0884213, None)],
)
def test_alternating_targets_of_the_card(kind, gap, value, average):
    T, domain = 1000, box(jnp.array(-1.0), jnp.array(1.0))
    alpha, _ = closed_form(kind, T, 2.0, 1.0)
    eta = jnp.full(T, alpha) if kind == "constant" else inverse_sqrt(alpha, T)
    state, _ = run(distance_loss, domain, jnp.array(0.7), alternating(), eta, jnp.array(0.0))
    certificate = certify(state, domain, G=1.0, convex="declared")
    assert certificate.status == "certified"
    assert certificate.kind == "a priori"
    assert certificate.gap == pytest.approx(gap, abs=6e-8)
    assert certificate.bound == pytest.approx(value, abs=6e-8)
    assert certificate.ratio == certificate.gap / certificate.bound
    if average:
        assert certificate.average_loss == pytest.approx(average, abs=6e-8)
    assert certificate.gap_lower_bound == certificate.gap


@pytest.mark.x32
def test_alternating_targets_in_float32():
    T, domain = 1000, box(jnp.array(-1.0), jnp.array(1.0))
    eta = jnp.full(T, 2 / np.sqrt(T), jnp.float32)
    state, _ = run(
        distance_loss, domain, jnp.array(0.7), alternating(jnp.float32), eta, jnp.array(0.0)
    )
    certificate = certify(state, domain, G=1.0, convex=True)
    assert certificate.status == "certified"
    assert certificate.gap == pytest.approx(0.0316228, rel=1e-3)
    assert certificate.bound == pytest.approx(0.0632456, rel=1e-5)


LINEAR = np.stack([np.cos(1.1 * np.arange(1, 13)), np.sin(0.7 * np.arange(1, 13))], 1)


@pytest.mark.parametrize("kind", ["constant", "inverse_sqrt"])
def test_linear_losses_of_the_card(kind):
    T, domain, total = 12, ball(1.0), LINEAR.sum(0)
    best = jnp.asarray(-total / np.linalg.norm(total))
    eta = jnp.full(T, 2 / np.sqrt(24)) if kind == "constant" else inverse_sqrt(1.0, T)
    state, theta = run(
        lambda theta, c: jnp.vdot(c, theta), domain, jnp.zeros(2), jnp.asarray(LINEAR), eta, best
    )
    of = certify(state, domain, G=np.sqrt(2), convex="declared")
    assert of.status == "certified"
    if kind == "constant":
        got = [of.average_loss, of.comparator_loss, of.gap, of.bound, of.bounds["a_posteriori"]]
        expected = [0.0820432, -0.2114874, 0.2935306, 0.8164966, 0.3159631]
        np.testing.assert_allclose(theta, [-0.2860254, -0.7599738], atol=6e-8)
    else:
        got = [of.gap, of.bound, of.bounds["a_posteriori"]]
        expected = [0.2491665, 1.0449490, 0.3298364]
    np.testing.assert_allclose(got, expected, atol=6e-8)
    assert of.gap <= of.bounds["a_posteriori_final"] <= of.bounds["a_posteriori"] <= of.bound
    assert of.weighted_gap <= of.bounds["weighted"]


def test_increasing_steps_void_the_bound():
    """Card: gap 1.9755 where the formula gives .10449."""
    domain, T = box(jnp.array(-1.0), jnp.array(1.0)), 50
    eta = jnp.append(jnp.full(49, 1e-3), 10.0)
    state, _ = run(
        lambda theta, x: jnp.abs(theta + 1), domain, jnp.array(1.0), eta, eta, jnp.array(-1.0)
    )
    assert float(bound(eta, T, 2.0, 1.0)) == pytest.approx(0.10449, abs=6e-7)
    certificate = certify(state, domain, G=1.0, convex="declared")
    assert certificate.gap == pytest.approx(1.9755, abs=6e-5)
    assert certificate.status == "not certified"
    assert certificate.reasons == ("steps that do not increase",)
    assert "average" not in certificate.bounds
    # What holds for any steps is still there.
    assert certificate.gap <= certificate.bounds["a_posteriori"]
    assert certificate.weighted_gap <= certificate.bounds["weighted"]


def test_random_convex_problems():
    """1000 piecewise-linear problems: gap <= a posteriori <= plain with the true D and G."""
    d, T, pieces = 3, 20, 4
    domain = ball(1.0)
    tracker = lambda best: dataclasses.replace(RegretTracker(domain), comparator=best)

    def loss(theta, piece):
        a, b = piece
        return jnp.max(a @ theta + b)

    def problem(key):
        keys = jax.random.split(key, 5)
        data = jax.random.normal(keys[0], (T, pieces, d)), jax.random.normal(keys[1], (T, pieces))
        best = domain.project(2 * jax.random.normal(keys[2], (d,)))
        theta = domain.project(jax.random.normal(keys[3], (d,)))
        eta = jnp.sort(jax.random.uniform(keys[4], (T,), minval=0.01))[::-1]

        def step(carry, now):
            theta, state = carry
            value, grads = jax.value_and_grad(loss)(theta, now[0])
            new = domain.project(theta - now[1] * grads)
            other = loss(best, now[0])
            state = tracker(best).update(
                state, value, grads, now[1], theta, comparator_loss=other, next_params=new
            )
            return (new, state), None

        (_, state), _ = jax.lax.scan(step, (theta, tracker(best).init()), (data, eta))
        return state, eta

    state, eta = jax.jit(jax.vmap(problem))(jax.random.split(jax.random.key(0), 1000))
    total = dict(zip(_SUMS, np.asarray(state.sums + state.carry).T, strict=True))
    gap = (total["loss"] - total["comparator"]) / T
    posteriori = (total["telescope"] + total["eta_grad2"] / 2) / T
    final = posteriori - np.asarray(state.distance_next) ** 2 / (2 * eta[:, -1]) / T
    D, G = np.asarray(state.distance_max), np.asarray(state.grad_max)
    plain = np.asarray(jax.vmap(lambda e, D, G: bound(e, T, D, G))(eta, state.distance_max, G))
    assert (gap <= final + 1e-12).all()
    assert (final <= posteriori).all()
    assert (posteriori <= plain + 1e-12).all()
    assert (state.slack_min >= -1e-12).all()
    assert state.plain_sgd.all()
    assert state.inside.all()
    # A certificate of one of them, with D and G as observed.
    one = jax.tree.map(lambda x: x[7], state)
    certificate = certify(one, domain, D=float(D[7]), convex="declared")
    assert certificate.status == "certified"
    assert certificate.kind == "a posteriori"
    assert certificate.bound == pytest.approx(plain[7], rel=1e-12)


# --- assumptions --------------------------------------------------------------------------------

DOMAIN = box(jnp.array(-1.0), jnp.array(1.0))


WHOLE = unbounded()


@functools.cache
def twenty_steps(domain, comparator, track_next):
    best = None if comparator is None else jnp.array(comparator)
    eta, data = jnp.full(20, 0.1), alternating(T=20)
    state, _ = run(distance_loss, domain, jnp.array(0.7), data, eta, best, track_next=track_next)
    return state


def short(comparator=0.0, track_next=True, domain=DOMAIN, **changes):
    """A good run of 20 steps, its state then changed."""
    changes = {name: jnp.asarray(value) for name, value in changes.items()}
    return twenty_steps(domain, comparator, track_next)._replace(**changes)


def reasons(state, domain=DOMAIN, **options):
    certificate = certify(state, domain, **{"G": 1.0, "convex": "declared"} | options)
    assert (certificate.status == "certified") == (not certificate.reasons)
    return certificate.reasons


def test_nothing_undeclared_is_certified():
    assert reasons(short()) == ()
    assert reasons(short(), convex="checked by sampled inequality") == ()
    assert reasons(short(), convex=None) == ("convexity (undeclared)",)
    assert reasons(short(), convex=False) == ("convexity",)
    unseen = short(track_next=False)
    assert reasons(unseen) == ("plain SGD (undeclared)",)
    assert reasons(unseen, plain_sgd=True) == ()
    assert reasons(unseen, plain_sgd=False) == ("plain SGD",)
    assert certify(unseen, DOMAIN, plain_sgd=False).assumptions["plain_sgd"] is False
    assert "a_posteriori_final" not in certify(unseen, DOMAIN).bounds


def test_each_violation_is_named():
    assert reasons(short(), G=0.5) == ("max ||g|| <= G",)
    assert reasons(short(), D=0.1) == ("bounded D",)
    assert reasons(short(inside=False)) == ("iterates in the domain",)
    assert reasons(short(monotone=False)) == ("steps that do not increase",)
    assert reasons(short(slack_min=-0.1)) == ("convexity",)
    assert reasons(short(plain_sgd=False), plain_sgd=True) == ("plain SGD",)
    inexact = intersection(ball(1.0), ball(2.0))
    assert reasons(short(domain=inexact), inexact) == ("exact projection",)
    assert reasons(short(comparator=None, domain=WHOLE), WHOLE) == ("bounded D",)
    # With θ* the distances that were seen stand in for a diameter.
    certificate = certify(short(domain=WHOLE), WHOLE, G=1.0, convex="declared")
    assert (certificate.status, certificate.kind) == ("certified", "a posteriori")
    assert pytest.approx(0.8) == certificate.D


def test_a_gap_above_the_bound_is_no_certificate():
    state = short()
    wrong = state._replace(sums=state.sums.at[_SUMS.index("loss")].add(100.0))
    assert reasons(wrong)[0] == "gap above its average bound"


def test_without_a_comparator():
    certificate = certify(short(comparator=None), DOMAIN, G=1.0, convex="declared")
    assert certificate.status == "certified"
    assert certificate.gap is certificate.gap_lower_bound is certificate.ratio is None
    assert set(certificate.bounds) == {"average"}
    assert "gap <= bound" in str(certificate)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["loss", "grads"])
def test_what_is_not_finite_is_invalid(bad, where):
    tracker = RegretTracker(DOMAIN, jnp.array(0.0))
    values = {"loss": jnp.array(1.0), "grads": jnp.array(1.0)} | {where: jnp.array(bad)}
    state = tracker.update(
        short(), **values, step_size=0.1, params=jnp.array(0.0), comparator_loss=1.0
    )
    certificate = certify(state, DOMAIN, G=1.0, convex="declared")
    assert certificate.status == "invalid"
    assert certificate.reasons == ("loss, gradient or step not finite",)


def test_an_optimizer_that_is_not_sgd_is_refused():
    def follow(optimizer, T=30):
        tracker, params = RegretTracker(ball(1.0), jnp.zeros(2)), jnp.array([0.5, -0.5])
        state, regret = optimizer.init(params), tracker.init()

        @jax.jit
        def step(params, state, regret, c):
            updates, state = optimizer.update(c, state, params)
            new = optax.apply_updates(params, updates)
            regret = tracker.update(
                regret, jnp.vdot(c, params), c, 0.1, params, comparator_loss=0.0, next_params=new
            )
            return new, state, regret

        for c in jnp.asarray(np.random.default_rng(0).standard_normal((T, 2))):
            params, state, regret = step(params, state, regret, c)
        return certify(regret, ball(1.0), convex="declared")

    with jax.numpy_dtype_promotion("standard"):
        assert follow(projected(optax.sgd(0.1), ball(1.0))).status == "certified"
        assert follow(projected(optax.adam(0.1), ball(1.0))).reasons == ("plain SGD",)
        momentum = follow(projected(optax.sgd(0.1, momentum=0.9), ball(1.0)))
        assert momentum.assumptions["plain_sgd"] is False


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounding_of_narrow_types_violates_nothing(dtype):
    """Linear losses, for which the convexity inequality and the last bound are equalities."""
    domain, best = ball(4.0), jnp.zeros(3, dtype)
    data = jnp.asarray(np.random.default_rng(0).standard_normal((20, 3)), dtype)
    loss = lambda theta, c: jnp.sum(c * theta)
    state, _ = run(
        loss, domain, jnp.array([0.5, 0.2, 0.1], dtype), data, jnp.full(20, 0.125, dtype), best
    )
    certificate = certify(state, domain, convex="declared")
    assert certificate.status == "certified"
    final = certificate.bounds["a_posteriori_final"]
    assert certificate.gap == pytest.approx(final, abs=4 * float(jnp.finfo(dtype).eps))


def test_a_gradient_whose_square_overflows():
    tracker = RegretTracker(DOMAIN)
    state = tracker.update(tracker.init(), 1.0, jnp.array(1e200), 0.1, jnp.array(0.0))
    certificate = certify(state, DOMAIN, convex="declared", plain_sgd=True)
    assert (certificate.status, certificate.bound) == ("certified", np.inf)


def test_a_concave_loss_is_found_out():
    loss = lambda theta, x: -((theta - 0.1 * x) ** 2)
    eta = jnp.full(20, 0.1)
    state, _ = run(loss, DOMAIN, jnp.array(0.5), alternating(T=20), eta, jnp.array(0.0))
    assert "convexity" in reasons(state, G=3.0)
    assert float(sampled_convexity(lambda t: loss(t, 1.0), jnp.linspace(-1, 1, 5))) < 0


@pytest.mark.x32
def test_sums_are_compensated_in_float32():
    tracker, T = RegretTracker(unbounded()), 200_000

    @jax.jit
    def many(state):
        step = lambda s, _: (tracker.update(s, 0.1, jnp.ones(1), 0.1, jnp.zeros(1)), None)
        return jax.lax.scan(step, state, None, length=T)[0]

    state = many(tracker.init())
    assert all(x.dtype in (jnp.float32, jnp.int32, jnp.bool_) for x in state)
    certificate = certify(state, unbounded())
    assert certificate.average_loss == pytest.approx(np.float32(0.1), rel=1e-7)
    naive = np.cumsum(np.full(T, 0.1, np.float32))[-1] / T
    assert abs(naive - 0.1) > 1e-5


def test_the_state_is_a_fixed_number_of_scalars():
    state = RegretTracker(unbounded()).init()
    assert sum(x.size for x in state) < 40
    after = jax.eval_shape(
        lambda s: RegretTracker(unbounded()).update(s, 0.1, jnp.ones(1000), 0.1, jnp.zeros(1000)),
        state,
    )
    assert [(x.shape, x.dtype) for x in after] == [(x.shape, x.dtype) for x in state]


# --- convexity and comparators ------------------------------------------------------------------


def test_convexity_inequality():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((2, 5)))
    loss = lambda w: jnp.log(jnp.sum(jnp.exp(w)))
    slack = convexity_slack(loss(x), jax.grad(loss)(x), x, loss(y), y)
    p = np.exp(x) / np.sum(np.exp(x))
    assert float(slack) == pytest.approx(float(loss(y) - loss(x) - p @ (y - x)), rel=1e-12)
    assert float(slack) > 0
    points = {"w": jnp.asarray(rng.standard_normal((6, 3)))}
    assert float(sampled_convexity(lambda p: jnp.sum(p["w"] ** 4), points)) >= -1e-12


@pytest.mark.parametrize("radius", [0.5, 100.0])
def test_comparator_of_least_squares(radius):
    rng = np.random.default_rng(0)
    A, b = jnp.asarray(rng.standard_normal((20, 4))), jnp.asarray(rng.standard_normal(20))
    loss = lambda w: jnp.mean((A @ w - b) ** 2)
    smooth = 2 / 20 * np.linalg.eigvalsh(A.T @ A)[-1]
    domain = ball(radius)
    best = solve_comparator(loss, jnp.zeros(4), domain, step_size=1 / smooth, steps=500)
    assert domain.contains(best)
    # A fixed point of the projected gradient step is the minimum.
    again = domain.project(best - jax.grad(loss)(best) / smooth)
    np.testing.assert_allclose(again, best, atol=1e-12)
    narrow = solve_comparator(
        lambda w: loss(w.astype(jnp.float64)),
        jnp.zeros(4, jnp.bfloat16),
        domain,
        step_size=1 / smooth,
        steps=500,
    )
    assert narrow.dtype == jnp.bfloat16
    assert float(loss(narrow.astype(jnp.float64))) == pytest.approx(float(loss(best)), rel=0.01)
    if radius > 1:
        np.testing.assert_allclose(best, np.linalg.lstsq(A, b, rcond=None)[0], atol=1e-10)


def test_momentum_starts_anew_when_it_points_uphill():
    """Curvatures 1 and 1/100: without that the error is 4e-3 after 200 steps, and it swings."""
    loss = lambda w: jnp.sum(jnp.array([1.0, 0.01]) * (w - 1) ** 2) / 2
    best = solve_comparator(loss, jnp.zeros(2), WHOLE, step_size=1.0, steps=200)
    np.testing.assert_allclose(best, 1, atol=1e-11)


def test_last_iterate_identity():
    """Check 8: the last value as a mean plus weighted differences, for any sequence."""
    q = np.random.default_rng(0).standard_normal(30)
    T = len(q)
    at = dict(enumerate(q, start=1))
    rest = sum(
        sum(at[t] - at[T - k] for t in range(T - k, T + 1)) / (k * (k + 1)) for k in range(1, T)
    )
    assert at[T] == pytest.approx(q.mean() + rest, abs=1e-12)


def test_bounds_in_expectation_hold_on_average():
    """Linear decay on |θ - x|, x = ±1, P(1) = 0.7, Θ unbounded, θ_1 = 0, θ* = 1."""
    T, runs = 64, 400
    alpha, closed = closed_form("linear_decay", T, 1.0, 1.0)
    eta = alpha * (1 - jnp.arange(1, T + 1) / (T + 1))
    x = jnp.where(jax.random.uniform(jax.random.key(0), (T, runs)) < 0.7, 1.0, -1.0)

    def step(theta, now):
        x, rate = now
        return theta - rate * jnp.sign(theta - x), theta

    # θ_T is taken before step T.
    _, path = jax.lax.scan(step, jnp.zeros(runs), (x, eta))
    path, weights = np.asarray(path), np.asarray(eta / jnp.sum(eta))
    loss = lambda theta: 0.7 * np.abs(theta - 1) + 0.3 * np.abs(theta + 1)
    gap = lambda theta: loss(theta).mean(-1) - loss(1.0)
    limit = lambda form: float(bound(eta, T, 1.0, 1.0, form))
    assert gap(path[-1]) <= limit("last_refined") <= closed
    assert gap(path[-1]) <= limit("last")
    # By Jensen's inequality a mean iterate is no worse than the mean loss.
    assert gap(path.mean(0)) <= gap(path).mean() <= limit("expected")
    assert gap(weights @ path) <= weights @ gap(path) <= limit("weighted")


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bound(jnp.ones(3), 3, 0.0, 1.0), "D must be greater than 0"),
        (lambda: bound(jnp.ones(3), 3, 1.0, -1.0), "G must be greater than 0"),
        (lambda: bound(jnp.ones(3), 0, 1.0, 1.0), "T must be at least 1"),
        (lambda: bound(jnp.ones(3), 4, 1.0, 1.0), "schedule must have 4 steps"),
        (
            lambda: bound(jnp.array([1.0, 0.0, 1.0]), 3, 1.0, 1.0),
            "schedule must be positive",
        ),
        (lambda: bound(jnp.array([1.0, -1.0]), 2, 1.0, 1.0), "schedule must be positive"),
        (lambda: bound(lambda t: 1 / t, 3, 1.0, 1.0), "schedule must be finite.*count"),
        (lambda: bound(jnp.ones(3), 3, 1.0, 1.0, "mean"), "form must be one of 'average'"),
        (lambda: closed_form("cosine", 3, 1.0, 1.0), "kind must be one of 'constant'"),
        (lambda: closed_form("constant", 3, 0.0, 1.0), "D must be greater than 0"),
        (lambda: closed_form("constant", 3, 1.0, 1.0, scale=-1.0), "scale must be greater"),
        (lambda: RegretTracker(ball(1.0), jnp.ones(2)), "comparator must be in the ball of radius"),
        (
            lambda: certify(short(), DOMAIN, theta_star=jnp.array(2.0)),
            "theta_star must be in the b",
        ),
        (lambda: certify(RegretTracker(DOMAIN).init(), DOMAIN), "at least one step"),
        # A smaller set would make a smaller D of the same run; an inexact projection stays so.
        (lambda: certify(short(), ball(0.5)), "domain must be the tracker's, of diameter 2"),
        (lambda: certify(short(domain=WHOLE), DOMAIN), "domain must be the tracker's, of diam"),
        (lambda: certify(short(exact=False), DOMAIN), "domain must be the tracker's"),
        (lambda: certify(short(), DOMAIN, G=0.0), "G must be greater than 0"),
        (lambda: certify(short(), DOMAIN, D=-1.0), "D must be greater than 0"),
        (lambda: certify(short(), DOMAIN, convex="surely"), "convex must be one of 'declared'"),
        (
            lambda: RegretTracker(DOMAIN).update(
                RegretTracker(DOMAIN).init(),
                1.0,
                jnp.array(1.0),
                0.1,
                jnp.array(0.0),
                comparator_loss=1.0,
            ),
            "comparator_loss must be given with a comparator",
        ),
        (lambda: solve_comparator(jnp.sum, jnp.ones(2), ball(1.0), step_size=0.0), "step_size"),
        (
            lambda: solve_comparator(jnp.sum, jnp.ones(2), ball(1.0), step_size=1.0, steps=0),
            "steps must be at least 1",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
