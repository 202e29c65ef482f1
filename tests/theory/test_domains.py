"""Convex sets: the card's digits, optax as oracle, the properties that the bounds rest on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit.optim import check_optimizer
from jaxkit.theory import domains as dm
from tests.tolerance import tol

EPS = tol(np.float64, 16)
CENTER = jnp.array([1.0, -1.0, 0.5, 2.0])
DOMAINS = {
    "unbounded": dm.unbounded(),
    "ball": dm.ball(1.5),
    "ball with a center": dm.ball(0.5, center=CENTER),
    "box": dm.box(CENTER - 1, CENTER + 0.5),
    "simplex": dm.simplex(1.5),
    "l1 ball": dm.l1_ball(1.5),
    "half-space": dm.half_space(CENTER, 0.5),
    "affine": dm.affine(np.array([[1.0, 1, 1, 1], [2, 2, 2, 2], [1, -1, 0, 0]]), [1.0, 2, 0]),
    "intersection": dm.intersection(dm.ball(1.5), dm.half_space(CENTER, 0.5), iterations=30),
}
EXACT = [name for name, domain in DOMAINS.items() if domain.exact]


def points(n, size=4, scale=3.0, seed=0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal((n, size)))


def test_projections_of_the_card():
    x = dm.simplex().project(jnp.array([0.5, 0.3, -0.2, 1.4]))
    np.testing.assert_allclose(x, [0.05, 0, 0, 0.95], atol=1e-15)
    x = dm.l1_ball(2.0).project(jnp.array([3.0, -1.0, 0.5]))
    np.testing.assert_allclose(x, [2, 0, 0], atol=1e-15)
    np.testing.assert_allclose(dm.ball(1.0).project(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=EPS)


@pytest.mark.parametrize("name", EXACT)
def test_projections_are_idempotent_non_expansive_and_nearest(name):
    domain = DOMAINS[name]
    project = jax.jit(jax.vmap(domain.project))
    a, b = points(200), project(points(200, seed=1))
    inside = project(a)
    np.testing.assert_allclose(project(inside), inside, atol=1e-13)
    distance = lambda x, y: np.linalg.norm(np.asarray(x) - np.asarray(y), axis=1)
    assert (distance(inside, b) <= distance(a, b) + 1e-12).all()
    # The nearest point: (a - Π(a)) · (b - Π(a)) <= 0 for every b in the set.
    assert (np.sum((np.asarray(a) - inside) * (np.asarray(b) - inside), axis=1) <= 1e-12).all()
    assert jax.vmap(domain.contains)(inside).all()
    assert distance(inside, b).max() <= domain.diameter + 1e-12
    if name != "unbounded":
        assert not jax.vmap(domain.contains)(a).all()


@pytest.mark.parametrize(
    ("domain", "oracle"),
    [
        (dm.ball(1.5), lambda x: optax.projections.projection_l2_ball(x, 1.5)),
        (dm.simplex(1.5), lambda x: optax.projections.projection_simplex(x, 1.5)),
        (dm.l1_ball(1.5), lambda x: optax.projections.projection_l1_ball(x, 1.5)),
        (
            DOMAINS["half-space"],
            lambda x: optax.projections.projection_halfspace(x, CENTER, 0.5),
        ),
    ],
)
def test_optax_as_oracle(domain, oracle):
    x = points(50)
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.vmap(oracle)(x)
    np.testing.assert_allclose(jax.vmap(domain.project)(x), expected, atol=1e-13)


def test_intersection_is_near_the_nearest_point():
    domain = dm.intersection(dm.ball(1.0), dm.half_space(jnp.array([1.0, 0.0]), 0.5))
    # The corner of the circle and the line.
    corner = [0.5, np.sqrt(0.75)]
    np.testing.assert_allclose(domain.project(jnp.array([3.0, 3.0])), corner, atol=1e-6)
    assert domain.diameter == 2
    assert not domain.exact


def test_a_pytree_is_one_vector():
    tree = {"w": jnp.array([[3.0], [0.0]]), "b": jnp.array(4.0), "none": None}
    out = dm.ball(1.0).project(tree)
    np.testing.assert_allclose(out["w"], [[0.6], [0]], rtol=EPS)
    np.testing.assert_allclose(out["b"], 0.8, rtol=EPS)
    assert out["none"] is None
    out = dm.simplex(2.0).project(tree)
    assert float(jnp.sum(out["w"]) + out["b"]) == pytest.approx(2)
    for domain in (dm.ball(1.0), dm.l1_ball(1.0), dm.unbounded()):
        assert domain.project({}) == {}
    assert dm.box(-1.0, 1.0).diameter == 2
    assert dm.half_space(2.0, 1.0).project(jnp.array(3.0)) == 0.5
    assert dm.box({"w": jnp.zeros((2, 2))}, {"w": jnp.ones((2, 2))}).diameter == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("domain", [dm.ball(1.5), dm.simplex(1.5), dm.l1_ball(1.5)])
def test_dtype_is_kept(domain, dtype):
    x = points(1)[0].astype(dtype)
    out = domain.project(x)
    assert out.dtype == dtype
    assert domain.contains(out)
    exact = domain.project(x.astype(jnp.float64))
    np.testing.assert_allclose(out.astype(jnp.float64), exact, atol=2 * float(jnp.finfo(dtype).eps))


def test_a_ball_leaves_inner_points_alone_and_has_a_gradient_at_its_center():
    x = points(1)[0]
    inner = x / (1.0001 * dm.norm(x))
    np.testing.assert_array_equal(dm.ball(1.0).project(inner), inner)
    jacobian = jax.jacobian(dm.ball(1.0).project)(jnp.zeros(4))
    np.testing.assert_array_equal(jacobian, np.eye(4))
    jacobian = jax.jacobian(dm.ball(1.0).project)(jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(jacobian, [[0.5, 0], [0, 0]], atol=1e-15)


@pytest.mark.x32
def test_large_values_in_float32():
    assert float(dm.norm(jnp.array([3e30, 4e30]))) == pytest.approx(5e30)
    assert float(dm.norm(jnp.array([3e-30, 4e-30]))) == pytest.approx(5e-30)
    assert float(dm.norm(jnp.zeros(3))) == 0
    assert np.isinf(dm.norm(jnp.array([jnp.inf, 1.0])))
    assert np.isnan(dm.norm(jnp.array([jnp.nan, 1.0])))
    np.testing.assert_array_equal(jax.grad(dm.norm)(jnp.zeros(3)), np.zeros(3))
    # Adding one number to all entries changes nothing on the simplex.
    x = jnp.array([0.5, 0.25, -0.25, 1.5])
    shifted = dm.simplex().project(x + 2.0**20)
    np.testing.assert_array_equal(shifted, dm.simplex().project(x))
    np.testing.assert_allclose(dm.ball(1.0).project(jnp.array([3e30, 4e30])), [0.6, 0.8], rtol=1e-6)


def test_projected_sgd_stays_inside():
    optimizer = dm.projected(optax.sgd(0.5), dm.ball(1.0))
    params = {"w": jnp.array([0.5, 0.5]), "b": None}
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(
            {"w": jnp.array([-3.0, 1.0]), "b": None}, state, params
        )
        params = optax.apply_updates(params, updates)
        assert dm.ball(1.0).contains(params)
    assert float(dm.norm(params)) == pytest.approx(1, rel=1e-12)
    with pytest.raises(ValueError, match="params must be given"):
        optimizer.update({"w": jnp.ones(2), "b": None}, state)


def test_projected_takes_any_function():
    optimizer = dm.projected(optax.sgd(1.0), optax.projections.projection_non_negative)
    params = jnp.array([1.0, 1.0])
    updates, _ = optimizer.update(jnp.array([3.0, -3.0]), optimizer.init(params), params)
    np.testing.assert_array_equal(params + updates, [0, 4])


@pytest.mark.slow
def test_projected_passes_the_contract():
    check_optimizer(lambda rate: dm.projected(optax.sgd(rate), dm.ball(30.0)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dm.ball(0.0), "radius must be greater than 0"),
        (lambda: dm.l1_ball(-1.0), "radius must be greater than 0"),
        (lambda: dm.simplex(0.0), "total must be greater than 0"),
        (lambda: dm.box(1.0, -1.0), "low must be at most high"),
        (lambda: dm.box(-1.0, 1.0).project(jnp.zeros(3)), "low must have the structure and shapes"),
        (lambda: dm.ball(1.0, center=CENTER).project(jnp.zeros(3)), "center must have the struct"),
        (lambda: dm.half_space(jnp.zeros(2), 1.0), "normal must not be zero"),
        (lambda: dm.half_space(CENTER, 1.0).project(jnp.zeros(3)), "normal must have the struct"),
        (lambda: dm.affine(np.eye(2), [1.0]), "offset must have one entry a row"),
        (lambda: dm.affine([[1.0], [1.0]], [1.0, 2.0]), "offset must be in the range"),
        (lambda: dm.affine(np.eye(2), [1.0, 1.0]).project(jnp.zeros(3)), "3 columns"),
        (lambda: dm.intersection(dm.ball(1.0)), "domains must be at least two"),
        (lambda: dm.intersection(dm.ball(1.0), dm.ball(2.0), iterations=0), "iterations"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
