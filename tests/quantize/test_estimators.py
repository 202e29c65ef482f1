"""Gradient estimators against the dense matrices of the paper and the card's digits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxkit.quantize import ESTIMATORS, estimate, gumbel_softmax_code
from tests.tolerance import tol

Z, Q, G = [3.0, 0.0, 4.0], [0.0, 5.0, 12.0], [1.0, -2.0, 0.5]
MOVING = [name for name in ESTIMATORS if name != "none"]


def matrix(z, q, estimator="rotation", **options):
    """G, one row for every cotangent."""
    z, q = jnp.asarray(z), jnp.asarray(q)
    return np.asarray(jax.vmap(lambda g: pull(z, q, g, estimator, **options))(jnp.eye(z.size)))


def pull(z, q, g, estimator="rotation", **options):
    """Gᵀg by reverse mode."""
    return _pull(estimator, tuple(options.items()), z, q, g)


@partial(jax.jit, static_argnums=(0, 1))
def _pull(estimator, options, z, q, g):
    _, back = jax.vjp(lambda z: estimate(z, q, estimator=estimator, **dict(options)), z)
    return back(g)[0]


def unit(x):
    return np.asarray(x) / np.linalg.norm(x)


def angle(a, b):
    return np.arccos(unit(a) @ unit(b))


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def test_check_1_rotation_digits():
    z, q, g = (jnp.asarray(x) for x in (Z, Q, G))
    expected = [
        [0.792920353982, -0.132743362832, -0.594690265487],
        [0.328795098707, 0.914908100749, 0.234172906739],
        [0.513002042206, -0.381211708645, 0.769094622192],
    ]
    np.testing.assert_allclose(matrix(z, q, "rotation_unscaled"), expected, atol=1e-11)
    np.testing.assert_allclose(matrix(z, q), 2.6 * np.asarray(expected), atol=3e-11)
    np.testing.assert_array_equal(estimate(z, q, estimator="rotation"), q)
    d = np.asarray(pull(z, q, g))
    np.testing.assert_allclose(d, [1.018761061947, -5.598230088496, -1.764070796460], atol=1e-10)
    wrong = matrix(z, q) @ np.asarray(g)
    np.testing.assert_allclose(wrong, [1.978761, -3.598230, 4.315929], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(d) / np.linalg.norm(g), 2.6, atol=1e-10)
    np.testing.assert_allclose([d @ np.asarray(z), np.asarray(q @ g)], [-4, -4], atol=1e-10)
    np.testing.assert_allclose([angle(q, g), angle(z, d)], 1.705491178055, atol=1e-10)
    np.testing.assert_allclose(angle(z, q), 0.740010411321, atol=1e-10)
    # The angle between the two gradients is not that between z and q.
    np.testing.assert_allclose(angle(g, d), 0.591204346916, atol=1e-10)


def test_check_2_antipodal():
    z, q, g = jnp.array([1.0, 2, 2]), jnp.array([-2.0, -4, -4]), jnp.asarray(G)
    np.testing.assert_array_equal(estimate(z, q, estimator="rotation"), q)
    expected = [2.888888888889, -2.222222222222, 2.777777777778]
    np.testing.assert_allclose(pull(z, q, g), expected, atol=1e-11)
    # Not exactly opposite in floating point; still a reflection that maps z to q.
    z = random(5, 7)
    for scale in (-0.3, -1.7, -np.pi):
        for row in z:
            r = matrix(row, scale * row, "rotation_unscaled")
            np.testing.assert_allclose(r @ unit(row), -unit(row), atol=1e-10)
            np.testing.assert_allclose(r @ r.T, np.eye(7), atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_check_3_the_three_forms_of_the_rotation(dim):
    for seed in range(3):
        z, q = np.asarray(random(2, dim, seed=seed))
        zh, qh = unit(z), unit(q)
        cos = zh @ qh
        r = np.zeros(dim) if 1 + cos < 1e-12 else unit(zh + qh)
        eye = np.eye(dim)
        forms = [
            eye - 2 * np.outer(r, r) + 2 * np.outer(qh, zh),
            (eye - 2 * np.outer(qh, qh)) @ (eye - 2 * np.outer(r, r)),
        ]
        if 1 + cos > 1e-12:
            forms.append(eye + 2 * np.outer(qh, zh) - np.outer(qh + zh, qh + zh) / (1 + cos))
        got = matrix(z, q, "rotation_unscaled")
        for form in forms:
            np.testing.assert_allclose(got, form, atol=1e-12)
        np.testing.assert_allclose(got.T @ got, eye, atol=1e-12)
        np.testing.assert_allclose(got @ zh, qh, atol=1e-12)
        if dim > 1:
            np.testing.assert_allclose(np.linalg.det(got), 1, atol=1e-12)
            np.testing.assert_allclose(np.trace(got), dim - 2 + 2 * cos, atol=1e-12)
        else:
            assert abs(got) == 1
        scale = np.linalg.norm(q) / np.linalg.norm(z)
        np.testing.assert_allclose(matrix(z, q), scale * got, rtol=1e-12, atol=1e-12)
        # z ∥ q: λI; z = q: I.
        np.testing.assert_allclose(matrix(z, 2.5 * z), 2.5 * eye, atol=1e-12)
        np.testing.assert_allclose(matrix(z, z), eye, atol=1e-12)


def test_reflection_and_straight_through():
    z, q = np.asarray(random(2, 5))
    s = unit(unit(z) - unit(q))
    expected = np.linalg.norm(q) / np.linalg.norm(z) * (np.eye(5) - 2 * np.outer(s, s))
    np.testing.assert_allclose(matrix(z, q, "reflection"), expected, atol=1e-12)
    np.testing.assert_allclose(matrix(z, 3 * z, "reflection"), 3 * np.eye(5), atol=1e-12)
    np.testing.assert_array_equal(matrix(z, q, "ste"), np.eye(5))
    np.testing.assert_array_equal(matrix(z, q, "none"), np.zeros((5, 5)))


def test_no_gradient_to_q_but_with_none():
    z, q = random(2, 4)
    for name in ESTIMATORS:
        got = jax.grad(lambda q, name=name: jnp.sum(estimate(z, q, estimator=name)))(q)
        np.testing.assert_array_equal(got, np.full(4, name == "none"))


def test_tends_to_straight_through_under_a_common_shift():
    expected = {0: 3.225, 1: 2.478, 10: 0.723, 100: 0.0858, 1000: 0.00873}
    for shift, value in expected.items():
        z, q = np.asarray(Z) + shift, np.asarray(Q) + shift
        got = np.linalg.norm(matrix(z, q) - np.eye(3))
        assert f"{got:.4g}" == f"{value:.4g}" or abs(got / value - 1) < 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_forward_is_q_bit_for_bit(estimator, dtype):
    z, q = random(64, 8, dtype=dtype), random(64, 8, seed=1, dtype=dtype)
    q = q.at[0, 0].set(-0.0)
    z = z.at[1].set(jnp.inf).at[2].set(jnp.nan)
    got = jax.jit(partial(estimate, estimator=estimator))(z, q)
    assert got.dtype == dtype
    assert np.asarray(got).tobytes() == np.asarray(q).tobytes()
    if dtype == jnp.float32:
        # What the sum z + (q - z) gets wrong in a third of all entries.
        assert np.mean(np.asarray(z[3:] + (q[3:] - z[3:])) != np.asarray(q[3:])) > 0.2


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("estimator", ["rotation", "rotation_unscaled", "reflection"])
def test_inner_product_and_norm_are_kept(estimator, dtype):
    z, q, g = (random(50, 16, seed=seed, dtype=dtype) for seed in range(3))
    d = pull(z, q, g, estimator)
    assert d.dtype == dtype
    z, q, g, d = (np.asarray(x, np.float64) for x in (z, q, g, d))
    size = lambda x: np.linalg.norm(x, axis=-1)
    scale = np.ones(50) if estimator == "rotation_unscaled" else size(q) / size(z)
    bound = tol(dtype, 16)
    np.testing.assert_allclose(size(d), scale * size(g), rtol=bound)
    cosines = (z * d).sum(-1) / (size(z) * size(d)), (q * g).sum(-1) / (size(q) * size(g))
    np.testing.assert_allclose(*cosines, atol=bound)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=4, max_size=4),
    st.lists(st.floats(-10, 10), min_size=4, max_size=4),
    st.sampled_from(MOVING),
)
def test_any_pair_has_a_finite_orthogonal_gradient(z, q, estimator):
    z, q = jnp.asarray(z), jnp.asarray(q)
    g = jnp.array([1.0, -2.0, 0.5, 3.0])
    d = np.asarray(pull(z, q, g, estimator))
    assert np.isfinite(d).all()
    usable = min(np.linalg.norm(z), np.linalg.norm(q)) > 1e-6 and estimator != "ste"
    scaled = usable and estimator != "rotation_unscaled"
    scale = np.linalg.norm(q) / np.linalg.norm(z) if scaled else 1.0
    np.testing.assert_allclose(np.linalg.norm(d), scale * np.linalg.norm(g), rtol=1e-9)
    if scaled:
        np.testing.assert_allclose(d @ z, g @ q, atol=1e-12)


@pytest.mark.parametrize("estimator", ["rotation", "reflection"])
def test_nearly_parallel_and_opposite_float32_vectors(estimator):
    """Where ẑ + q̂ (or ẑ - q̂) is a difference of nearly equal numbers."""
    z, noise, g = (random(200, 6, seed=seed, dtype=jnp.float32) for seed in range(3))
    size = lambda x: jnp.linalg.norm(x, axis=-1)

    @jax.jit
    def errors(gap):
        q = gap[0] * z + gap[1] * noise
        d = pull(z, q, g, estimator)
        inner = jnp.abs(jnp.sum(z * d, -1) - jnp.sum(q * g, -1)) / (size(q) * size(g))
        return jnp.max(inner), jnp.max(jnp.abs(size(d) * size(z) / (size(g) * size(q)) - 1))

    for gap in (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2):
        for sign in (-2, 2):
            assert max(errors(jnp.array([sign, gap], jnp.float32))) < tol(jnp.float32, 6)


@pytest.mark.parametrize("estimator", MOVING)
def test_without_a_direction_straight_through(estimator):
    g = jnp.asarray(G)
    some = jnp.asarray(Q)
    nowhere = [
        jnp.zeros(3),
        jnp.array([0.0, 1e-9, 0.0]),
        jnp.full(3, jnp.nan),
        jnp.full(3, jnp.inf),
    ]
    for bad in nowhere:
        for z, q in ((bad, some), (some, bad)):
            np.testing.assert_array_equal(pull(z, q, g, estimator), g)
            np.testing.assert_array_equal(estimate(z, q, estimator=estimator), q)
    # The bound is an option.
    tiny = jnp.array([0.0, 1e-9, 0.0])
    if estimator != "ste":
        assert np.abs(pull(tiny, some, g, estimator, eps=0.0) - g).max() > 0.1


def test_large_and_small_float32_vectors_do_not_overflow():
    z, q = jnp.array([3e25, 0, 4e25], jnp.float32), jnp.array([0, 5e25, 12e25], jnp.float32)
    expected = [1.018761061947, -5.598230088496, -1.764070796460]
    np.testing.assert_allclose(pull(z, q, jnp.asarray(G, jnp.float32)), expected, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["ste", "rotation", "reflection"])
def test_forward_mode_second_order_vmap_and_jit(estimator):
    z, q, v = random(3, 5)
    dense = matrix(z, q, estimator)
    f = partial(estimate, estimator=estimator)
    out, tangent = jax.jvp(lambda z: f(z, q), (z,), (v,))
    np.testing.assert_array_equal(out, q)
    np.testing.assert_allclose(tangent, dense @ v, atol=1e-12)

    # d²/dz² of L(z_q) is Gᵀ L'' G: G itself is a constant.
    loss = lambda z: jnp.sum(jnp.sin(f(z, q)))
    expected = dense.T @ np.diag(-np.sin(q)) @ dense
    np.testing.assert_allclose(jax.hessian(loss)(z), expected, atol=1e-12)
    np.testing.assert_allclose(jax.jacrev(jax.jacrev(loss))(z), expected, atol=1e-12)
    np.testing.assert_allclose(jax.jvp(jax.grad(loss), (z,), (v,))[1], expected @ v, atol=1e-12)

    zs, qs = random(2, 3, 5), random(2, 3, 5, seed=1)
    got = jax.jit(jax.vmap(jax.vmap(jax.grad(lambda z, q: jnp.sum(jnp.sin(f(z, q)))))))(zs, qs)
    together = jax.grad(lambda z: jnp.sum(jnp.sin(f(z, qs))))(zs)
    np.testing.assert_allclose(got, together, atol=1e-13)
    one = matrix(zs[1, 2], qs[1, 2], estimator).T @ np.cos(qs[1, 2])
    np.testing.assert_allclose(got[1, 2], one, atol=1e-12)


def test_backward_keeps_z_and_q_alone():
    """Two arrays of the vectors' size; unit vectors, r and so on are computed again."""
    z, q = random(512, 64, dtype=jnp.float32), random(512, 64, seed=1, dtype=jnp.float32)
    _, back = jax.vjp(lambda z: estimate(z, q, estimator="rotation"), z)
    assert sum(x.size for x in jax.tree.leaves(back) if hasattr(x, "size")) <= 2 * z.size + 8


def test_gumbel_softmax_draws_by_distance():
    codebook = jnp.array([[0.0, 0.0], [1.0, 0.5], [-1.0, 1.0]])
    z = jnp.broadcast_to(jnp.array([0.2, 0.3]), (20000, 2))
    for temperature in (1.0, 0.3):
        z_q, index = gumbel_softmax_code(jax.random.key(0), z, codebook, temperature=temperature)
        np.testing.assert_array_equal(z_q, codebook[index])
        distance = ((np.asarray(codebook) - np.asarray(z[0])) ** 2).sum(1)
        p = np.exp(-distance) / np.exp(-distance).sum()
        counts = np.bincount(np.asarray(index), minlength=3)
        assert stats.chisquare(counts, p * len(z)).pvalue > 1e-3


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_gumbel_softmax_has_the_gradient_of_the_mixture(metric):
    z, codebook = random(6, 3), random(5, 3, seed=1)
    key = jax.random.key(3)
    run = jax.jit(
        partial(gumbel_softmax_code, key, temperature=0.7, metric=metric), static_argnames="hard"
    )
    weights = random(6, 3, seed=2)
    grads = [
        jax.grad(lambda z, c, hard=hard: jnp.sum(weights * run(z, c, hard=hard)[0]), (0, 1))(
            z, codebook
        )
        for hard in (True, False)
    ]
    for hard, soft in zip(*grads, strict=True):
        np.testing.assert_allclose(hard, soft, atol=1e-13)
        assert np.abs(soft).max() > 1e-2
    noise = np.asarray(jax.random.gumbel(key, (6, 5), jnp.float64))
    normed = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    a, b = np.asarray(z), np.asarray(codebook)
    a, b = (normed(a), normed(b)) if metric == "cosine" else (a, b)
    logits = (-((a[:, None] - b[None]) ** 2).sum(-1) + noise) / 0.7
    p = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(
        run(z, codebook, hard=False)[0], p / p.sum(1, keepdims=True) @ b, atol=1e-12
    )


def test_gumbel_softmax_masks_and_nan():
    codebook = random(5, 3)
    z = random(4, 3, seed=1).at[1].set(jnp.nan).at[2].set(jnp.nan)
    mask = jnp.array([True, True, False, False])
    z_q, index = gumbel_softmax_code(jax.random.key(0), z, codebook, mask=mask)
    assert index[1:].tolist() == [5, 5, 5]
    assert int(index[0]) < 5
    assert np.isnan(z_q[1]).all()
    np.testing.assert_array_equal(z_q[2:], 0)
    weights = jnp.array([1.0, 0, 1, 1])[:, None]

    @jax.jit
    @jax.grad
    def gradient(z):
        z_q, _ = gumbel_softmax_code(jax.random.key(0), z, codebook, mask=mask)
        return jnp.sum(jnp.where(weights > 0, z_q, 0))

    got = gradient(z)
    assert np.isfinite(got[0]).all()
    np.testing.assert_array_equal(got[2:], 0)


def test_errors_name_the_argument():
    z = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"estimator must be one of .* Did you mean 'rotation'"):
        estimate(z, z, estimator="rotatoin")
    with pytest.raises(ValueError, match="q must have the shape"):
        estimate(z, jnp.ones(3))
    with pytest.raises(TypeError, match="q must have the dtype"):
        estimate(z, jnp.ones((2, 3), jnp.float32))
    with pytest.raises(TypeError, match="z must be an array of real"):
        estimate(jnp.ones((2, 3), int), jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match="eps must be at least 0"):
        estimate(z, z, eps=-1.0)
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        gumbel_softmax_code(jax.random.key(0), z, jnp.ones((4, 3)), temperature=0.0)
