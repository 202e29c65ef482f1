"""Weights from the values of losses: the card's digits, their potentials, their dynamics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit.optim import multitask as mt

L = jnp.array([0.5, 2.0, 8.0])


@pytest.mark.parametrize(
    ("gamma", "value"),
    [(-2.0, 0.8386279), (0.0, 2.0), (1.0, 3.5), (3.0, 5.5760778), (np.inf, 8), (-np.inf, 0.5)],
)
def test_power_means(gamma, value):
    assert float(mt.power_mean(L, gamma=gamma)) == pytest.approx(value, abs=1e-7)
    w = mt.power_mean_weights(L, gamma=gamma)
    # Euler's theorem, and the gradient of the mean.
    assert float(w @ L) == pytest.approx(float(mt.power_mean(L, gamma=gamma)), abs=1e-13)
    slope = jax.grad(lambda x: mt.power_mean(x, gamma=gamma))(L)
    np.testing.assert_allclose(w, slope, atol=1e-13)


@pytest.mark.x32
@pytest.mark.parametrize("gamma", [1e-6, -1e-3, 0.05, 0.11])
def test_power_means_near_the_geometric_one(gamma):
    """A small γ must not divide rounding."""
    values = np.array([1e-3, 0.5, 2, 900])
    want = np.exp(np.mean(np.log(values)))
    want *= np.mean((values / want) ** gamma) ** (1 / gamma)
    got = mt.power_mean(jnp.asarray(values, jnp.float32), gamma=gamma)
    assert float(got) == pytest.approx(want, rel=3e-6)


@pytest.mark.x32
def test_losses_over_scales_are_summed_in_single_precision():
    values, s = np.array([0.51, 2.03, 8.1]), np.array([0.3, -0.7, 1.9])
    for dtype in (jnp.bfloat16, jnp.float16):
        losses, scales = jnp.asarray(values, dtype), jnp.asarray(s, dtype)
        x, y = np.asarray(losses, np.float64), np.asarray(scales, np.float64)
        for loss, want in (
            (mt.uncertainty_loss, np.sum(x * np.exp(-y) / 2 + y / 2)),
            (mt.imtl_l_loss, np.sum(np.exp(y) * x - y)),
        ):
            got = loss(losses, scales)
            assert got.dtype == dtype
            assert got == jnp.asarray(want, dtype)


def test_real_time_is_the_gradient_of_the_sum_of_logarithms():
    np.testing.assert_allclose(mt.real_time(L), jax.grad(lambda x: jnp.sum(jnp.log(x)))(L))
    np.testing.assert_allclose(mt.inverse_reference(L, reference=L), mt.real_time(L))
    np.testing.assert_allclose(mt.equal(L), np.ones(3) / 3)


def test_no_gradient_passes_through():
    slope = jax.grad(lambda x: jnp.sum(mt.real_time(x) * x))(L)
    np.testing.assert_allclose(slope, 1 / L)


def test_uncertainty_at_its_optimum_is_real_time_weighting():
    s = jnp.log(L)
    value, slope = jax.value_and_grad(mt.uncertainty_loss, argnums=1)(L, s)
    np.testing.assert_allclose(slope, 0, atol=1e-15)
    assert float(value) == pytest.approx(float(jnp.sum(1 + jnp.log(L)) / 2))
    np.testing.assert_allclose(jax.grad(mt.uncertainty_loss)(L, s), 1 / (2 * L))
    classes = jax.grad(mt.uncertainty_loss, argnums=1)
    np.testing.assert_allclose(classes(L, jnp.log(2 * L), kind="classification"), 0, atol=1e-15)


@pytest.mark.parametrize(
    ("rule", "loss", "sign"),
    [
        (mt.uncertainty, mt.uncertainty_loss, 1),
        (mt.imtl_l, mt.imtl_l_loss, -1),
    ],
)
def test_learned_scales_follow_their_loss(rule, loss, sign):
    state = mt.LogScaleState(jnp.array([0.1, -0.3, 0.2]))
    w, new = rule(L, state, learning_rate=0.1)
    step = jax.grad(loss, argnums=1)(L, state.s)
    np.testing.assert_allclose(new.s, state.s - 0.1 * step, atol=1e-14)
    np.testing.assert_allclose(w, jax.grad(loss)(L, state.s), atol=1e-14)

    def body(state, _):
        _, state = rule(L, state, learning_rate=0.1)
        return state, None

    state, _ = jax.lax.scan(body, mt.log_scale_init(3), length=800)
    np.testing.assert_allclose(state.s, sign * jnp.log(L), atol=1e-6)


def test_dwa():
    history = np.array([[4.0, 1, 2], [2, 1, 1], [1, 1, 3], [5, 5, 5]])
    state = mt.dwa_init(3)
    for t, losses in enumerate(history):
        w, state = mt.dwa(jnp.asarray(losses), state)
        if t < 2:
            assert w.tolist() == [1, 1, 1]
        else:
            e = np.exp(history[t - 1] / history[t - 2] / 2)
            np.testing.assert_allclose(w, 3 * e / e.sum(), atol=1e-14)


def test_famo_follows_the_authors_step():
    """Weights p/(L c); z by Adam on the softmax's vector-Jacobian product with the log falls."""
    history = np.array([[4.0, 1, 2], [2, 0.9, 1.8], [1.5, 0.9, 1.7]])
    adam = optax.adam(0.025)
    z = jnp.zeros(3)
    inner, state = adam.init(z), mt.famo_init(3)
    for t, losses in enumerate(history):
        w, state = mt.famo(jnp.asarray(losses), state)
        if t:
            _, pull = jax.vjp(jax.nn.softmax, z)
            change = jnp.asarray(np.log(history[t - 1]) - np.log(losses))
            with jax.numpy_dtype_promotion("standard"):  # optax has 0.9 to an integer's power
                updates, inner = adam.update(pull(change)[0] + 0.01 * z, inner)
            z = z + updates
        p = np.asarray(jax.nn.softmax(z)) / losses
        np.testing.assert_allclose(w, p / p.sum(), atol=1e-12)
    # The task that fell most has the least probability.
    assert int(jnp.argmin(state.z)) == 0


def test_gradnorm_evens_out_lengths():
    G = jnp.diag(jnp.array([1.0, 9, 100]))
    step = jax.jit(lambda s: mt.gradnorm(G, s, losses=jnp.ones(3), learning_rate=1e-3)[1])
    state = mt.gradnorm_init(3)
    for _ in range(2000):
        state = step(state)
    w = np.asarray(state.weights)
    assert w.sum() == pytest.approx(3)
    lengths = w * np.array([1, 3, 10])
    assert lengths.max() / lengths.min() < 1.15
    # A task that has fallen less than the others gets more.
    _, after = mt.gradnorm(
        jnp.eye(3), mt.GradNormState(jnp.ones(3), jnp.ones(3), jnp.asarray(5)), losses=L
    )
    assert after.weights[2] > after.weights[0]


def test_gradnorm_step_with_its_defaults():
    """The first task is above its target for α = 1.5, and below it for α = 1."""
    r, losses = np.array([0.42, 1.29, 1.29]), np.array([0.5, 1, 1.5])
    state = mt.GradNormState(jnp.ones(3), jnp.ones(3), jnp.asarray(1))
    _, after = mt.gradnorm(jnp.diag(jnp.asarray(r**2)), state, losses=jnp.asarray(losses))
    w = 1 - 0.025 * np.sign(r - r.mean() * losses**1.5) * r
    np.testing.assert_allclose(after.weights, 3 * w / w.sum(), atol=1e-14)


def test_random_weights():
    keys = jax.random.split(jax.random.key(0), 2000)
    w = jax.vmap(lambda key: mt.random_weights(L, key=key))(keys)
    np.testing.assert_allclose(jnp.sum(w, axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(jnp.mean(w, axis=0), 1 / 3, atol=0.02)


@pytest.mark.x32
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    losses = L.astype(dtype)
    for name in ("real_time", "equal", "power_mean_weights"):
        options = {"gamma": 2.0} if name == "power_mean_weights" else {}
        assert getattr(mt, name)(losses, **options).dtype == dtype
    for rule, init in ((mt.dwa, mt.dwa_init), (mt.famo, mt.famo_init)):
        w, state = jax.jit(rule)(losses, init(3))
        assert w.dtype == dtype
        assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, init(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mt.real_time(jnp.array([1.0, 0.0])), "losses must be positive"),
        (lambda: mt.real_time(jnp.array(1.0)), "vector of at least 2 losses"),
        (lambda: mt.real_time(jnp.ones(1)), "vector of at least 2 losses"),
        (lambda: mt.power_mean(jnp.array([1.0, -1]), gamma=0.0), "losses must be positive"),
        (lambda: mt.power_mean(L, gamma=np.nan), "gamma must be a static number"),
        (lambda: mt.inverse_reference(L, reference=[1.0]), "reference must have shape"),
        (lambda: mt.inverse_reference(L, reference=[1.0, 0, 1]), "reference must be positive"),
        (lambda: mt.uncertainty_loss(L, jnp.zeros(2)), "s must have shape"),
        (lambda: mt.uncertainty_loss(L, L, kind="poisson"), "kind must be one of"),
        (lambda: mt.dwa(L, mt.dwa_init(3), temperature=0.0), "temperature must be"),
        (lambda: mt.dwa(L, mt.dwa_init(2)), "state.last must have shape"),
        (lambda: mt.famo(L, mt.famo_init(3), lower=[0.0, 3, 0]), "less lower must be positive"),
        (
            lambda: mt.gradnorm(jnp.eye(3), mt.gradnorm_init(3), losses=-L),
            "losses must be positive",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
