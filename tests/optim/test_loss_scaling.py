"""Loss scaling: the automaton, exactness, and no bad step in any surroundings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxkit.optim import check_optimizer
from jaxkit.optim.loss_scaling import (
    all_finite,
    dynamic_loss_scale,
    loss_scale,
    loss_scale_state,
    scaled_value_and_grad,
    static_loss_scale,
)
from jaxkit.optim.precision import Policy

PARAMS = {"w": np.asarray([0.5, -1.0, 2.0], np.float32), "b": np.asarray(0.25, np.float32)}


def params():
    return jax.tree.map(jnp.asarray, PARAMS)


def grads(step, scale=1.0):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * scale, p.dtype), PARAMS)


def spoiled(tree, value):
    return {**tree, "w": tree["w"].at[1].set(value)}


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def run(optimizer, outcomes, scale=loss_scale):
    """Steps of finite and other gradients, compiled; the scale and `good` after each."""
    update = jax.jit(optimizer.update)
    p, state, seen = params(), optimizer.init(params()), []
    for step, fine in enumerate(outcomes):
        g = grads(step, float(scale(state)))
        updates, state = update(g if fine else spoiled(g, jnp.nan), state, p)
        p = optax.apply_updates(p, updates)
        seen.append((float(scale(state)), int(loss_scale_state(state).good)))
    return p, state, seen


def test_automaton():
    """Card, check 2."""
    optimizer = dynamic_loss_scale(optax.sgd(0.1), initial_scale=8.0, growth_interval=3)
    outcomes = [1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    _, state, seen = run(optimizer, outcomes)
    assert [s for s, _ in seen] == [8, 8, 16, 8, 8, 8, 4, 2, 2, 2, 4, 4, 4, 8]
    assert [g for _, g in seen] == [1, 2, 0, 0, 1, 2, 0, 0, 1, 2, 0, 1, 2, 0]
    inner = loss_scale_state(state)
    assert (int(inner.skipped_total), int(inner.skipped_run)) == (3, 0)


def test_limits_and_the_flag_for_a_loop_to_raise_on():
    optimizer = dynamic_loss_scale(
        optax.sgd(0.1),
        initial_scale=4.0,
        min_scale=2.0,
        max_scale=8.0,
        growth_interval=1,
        max_skipped_run=3,
    )
    _, state, seen = run(optimizer, [0, 0])
    assert [s for s, _ in seen] == [2, 2]
    assert not state.stalled
    _, state, _ = run(optimizer, [0, 0, 0])
    assert (bool(state.stalled), int(state.skipped_run)) == (True, 3)
    _, state, seen = run(optimizer, [0, 0, 0, 1, 1, 1, 1])
    assert [s for s, _ in seen][3:] == [4, 8, 8, 8]
    assert not state.stalled
    same(optimizer.init(params())._asdict(), jax.jit(optimizer.init)(params())._asdict())


def test_finite_steps_are_those_of_the_optimizer_alone_bit_for_bit():
    """Card, check 3: a power of two scales and unscales exactly."""
    scaled = dynamic_loss_scale(optax.adamw(1e-2), initial_scale=2.0**10, growth_interval=3)
    plain = optax.adamw(1e-2)
    with jax.numpy_dtype_promotion("standard"):
        p, state, _ = run(scaled, [1] * 7)
        q, alone = params(), plain.init(params())
        update = jax.jit(plain.update)
        for step in range(7):
            updates, alone = update(grads(step), alone, q)
            q = optax.apply_updates(q, updates)
    same(p, q)
    same(state.inner_state, alone)
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    assert np.array_equal(x * np.float32(2.0**15) / np.float32(2.0**15), x)
    changed = np.mean(x * np.float32(1000) * np.float32(1 / 1000) != x)
    assert 0.4 < changed < 0.7  # the card's 56.5 % for a power of ten


def test_adam_on_a_scaled_loss_is_adam_with_a_smaller_epsilon():
    """Card, check 4."""

    def final(scale, eps):
        optimizer = static_loss_scale(optax.adam(1e-2, eps=eps), scale, unscale=False)
        p = {"w": jnp.zeros(64)}
        state, update = optimizer.init(p), jax.jit(optimizer.update)
        for step in range(50):
            g = 1e-7 * scale * np.random.default_rng(step).normal(size=64)
            updates, state = update({"w": jnp.asarray(g)}, state, p)
            p = optax.apply_updates(p, updates)
        return np.asarray(p["w"])

    with jax.numpy_dtype_promotion("standard"):
        large, small, neither = final(1000.0, 1e-7), final(1.0, 1e-10), final(1.0, 1e-7)
    assert np.abs(large - small).max() < 1e-12
    assert np.abs(neither - small).max() > 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_step_changes_nothing_but_the_scale(bad):
    """Card, checks 5 and 8: zeros always, where `apply_if_finite` gives up in the end."""
    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    optimizer = dynamic_loss_scale(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    )
    gives_up = optax.apply_if_finite(optax.sgd(1e-2), 2)
    update = jax.jit(optimizer.update)
    with jax.numpy_dtype_promotion("standard"):
        state, theirs = optimizer.init(params()), gives_up.init(params())
        _, state = update(grads(0), state, params())
        before = state.inner_state
        applied = []
        for _ in range(3):
            updates, state = update(spoiled(grads(1), bad), state, params())
            same(updates, jax.tree.map(jnp.zeros_like, params()))
            same(state.inner_state, before)
            updates, theirs = gives_up.update(spoiled(grads(1), bad), theirs, params())
            applied.append(bool(all_finite(updates)))
    assert applied == [True, True, False]
    assert int(state.skipped_total) == 3


def test_other_rules_for_bad_steps():
    g = spoiled(grads(0), jnp.inf)
    shrinking = dynamic_loss_scale(optax.sgd(1.0, 0.9), on_non_finite="shrink", shrink=0.75)
    state = shrinking.init(params())
    updates, after = shrinking.update(g, state, params())
    same(updates, jax.tree.map(lambda p: -0.25 * p, params()))
    same(after.inner_state, state.inner_state)
    with pytest.raises(ValueError, match="params must be given"):
        shrinking.update(g, state)
    partly = dynamic_loss_scale(optax.sgd(1.0), on_non_finite="zero_leaves", initial_scale=2.0)
    updates, after = partly.update(g, partly.init(params()), params())
    same(updates["w"], np.zeros(3))
    same(updates["b"], -g["b"] / 2)
    assert (float(after.scale), int(after.skipped_total)) == (1.0, 1)


def test_half_parameters_are_updated_from_float32_gradients():
    half = jax.tree.map(lambda p: p.astype(jnp.float16), params())
    optimizer = dynamic_loss_scale(optax.sgd(1.0, momentum=0.9), initial_scale=2.0**14)
    state = optimizer.init(half)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.inner_state))
    # 3e-8 is 0 in float16; scaled it is not, and the momentum keeps it.
    tiny = jax.tree.map(lambda p: jnp.full(p.shape, 3e-8 * 2**14, jnp.float16), PARAMS)
    updates, state = optimizer.update(tiny, state, half)
    trace = optax.tree.get(state.inner_state, "trace")
    np.testing.assert_allclose(trace["w"], 3e-8, rtol=1e-3)
    assert updates["w"].dtype == jnp.float16


@pytest.mark.parametrize(
    ("rule", "checks"),
    [
        ("skip", None),
        # The rules below differ from it in a bad step alone.
        ("void_window", ["compiles_once", "multi_steps", "non_finite_gradients"]),
        ("shrink", ["compiles_once", "non_finite_gradients", "updates_fit"]),
        ("zero_leaves", ["compiles_once", "non_finite_gradients", "vmap"]),
    ],
)
def test_contract(rule, checks):
    make = lambda rate: dynamic_loss_scale(optax.lion(rate), initial_scale=4.0, on_non_finite=rule)
    check_optimizer(make, stays_finite=True, checks=checks)


@pytest.mark.parametrize(
    ("rule", "moves"), [("skip", [0, 0, 1, 0, 1]), ("void_window", [0, 0, 0, 1, 0])]
)
def test_accumulation_drops_the_micro_batch_or_the_window(rule, moves):
    accumulated = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    optimizer = dynamic_loss_scale(accumulated, initial_scale=4.0, on_non_finite=rule)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        update = jax.jit(optimizer.update)
        p, state = params(), optimizer.init(params())
        for step, (fine, moved) in enumerate(zip((1, 0, 1, 1, 1), moves, strict=True)):
            scale = loss_scale(state)
            assert float(scale) == (4.0 if step < 2 else 2.0)
            g = jax.tree.map(lambda x, s=scale: jnp.ones_like(x) * s, p)
            updates, state = update(g if fine else spoiled(g, jnp.nan), state, p)
            same(updates, jax.tree.map(lambda x, m=moved: jnp.full_like(x, -m), p))


def test_outside_accumulation_nothing_bad_is_applied_either():
    optimizer = optax.MultiSteps(dynamic_loss_scale(optax.sgd(1.0)), 2).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        update, state = jax.jit(optimizer.update), optimizer.init(params())
        for fine in (1, 0, 1, 1):
            g = grads(0)
            updates, state = update(g if fine else spoiled(g, jnp.nan), state, params())
            same(updates, jax.tree.map(jnp.zeros_like, params()))


def test_all_devices_skip_together():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    optimizer = dynamic_loss_scale(optax.sgd(1.0, 0.9), axis_name="data", initial_scale=4.0)

    def step(g):
        p = {"w": jnp.zeros((), jnp.float32)}
        updates, state = optimizer.update({"w": g[0]}, optimizer.init(p), p)
        return updates["w"][None], state.scale

    sharded = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=(PartitionSpec("data"), PartitionSpec()),
        )
    )
    g = jnp.arange(1.0, 9.0, dtype=jnp.float32)
    updates, scale = sharded(g)
    np.testing.assert_array_equal(updates, -g / 4)
    updates, scale = sharded(g.at[5].set(jnp.nan))
    np.testing.assert_array_equal(updates, np.zeros(8))
    assert float(scale) == 2.0


def test_vmapped_models_skip_alone():
    optimizer = dynamic_loss_scale(optax.sgd(1.0), initial_scale=2.0)
    both = jax.tree.map(lambda p: jnp.stack([p, p]), params())
    state = jax.vmap(optimizer.init)(both)
    g = jax.tree.map(jnp.ones_like, both)
    g = {**g, "b": g["b"].at[0].set(jnp.nan)}
    updates, state = jax.vmap(optimizer.update)(g, state, both)
    np.testing.assert_array_equal(updates["w"], [[0] * 3, [-0.5] * 3])
    np.testing.assert_array_equal(state.scale, [1.0, 2.0])


def test_half_loss_with_a_scale_that_float16_cannot_hold():
    """Card, check 6: where the peers start with NaN, the loss's type is an error."""
    square = lambda p: p**2
    with pytest.raises(TypeError, match=r"loss in float32 or float64.* got float16"):
        scaled_value_and_grad(square)(65536.0, jnp.asarray(1.0, jnp.float16))
    policy = Policy.parse("params=float32,compute=float16")
    loss = lambda p: jnp.asarray(p, jnp.float32) ** 2
    value, gradient, finite = scaled_value_and_grad(loss, policy=policy)(
        jnp.asarray(2.0**14), jnp.asarray(1.0, jnp.float32)
    )
    assert (float(value), float(gradient), bool(finite)) == (1.0, 2.0**15, True)
    *_, finite = scaled_value_and_grad(loss, policy=policy)(
        jnp.asarray(2.0**15), jnp.asarray(1.0, jnp.float32)
    )
    assert not finite  # 2^16 on the way back, which float16 does not hold
    with pytest.raises(ValueError, match="scalar loss; got shape"):
        scaled_value_and_grad(lambda p: jnp.ones(3) * p)(1.0, jnp.asarray(1.0))


def test_aux_and_arguments_are_cast():
    def loss(p, batch):
        return jnp.mean((p * batch["x"]).astype(jnp.float32)), (p.dtype, batch["x"].dtype)

    policy = Policy.parse("float16-mixed")
    (value, dtypes), gradient, _ = scaled_value_and_grad(loss, policy=policy, has_aux=True)(
        4.0, jnp.asarray(2.0, jnp.float32), {"x": jnp.ones(3, jnp.float32), "id": jnp.arange(3)}
    )
    assert dtypes == (jnp.float16, jnp.float16)
    assert (float(value), float(gradient), gradient.dtype) == (2.0, 4.0, jnp.float32)


def test_a_scan_of_training_steps_recovers_from_an_overflow():
    optimizer = dynamic_loss_scale(optax.sgd(0.1), initial_scale=2.0**20, growth_interval=4)
    policy = Policy.parse("float16-mixed")
    loss = lambda p, x: jnp.mean(((p["w"] - x).astype(jnp.float32)) ** 2)

    def body(carry, x):
        p, state = carry
        value, g, _ = scaled_value_and_grad(loss, policy=policy)(loss_scale(state), p, x)
        updates, state = optimizer.update(g, state, p)
        return (optax.apply_updates(p, updates), state), value

    start = {"w": jnp.asarray([4.0, -4.0], jnp.float32)}
    (_, state), values = jax.jit(
        lambda: jax.lax.scan(body, (start, optimizer.init(start)), jnp.ones((40, 2), jnp.float32))
    )()
    assert int(state.skipped_total) > 3
    assert np.isfinite(values).all()
    assert float(values[-1]) < 0.05 * float(values[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_scale": 0.0}, "initial_scale must be greater than 0"),
        ({"min_scale": -1.0}, "min_scale must be greater than 0"),
        ({"max_scale": float("inf")}, "max_scale must be"),
        ({"initial_scale": 1.0, "min_scale": 2.0}, "initial_scale must lie between"),
        ({"growth": 1.0}, "growth must be greater than 1"),
        ({"backoff": 1.0}, "backoff must be less than 1"),
        ({"backoff": 0.0}, "backoff must be greater than 0"),
        ({"growth_interval": 0}, "growth_interval must be at least 1"),
        ({"max_skipped_run": 0}, "max_skipped_run must be at least 1"),
        ({"on_non_finite": "ignore"}, "on_non_finite must be one of"),
        ({"shrink": 1.5}, "shrink must be"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        dynamic_loss_scale(optax.sgd(0.1), **options)


def test_state_is_found_once():
    with pytest.raises(ValueError, match="one LossScaleState; it holds 0"):
        loss_scale(optax.sgd(0.1).init(params()))
    with pytest.raises(ValueError, match="scale must be greater than 0"):
        static_loss_scale(optax.sgd(0.1), 0.0)
