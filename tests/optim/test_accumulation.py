"""Accumulation in the moments against accumulation in a buffer, and by hand in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit.optim import (
    accumulated_adam,
    accumulated_sgd,
    at_window_ends,
    micro_step_beta,
    scale_by_accumulated_adam,
    scale_by_accumulated_momentum,
)
from tests.tolerance import tol


def run(optimizer, gradients, params):
    """Every update, by a scan over stacked gradients; optax's own parts promote."""

    def step(carry, grads):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    with jax.numpy_dtype_promotion("standard"):
        (_, state), updates = jax.lax.scan(step, (params, optimizer.init(params)), gradients)
    return updates, state


def gradients(steps, dtype=np.float64):
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=(steps, 3, 2)).astype(dtype), "b": rng.normal(size=steps)}


PARAMS = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(())}


@pytest.mark.parametrize("k", [1, 3])
def test_momentum_equals_an_accumulator_of_its_own(k):
    grads = gradients(4 * k)
    ours, state = run(accumulated_sgd(0.1, 0.9, k), grads, PARAMS)
    inner = optax.chain(optax.ema(0.9, debias=False), optax.sgd(0.1))
    wrapped, buffers = run(optax.MultiSteps(inner, k).gradient_transformation(), grads, PARAMS)
    for name in PARAMS:
        expected, average = np.zeros_like(grads[name]), 0.0
        for end in range(k - 1, 4 * k, k):
            average = 0.9 * average + 0.1 * grads[name][end - k + 1 : end + 1].mean(axis=0)
            expected[end] = -0.1 * average
        np.testing.assert_allclose(ours[name], expected, rtol=tol("float64", 4 * k), atol=1e-16)
        # MultiSteps divides by the number of micro-steps in float32.
        np.testing.assert_allclose(ours[name], wrapped[name], rtol=tol("float32", k), atol=1e-9)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if x.size > 1)
    assert (size(state), size(buffers)) == (6, 12)


def adam_by_hand(grads, k, b1, b2, eps):
    m, v, updates = np.zeros_like(grads[0]), np.zeros_like(grads[0]), []
    for t, g in enumerate(grads, start=1):
        begins, ends = (t - 1) % k == 0, t % k == 0
        m = (b1 if begins else 1) * m + (1 - b1) / k * g
        v = (b2 if begins else 1) * v + (1 - b2) / k * g**2
        n = t / k
        u = m / (1 - b1**n) / (np.sqrt(v / (1 - b2**n)) + eps)
        updates.append(-0.1 * u if ends else 0 * u)
    return np.stack(updates)


@pytest.mark.parametrize("k", [1, 3])
def test_adam_is_the_recursion_by_hand(k):
    grads = gradients(4 * k)
    ours, _ = run(accumulated_adam(0.1, 0.8, 0.95, 1e-6, k), grads, PARAMS)
    for name in PARAMS:
        expected = adam_by_hand(grads[name], k, 0.8, 0.95, 1e-6)
        np.testing.assert_allclose(ours[name], expected, rtol=tol("float64", 4 * k))


def test_adam_without_accumulation_is_adam():
    grads = gradients(5)
    ours, _ = run(accumulated_adam(0.1), grads, PARAMS)
    theirs, _ = run(optax.adam(0.1), grads, PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tol("float64", 5))


def test_adam_overestimates_by_the_variance_within_a_window():
    k, windows = 4, 3
    grads = np.random.default_rng(1).normal(0.5, 1.0, size=(windows, k, 7))
    optimizer = accumulated_adam(0.1, b2=0.9, accumulation_steps=k)
    _, state = run(optimizer, grads.reshape(-1, 7), jnp.zeros(7))
    excess, squares = np.zeros(7), np.zeros(7)
    for window in grads:
        excess = 0.9 * excess + 0.1 * window.var(axis=0)
        squares = 0.9 * squares + 0.1 * window.mean(axis=0) ** 2
    nu = jax.tree.leaves(state[0].nu)[0]
    np.testing.assert_allclose(nu, squares + excess, rtol=tol("float64", k * windows))
    # Independent gradients: the variance within windows is (1 - 1/k) of the variance.
    many = np.random.default_rng(2).normal(0.5, 1.0, size=(20_000, k))
    gap = (many**2).mean() - (many.mean(axis=1) ** 2).mean()
    assert abs(gap - (1 - 1 / k)) < 0.02


def test_beta_of_a_micro_step():
    assert round(micro_step_beta(0.9, 4) ** 4, 10) == 0.9036878906
    assert micro_step_beta(0.965, 1) == pytest.approx(0.965, abs=1e-16)


def test_rate_at_the_ends_of_windows():
    rates = [float(at_window_ends(lambda count: 1.0 + count, 3)(t)) for t in range(6)]
    assert rates == [0, 0, 3, 0, 0, 6]
    assert [float(at_window_ends(0.5, 2)(jnp.asarray(t))) for t in range(4)] == [0, 0.5, 0, 0.5]


def test_lion_accumulates_by_a_longer_memory():
    """Micro-steps of one gradient each at β̃, against one step of their mean at β."""
    k, beta = 4, 0.9
    slow = micro_step_beta(beta, k)
    grads = jnp.repeat(jnp.asarray(gradients(6)["a"]), k, axis=0)
    ours, _ = run(optax.lion(at_window_ends(0.1, k), b1=slow, b2=slow), grads, PARAMS["a"])
    single, _ = run(optax.lion(0.1, b1=beta, b2=beta), grads[::k], PARAMS["a"])
    assert not np.any(np.asarray(ours).reshape(6, k, 3, 2)[:, :-1])
    np.testing.assert_array_equal(np.sign(ours[k - 1 :: k][:1]), np.sign(single[:1]))
    agree = np.mean(np.sign(ours[k - 1 :: k]) == np.sign(single))
    assert agree > 0.9


@pytest.mark.x32
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moments_are_wider_than_half_types(dtype):
    for optimizer in (scale_by_accumulated_momentum(0.9, 2), scale_by_accumulated_adam()):
        params = jnp.zeros(3, dtype)
        state = optimizer.init(params)
        grads = jnp.full(3, 1e-4, dtype)  # its square is 0 in float16
        for _ in range(2):
            update, state = optimizer.update(grads, state, params)
        assert update.dtype == dtype
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.mu, state.nu)))
    np.testing.assert_allclose(np.asarray(update, np.float32), 1.0, rtol=1e-3)


def test_updates_of_a_window_have_finite_gradients():
    """Before the first window ends nothing is divided by zero, where no update would show it."""
    optimizer = scale_by_accumulated_adam(accumulation_steps=2)

    def last(g):
        state = optimizer.init(g)
        first, state = optimizer.update(g, state)
        second, _ = optimizer.update(2 * g, state)
        return jnp.sum(first + second)

    # m̂ = 1.5 g, v̂ = 2.5 g²: the update does not depend on the size of g.
    np.testing.assert_allclose(jax.grad(last)(jnp.asarray([0.5, -2.0])), 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accumulated_sgd(0.1, 1.0), "beta must be at least 0 and less than 1"),
        (lambda: accumulated_sgd(0.1, -0.1), "beta must be at least 0"),
        (lambda: accumulated_sgd(0.1, 0.9, 0), "accumulation_steps must be an integer"),
        (lambda: accumulated_adam(0.1, b2=1.0), "b2 must be"),
        (lambda: accumulated_adam(0.1, eps=-1.0), "eps must be at least 0"),
        (lambda: accumulated_adam(0.1, accumulation_steps=1.5), "accumulation_steps must be"),
        (lambda: micro_step_beta(1.0, 2), "beta must be"),
        (lambda: at_window_ends(0.1, True), "accumulation_steps must be"),
        (lambda: accumulated_sgd(0.1).init({"ids": jnp.arange(3)}), "params must have real"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
