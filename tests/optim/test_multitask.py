"""Weights from Gram matrices: the card's digits, optimality conditions, degenerate input."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import nnls

from jaxkit.optim import multitask as mt
from jaxkit.optim.multitask.quadratic import quadratic
from tests.tolerance import tol

J2 = np.array([[-4.0, 1, 1], [6, 1, 1]])
J3 = np.array([[1.0, 2, 0, -1], [-2, 1, 1, 0], [0.5, -1, 3, 2]])
OPPOSED = np.array([[1.0, 0], [-1, 0.1], [0, 1]])
AUXILIARY = np.array([[3.0, -3, -2], [-1, 1, 1], [-1, 2, 0]])

STATIC = {"alpha", "mains", "normalize", "rescale", "scale", "solver", "steps"}
GRAM_METHODS = {
    name: jax.jit(
        method.weigh,
        static_argnames=STATIC.intersection(inspect.signature(method.weigh).parameters),
    )
    for name, method in mt.METHODS.items()
    if method.takes == "gram" and method.init is None
}


def gram(J, dtype=jnp.float64):
    return jnp.asarray(J @ J.T, dtype)


def random_rows(seed, tasks, dim, conflict=0.0):
    J = np.random.default_rng(seed).standard_normal((tasks, dim))
    return J - conflict * J.mean(0)


# --- the card's digits ---------------------------------------------------------------------------


WEIGHTS_2 = {
    "mgda": (0.6, 0.4),
    "pcgrad": (2.2222222, 1.5789474),
    "cagrad": (0.7041241, 0.5),
    "imtl_g": (0.5923303, 0.4076697),
    "nash": (0.5914612, 0.4070715),
    "aligned": (0.5590719, 0.4082611),
    "dual_proj": (0.6111111, 0.5),
    "upgrad": (1.1111111, 0.7894737),
}


@pytest.mark.parametrize("name", WEIGHTS_2)
def test_two_tasks_have_the_cards_weights(name):
    np.testing.assert_allclose(GRAM_METHODS[name](gram(J2)), WEIGHTS_2[name], atol=1e-7)


def test_two_tasks_have_the_cards_directions():
    np.testing.assert_allclose(mt.mgda(gram(J2)) @ J2, (0, 1, 1), atol=1e-14)
    w = mt.nash(gram(J2))
    assert float(w @ gram(J2) @ w) == pytest.approx(2, abs=1e-12)
    np.testing.assert_allclose(
        mt.config(gram(J2)) @ J2, (0.1588090, 2.0706068, 2.0706068), atol=1e-7
    )


@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        ("mgda", {}, np.array([8, 5, 4]) / 17),
        ("cagrad", {"c": 0.4}, (0.5842559, 0.3342559, 0.3333333)),
        ("imtl_g", {}, (0.4639447, 0.2476133, 0.2884420)),
        ("nash", {}, (0.5117216, 0.3825375, 0.3188976)),
        ("upgrad", {}, (0.5277778, 0.3333333, 0.4152047)),
        ("primary", {}, (1, 0, 0.2456140)),
    ],
)
def test_three_tasks_have_the_cards_weights(name, options, weights):
    w = GRAM_METHODS[name](gram(J3), **options)
    np.testing.assert_allclose(w, weights, atol=1e-7)
    if name == "mgda":
        np.testing.assert_allclose(w @ J3, (0, 1, 1, 0), atol=1e-14)
    if name == "cagrad":
        assert float(jnp.min(gram(J3) @ w)) == pytest.approx(2.3388685, abs=1e-7)


@pytest.mark.parametrize(
    ("scale", "first"), [("min", 0.3553016), ("median", 0.4047470), ("mean", 0.4887785)]
)
def test_aligned_scales(scale, first):
    assert float(mt.aligned(gram(J3), scale=scale)[0]) == pytest.approx(first, abs=1e-7)


def test_pcgrad_is_the_same_in_any_order_on_the_cards_rows():
    pcgrad = jax.jit(mt.pcgrad)
    for key in jax.random.split(jax.random.key(0), 6):
        w = pcgrad(gram(J3), key=key)
        np.testing.assert_allclose(w, (1.5833333, 1, 1.2456140), atol=1e-7)


def test_pcgrad_depends_on_the_order_in_general():
    """Against projections of the rows themselves, in every order."""
    J = random_rows(3, 3, 4, conflict=1.0)

    def project_one(i, order):
        g = J[i].copy()
        for j in order:
            if j != i and g @ J[j] < 0:
                g -= (g @ J[j]) / (J[j] @ J[j]) * J[j]
        return g

    project = lambda order: sum(project_one(i, order) for i in range(3))

    np.testing.assert_allclose(mt.pcgrad(gram(J)) @ J, project((0, 1, 2)), atol=1e-13)
    assert not np.allclose(project((0, 1, 2)), project((2, 1, 0)))
    # With a key, each task meets the others in one of the two orders; in time, all eight are seen.
    keys = jax.random.split(jax.random.key(1), 60)
    seen = jax.vmap(lambda key: mt.pcgrad(gram(J), key=key))(keys) @ J
    orders = [[project_one(i, order) for order in ((0, 1, 2), (2, 1, 0))] for i in range(3)]
    possible = {tuple(np.sum(rows, axis=0).round(9)) for rows in itertools.product(*orders)}
    assert {tuple(u) for u in np.asarray(seen).round(9)} == possible


def test_opposed_rows():
    G = gram(OPPOSED)
    np.testing.assert_allclose(mt.mgda(G), (0.5012469, 0.4987531, 0), atol=1e-7)
    np.testing.assert_allclose(mt.nash(G), (11.60457, 11.51840, 0.57807), atol=5e-6)
    w, gap = mt.frank_wolfe(G, steps=1000)
    assert 6e-3 < float(jnp.max(jnp.abs(w - mt.mgda(G)))) < 8e-3
    exact = mt.mgda(G)
    excess = (w @ G @ w - exact @ G @ exact) / 2
    assert 0 < float(excess) <= float(gap)


def test_open_steps_of_frank_wolfe_average_the_tasks_that_are_worst_off():
    G = gram(J3)
    w = np.ones(3) / 3
    for t in range(7):
        w = w + (np.eye(3)[np.argmin(np.asarray(G) @ w)] - w) / (t + 2)
    got, _ = mt.frank_wolfe(G, steps=7, line_search=False)
    np.testing.assert_allclose(got, w, atol=1e-14)


def test_the_primary_example_and_where_the_posts_iteration_stalls():
    G = np.asarray(gram(AUXILIARY))
    np.testing.assert_allclose(mt.primary(gram(AUXILIARY)), (1, 13 / 6, 1 / 2), atol=1e-12)
    w = np.array([1.0, 0, 0])
    for _ in range(1000):
        slack = (G @ w)[1:]
        i = 1 + np.argmin(slack)
        w[i] = max(0, -(G[i] @ w - G[i, i] * w[i]) / G[i, i])
    np.testing.assert_allclose(w, (1, 13 / 15, 9 / 5), atol=1e-9)
    assert G[0] @ w == pytest.approx(-17 / 15)
    best = np.asarray(mt.primary(gram(AUXILIARY)))
    assert best @ G @ best < w @ G @ w
    assert (G @ best)[0] > 0


def test_the_l2_auxiliary():
    theta = jnp.array([-2.0, 1, 0.5])
    grads = jnp.array([1.0, -2, 3])
    optimizer = optax.chain(optax.sgd(1.0), mt.decoupled_auxiliary())
    updates, _ = optimizer.update(grads, optimizer.init(theta), theta, auxiliary=theta[None])
    np.testing.assert_allclose(-updates, (0.0476190, -1.5238095, 3.2380952), atol=1e-7)
    assert abs(float(updates @ theta)) < 1e-14
    with pytest.raises(ValueError, match="auxiliary must be given"):
        optimizer.update(grads, optimizer.init(theta), theta)


def test_the_decoupled_auxiliary_and_what_is_not_finite():
    """An update that is not finite is not made one of zeros; an auxiliary that is not is left."""
    correct = mt.decoupled_auxiliary().update
    rows = jnp.array([[1.0, 1.0]])
    updates, _ = correct(jnp.array([jnp.nan, 1.0]), (), auxiliary=rows)
    assert np.isnan(updates).any()
    for bad in (jnp.nan, jnp.inf):
        updates, _ = correct(jnp.array([2.0, 1.0]), (), auxiliary=bad * rows)
        assert updates.tolist() == [2, 1]
    assert correct({}, (), auxiliary={})[0] == {}


def test_imtl_g_is_the_original_where_the_pseudo_inverse_climbs():
    J = np.array([[1.0, 0], [-2, 0]])
    np.testing.assert_allclose(mt.imtl_g(gram(J)), (2 / 3, 1 / 3), atol=1e-14)


# --- invariants ----------------------------------------------------------------------------------


def test_scale_invariance():
    G, c = gram(J3), np.array([1.0, 100, 0.01])
    scaled = gram(c[:, None] * J3)
    for name in ("nash", "normalized_sum"):
        u = GRAM_METHODS[name](G) @ J3
        np.testing.assert_allclose(GRAM_METHODS[name](scaled) @ (c[:, None] * J3), u, rtol=1e-11)
    u, v = mt.imtl_g(G) @ J3, mt.imtl_g(scaled) @ (c[:, None] * J3)
    cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    assert float(cosine) == pytest.approx(1, abs=1e-12)
    u, v = mt.mgda(G) @ J3, mt.mgda(scaled) @ (c[:, None] * J3)
    assert float(u @ v / np.linalg.norm(u) / np.linalg.norm(v)) < 0.95


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_weights_do_not_depend_on_the_size_of_the_gram_matrix(name):
    """Up to the powers that the methods have: 1e-30 must not underflow."""
    power = {"normalized_sum": -0.5, "nash": -0.5, "fairgrad": -1 / 1.5}.get(name, 0)
    w = GRAM_METHODS[name](gram(J3))
    small = GRAM_METHODS[name](1e-30 * gram(J3))
    np.testing.assert_allclose(small * 1e-30**-power, w, rtol=1e-9)


def test_two_tasks_have_one_bisector():
    J = random_rows(0, 2, 5)
    h = J / np.linalg.norm(J, axis=1, keepdims=True)
    bisector = h.sum(0) / np.linalg.norm(h.sum(0))
    for name in ("normalized_sum", "imtl_g", "nash", "config", "mgda"):
        options = {"normalize": "l2"} if name == "mgda" else {}
        u = GRAM_METHODS[name](gram(J), **options) @ J
        np.testing.assert_allclose(u / np.linalg.norm(u), bisector, atol=1e-12)


def test_no_task_gets_worse():
    grams = jnp.stack([gram(random_rows(seed, 4, 5, conflict=0.9)) for seed in range(40)])
    for method in (mt.mgda, mt.upgrad, mt.dual_proj):
        w = jax.jit(jax.vmap(method))(grams)
        falls = jnp.einsum("bij,bj->bi", grams, w)
        assert float(jnp.min(falls)) > -1e-12
        assert float(jnp.min(w)) >= 0
    w = jax.jit(jax.vmap(mt.primary))(grams)
    falls = jnp.einsum("bij,bj->bi", grams, w)
    # The main task falls as fast as the direction is long.
    assert float(jnp.min(falls[:, 1:])) > -1e-12
    np.testing.assert_allclose(falls[:, 0], jnp.einsum("bi,bi->b", w, falls), atol=1e-12)


def test_primary_is_non_negative_least_squares():
    """A solver that is exact where going round the constraints was wrong every other time."""
    rows = [random_rows(seed, 4, 6, conflict=1.3) for seed in range(50)]
    w = jax.jit(jax.vmap(mt.primary))(jnp.stack([gram(J) for J in rows]))
    for J, got in zip(rows, w, strict=True):
        np.testing.assert_allclose(got[1:], nnls(J[1:].T, -J[0])[0], atol=1e-10)
        assert got[0] == 1


def test_primary_with_several_mains():
    J = random_rows(2, 4, 5, conflict=1.1)
    G = np.asarray(gram(J))
    w = np.asarray(mt.primary(gram(J), mains=(0, 2)))
    assert w[[0, 2]].sum() == pytest.approx(1, abs=1e-14)
    assert w.min() >= 0
    falls, square = G @ w, w @ G @ w
    assert falls[[1, 3]].min() > -1e-12
    assert falls[[0, 2]].min() > square - 1e-12
    np.testing.assert_allclose(falls[[0, 2]][w[[0, 2]] > 0], square, atol=1e-12)


@pytest.mark.parametrize("tasks", [3, 12])
def test_cagrad_is_on_its_sphere_and_without_duality_gap(tasks):
    rows = np.stack([random_rows(seed, tasks, 2 * tasks, conflict=0.8) for seed in range(10)])
    grams = jnp.asarray(np.einsum("bip,bjp->bij", rows, rows))
    w = np.asarray(jax.jit(jax.vmap(lambda G: mt.cagrad(G, c=0.5)))(grams))
    u, mean = np.einsum("bi,bip->bp", w, rows), rows.mean(1)
    radius = 0.5 * np.linalg.norm(mean, axis=1)
    np.testing.assert_allclose(np.linalg.norm(u - mean, axis=1), radius, rtol=1e-9)
    worst = np.einsum("bip,bp->bi", rows, u).min(1)
    v = w - 1 / tasks
    assert v.min() > -1e-12
    v = np.einsum("bi,bip->bp", v / v.sum(1, keepdims=True), rows)
    dual = np.sum(v * mean, 1) + radius * np.linalg.norm(v, axis=1)
    np.testing.assert_allclose(worst, dual, atol=1e-9 * np.abs(dual).max())


def test_cagrad_options():
    G, cagrad = gram(J3), GRAM_METHODS["cagrad"]
    np.testing.assert_allclose(cagrad(G, c=0.0), np.ones(3) / 3, atol=1e-15)
    w = cagrad(G, c=0.4)
    np.testing.assert_allclose(cagrad(G, c=0.4, rescale="1+c2"), w / 1.16, atol=1e-14)
    np.testing.assert_allclose(cagrad(G, c=0.4, rescale="1+c"), w / 1.4, atol=1e-14)
    a = np.array([0.2, 0.5, 0.3])
    u = cagrad(G, c=0.4, preference=a) @ J3
    assert float(np.linalg.norm(u - a @ J3)) == pytest.approx(0.4 * np.linalg.norm(a @ J3))


def test_cagrad_at_a_stationary_point_of_two_tasks():
    """Zero lies between the first two: the best direction leaves them alone."""
    J = np.array([[1.0, 0], [-1.5, 0], [0, 1]])
    u = mt.cagrad(gram(J), c=0.5) @ J
    np.testing.assert_allclose(u, (0, 1 / 3), atol=1e-7)


def test_gradvac_reaches_its_target_and_tracks_the_cosine():
    J = np.array([[1.0, 0.2, 0], [0.3, 1, -0.5]])
    rho = jnp.full((2, 2), 0.7)
    w, state = mt.gradvac(gram(J), mt.GradVacState(rho), beta=0.25)
    cosine = J[0] @ J[1] / np.linalg.norm(J[0]) / np.linalg.norm(J[1])
    assert cosine < 0.7
    np.testing.assert_allclose(state.rho[0, 1], 0.75 * 0.7 + 0.25 * cosine, atol=1e-14)
    assert float(state.rho[0, 0]) == 0.7
    _, slow = mt.gradvac(gram(J), mt.GradVacState(rho))  # the paper's rate
    np.testing.assert_allclose(slow.rho[0, 1], 0.99 * 0.7 + 0.01 * cosine, atol=1e-14)
    # The changed rows are e_i plus a multiple of the other.
    changed = [J[0] + (float(w[1]) - 1) * J[1], J[1] + (float(w[0]) - 1) * J[0]]
    for row, other in zip(changed, (J[1], J[0]), strict=True):
        assert row @ other / np.linalg.norm(row) / np.linalg.norm(other) == pytest.approx(0.7)


def test_nash_solves_its_equations():
    J = random_rows(4, 5, 9, conflict=0.9)
    # Losses of very different scales, gradients nearly opposed.
    J = J * 10.0 ** np.linspace(-2, 2, 5)[:, None]
    G = gram(J)
    w = mt.nash(G)
    np.testing.assert_allclose((G @ w) * w, np.ones(5), atol=1e-9)
    short = mt.nash(gram(J2), max_norm=1.0) @ J2
    assert float(np.linalg.norm(short)) == pytest.approx(1)
    np.testing.assert_allclose(mt.nash(gram(J2), max_norm=5.0), mt.nash(gram(J2)), atol=1e-15)


def rows_of_all_scales(spread, conflict=0.8):
    """Twelve problems of five tasks, the losses' scales spread over 2·`spread` powers of ten."""
    rows = np.stack([random_rows(seed, 5, 9, conflict) for seed in range(12)])
    return rows * 10 ** np.random.default_rng(0).uniform(-spread, spread, (12, 5, 1))


def unfairness(G, w, alpha):
    """The error of (Gw)_i = w_i^{-1/α} in units of the terms that cancel in Gw."""
    G, w = np.asarray(G, np.float64), np.asarray(w, np.float64)
    falls, wanted = np.einsum("bij,bj->bi", G, w), w ** (-1 / alpha)
    return np.max(np.abs(falls - wanted) / (np.einsum("bij,bj->bi", np.abs(G), w) + wanted))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0, 10.0])
def test_fairgrad_solves_its_equations_whatever_the_scales(alpha):
    solve = jax.jit(jax.vmap(lambda G: mt.fairgrad(G, alpha=alpha)))
    for spread in (0, 4):
        rows = rows_of_all_scales(spread)
        G = jnp.asarray(np.einsum("bip,bjp->bij", rows, rows))
        assert unfairness(G, solve(G), alpha) < 1e-13


@pytest.mark.x32
@pytest.mark.parametrize("alpha", [0.25, 2.0, 8.0])
def test_fairgrad_in_single_precision(alpha):
    rows = rows_of_all_scales(2, conflict=0.5)
    G = jnp.asarray(np.einsum("bip,bjp->bij", rows, rows), jnp.float32)
    w = jax.jit(jax.vmap(lambda G: mt.fairgrad(G, alpha=alpha)))(G)
    assert w.dtype == jnp.float32
    assert unfairness(G, w, alpha) < tol(np.float32, 5)


@pytest.mark.x32
@pytest.mark.parametrize("method", ["nash", "fairgrad"])
def test_fairness_without_a_solution_is_finite(method):
    assert np.isfinite(GRAM_METHODS[method](gram(J3[:2] * [[1], [0]], jnp.float32))).all()
    for J in ([[1.0, 0], [-1, 0]], [[1.0, 0], [-0.5, 0.8], [-0.5, -0.9]]):
        assert np.isfinite(GRAM_METHODS[method](gram(np.array(J), jnp.float32))).all()


def test_mgda_normalisations():
    G, losses = gram(J3), jnp.array([1.0, 2, 0.5])
    r = np.sqrt(np.diag(G))
    for normalize, s in (("l2", r), ("loss", losses), ("loss*l2", r * losses)):
        w = mt.mgda(G, normalize=normalize, losses=losses)
        want = mt.mgda(gram(J3 / np.asarray(s)[:, None])) / s
        np.testing.assert_allclose(w, want, atol=1e-12)


@pytest.mark.parametrize("tasks", [2, 3])
def test_mgda_leaves_out_a_task_that_its_normalisation_makes_nothing_of(tasks):
    """A loss that is not finite under jit, or that dwarfs the others by more than rounding."""
    J = J3[:tasks]
    want = np.zeros(tasks)
    want[1:] = 1 if tasks == 2 else mt.mgda(gram(J[1:]))
    for bad in (np.nan, np.inf, 1e14):
        losses = jnp.ones(tasks).at[0].set(bad)
        w = GRAM_METHODS["mgda"](gram(J), normalize="loss", losses=losses)
        np.testing.assert_allclose(w, want, atol=1e-12)


@pytest.mark.x32
def test_imtl_g_is_regular_for_losses_of_all_scales():
    """Differences to one long gradient among short ones must not look like a singular matrix."""
    scales = np.array([1e-4, 2e-4, 1])[:, None]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        J = (scales * J3)[order]
        u = np.asarray(mt.imtl_g(gram(J, jnp.float32)), np.float64) @ J
        projections = J @ u / np.linalg.norm(J, axis=1)
        np.testing.assert_allclose(projections, projections[0], rtol=tol(np.float32, 100))


def test_no_gradient_passes_to_options():
    a = jnp.array([0.2, 0.5, 0.3])
    loss = lambda a, c: jnp.sum(mt.cagrad(gram(J3), c=c, preference=a) ** 2)
    assert [np.abs(x).max() for x in jax.grad(loss, argnums=(0, 1))(a, jnp.array(0.4))] == [0, 0]


def test_preferences():
    a = np.array([0.2, 0.5, 0.3])
    G = gram(J3)
    np.testing.assert_allclose(GRAM_METHODS["mean"](G, preference=a), a)
    V = GRAM_METHODS["aligned"](G, preference=a) @ J3
    full = sum(a[i] * (GRAM_METHODS["aligned"](G, preference=np.eye(3)[i]) @ J3) for i in range(3))
    np.testing.assert_allclose(V, full, atol=1e-13)
    u = GRAM_METHODS["config"](G, preference=a) @ J3
    cosines = J3 @ u / np.linalg.norm(J3, axis=1)
    np.testing.assert_allclose(cosines / cosines.sum(), a, atol=1e-12)
    assert (GRAM_METHODS["dual_proj"](G, preference=a) >= a - 1e-15).all()
    assert (GRAM_METHODS["upgrad"](G, preference=a) >= a - 1e-15).all()


# --- the small programs --------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [4, 11])
@pytest.mark.parametrize("mode", ["simplex", "cone", "duplicates"])
def test_quadratic_programs_meet_their_optimality_conditions(tasks, mode):
    rows = np.stack([random_rows(seed, tasks, tasks - 1, conflict=0.9) for seed in range(20)])
    if mode == "duplicates":
        rows[:, 1] = rows[:, 0]
    simplex = () if mode == "cone" else tuple(range(tasks))
    G = np.einsum("bip,bjp->bij", rows, rows)
    b = np.einsum("bij,j->bi", G, np.ones(tasks)) * (-1 if mode == "cone" else 0)
    solve = jax.jit(jax.vmap(lambda G, b: quadratic(G, b, jnp.ones(tasks, bool), simplex=simplex)))
    x = np.asarray(solve(jnp.asarray(G), jnp.asarray(b)))
    assert x.min() >= 0
    slope = np.einsum("bij,bj->bi", G, x) - b
    if simplex:
        np.testing.assert_allclose(x.sum(1), 1, atol=1e-14)
        slope = slope - np.sum(x * slope, 1, keepdims=True)
    assert slope.min() > -1e-10
    assert np.abs(slope[x > 0]).max() < 1e-10


@pytest.mark.x32
def test_twenty_tasks_in_single_precision():
    J = random_rows(5, 20, 40, conflict=0.9).astype(np.float32)
    J *= 10 ** np.linspace(-2, 2, 20, dtype=np.float32)[:, None]
    G = gram(J, jnp.float32)
    w = jax.jit(mt.mgda)(G)
    assert w.dtype == jnp.float32
    w, G = np.asarray(w, np.float64), np.asarray(G, np.float64)
    r = np.sqrt(np.diag(G))
    gap = G @ w - w @ G @ w
    rounding = tol(np.float32, 20) * r * (w @ r)
    assert (gap > -rounding).all()
    assert (np.abs(gap) < rounding)[w > 0].all()


# --- what must not matter, and what must be left out ---------------------------------------------


@pytest.mark.parametrize("name", GRAM_METHODS)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf], ids=["zero", "nan", "inf"])
def test_a_task_without_a_gradient_is_left_out(name, bad):
    """The others' weights are as without it, where they are not shares of the mean."""
    J = np.insert(J3, 1, bad, axis=0)
    with np.errstate(invalid="ignore"):
        G = J @ J.T
    options = {"mains": 0} if name == "primary" else {}
    w = np.asarray(GRAM_METHODS[name](jnp.asarray(G), **options))
    assert w[1] == 0
    assert np.isfinite(w).all()
    a = {"preference": np.ones(3) / 4}
    takes = name in ("mean", "aligned", "dual_proj", "upgrad", "cagrad")
    want = GRAM_METHODS[name](gram(J3), **options, **(a if takes else {}))
    np.testing.assert_allclose(np.delete(w, 1), want, atol=1e-7)


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_nothing_is_left(name):
    w = GRAM_METHODS[name](jnp.zeros((3, 3)))
    assert (np.asarray(w) == 0).all()


@pytest.mark.parametrize("name", ["mgda", "cagrad", "upgrad", "imtl_g", "aligned", "config"])
def test_duplicate_gradients_are_one(name):
    J = J2[[0, 0, 1]]
    w = GRAM_METHODS[name](gram(J))
    assert np.isfinite(w).all()
    if name == "mgda":
        np.testing.assert_allclose(w @ J, (0, 1, 1), atol=1e-12)


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_permutation_of_the_tasks(name):
    options = {"mains": 2} if name == "primary" else {}
    w = GRAM_METHODS[name](gram(J3), **({"mains": 0} if options else {}))
    order = [1, 2, 0]
    permuted = GRAM_METHODS[name](gram(J3[order]), **options)
    np.testing.assert_allclose(permuted, np.asarray(w)[order], atol=1e-9)


@pytest.mark.x32
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(dtype):
    """18, −22 and 38 are numbers of bfloat16; what is made of them is in float32."""
    G = gram(J2, dtype)
    for name, want in WEIGHTS_2.items():
        w = GRAM_METHODS[name](G)
        assert w.dtype == dtype, name
        close = max(tol(dtype), 1e-5)
        np.testing.assert_allclose(np.asarray(w, np.float64), want, rtol=close, err_msg=name)


def test_no_gradient_passes_through_the_weights():
    for name in ("mgda", "nash", "upgrad", "normalized_sum"):
        slope = jax.grad(lambda G, f=GRAM_METHODS[name]: jnp.sum(f(G)))(gram(J2))
        assert (np.asarray(slope) == 0).all()


def test_graddrop():
    J = jnp.asarray(random_rows(0, 3, 4000))
    keys = jax.random.split(jax.random.key(0), 200)
    u = np.asarray(jax.vmap(lambda key: mt.graddrop({"a": J}, key=key)["a"])(keys))
    positive, negative = np.maximum(J, 0).sum(0), np.minimum(J, 0).sum(0)
    purity = (1 + J.sum(0) / np.abs(J).sum(0)) / 2
    is_positive = np.isclose(u, positive[None])
    assert (is_positive | np.isclose(u, negative[None])).all()
    pure = (positive == 0) | (negative == 0)
    np.testing.assert_allclose(u[:, pure], np.broadcast_to(J.sum(0), u.shape)[:, pure])
    # Deviations of a share of 200 draws, averaged over 4000 coordinates.
    assert abs((is_positive & (positive > 0)).mean(0) - purity)[~pure].mean() < 0.03
    assert mt.graddrop(jnp.zeros((2, 3)), key=keys[0]).tolist() == [0, 0, 0]


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda G: mt.mgda(G[:2]), "gram must be a square matrix"),
        (lambda G: mt.mgda(G[:1, :1]), "at least 2 tasks"),
        (lambda G: mt.mgda(G, normalize="max"), "normalize must be one of"),
        (lambda G: mt.mgda(G, normalize="loss"), "losses must be given"),
        (
            lambda G: mt.mgda(G, normalize="loss", losses=jnp.array([1.0, 0, 1])),
            "losses must be positive",
        ),
        (lambda G: mt.cagrad(G, c=-0.1), "c must be at least 0"),
        (lambda G: mt.cagrad(G, c=1.0), "c must be at least 0 and less than 1"),
        (lambda G: mt.cagrad(G, rescale="1+C"), "Did you mean '1\\+c'"),
        (lambda G: mt.mean(G, preference=[0.5, 0.5]), r"preference must have shape \(3,\)"),
        (lambda G: mt.upgrad(G, preference=[0.5, 0.6, -0.1]), "preference must be non-negative"),
        (lambda G: mt.aligned(G, scale="max"), "scale must be one of"),
        (lambda G: mt.nash(G, max_norm=0.0), "max_norm must be greater than 0"),
        (lambda G: mt.fairgrad(G, alpha=0.0), "alpha must be greater than 0"),
        (lambda G: mt.primary(G, mains=3), "mains must be distinct indices below 3"),
        (lambda G: mt.primary(G, mains=(0, 0)), "mains must be distinct"),
        (lambda G: mt.primary(G, mains=()), "mains must be distinct"),
        (lambda G: mt.frank_wolfe(G, steps=0), "steps must be at least 1"),
        (lambda G: mt.gradvac(G, mt.gradvac_init(3), beta=2.0), "beta must be"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(gram(J3))


def test_integers_are_no_gram_matrix():
    with pytest.raises(TypeError, match="gram must be an array of real floating-point"):
        mt.mgda(jnp.eye(3, dtype=int))
