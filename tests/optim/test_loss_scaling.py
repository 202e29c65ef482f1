"""Loss scaling: the automaton, exactness, and no bad step in any surroundings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkit.optim import check_optimizer, tiger
from jaxkit.optim.loss_scaling import (
    all_finite,
    dynamic_loss_scale,
    loss_scale,
    loss_scale_state,
    scale_cotangent,
    scaled_value_and_grad,
    static_loss_scale,
)
from jaxkit.optim.precision import Policy
from tests.settings import users_settings

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
    assert abs(changed - 0.565) < 0.01  # the card's 56.5 % for a power of ten


def test_adam_on_a_scaled_loss_is_adam_with_a_smaller_epsilon():
    """Card, check 4."""

    gradients = 1e-7 * np.random.default_rng(0).normal(size=(50, 64))

    @jax.jit
    def final(scale, eps):
        optimizer = static_loss_scale(optax.adam(1e-2, eps=eps), scale, unscale=False)

        def step(carry, g):
            updates, state = optimizer.update(g * scale, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        p = jnp.zeros(64)
        return jax.lax.scan(step, (p, optimizer.init(p)), gradients)[0][0]

    with jax.numpy_dtype_promotion("standard"):
        large, small, neither = final(1000.0, 1e-7), final(1.0, 1e-10), final(1.0, 1e-7)
    assert np.abs(large - small).max() < 1e-12
    assert np.abs(neither - small).max() > 1e-3


def test_a_bad_step_changes_nothing_but_the_scale():
    """Card, checks 5 and 8: zeros always, where `apply_if_finite` gives up in the end."""
    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    optimizer = dynamic_loss_scale(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    )
    gives_up = optax.apply_if_finite(optax.sgd(1e-2), 2)
    update, their_update = jax.jit(optimizer.update), jax.jit(gives_up.update)
    with jax.numpy_dtype_promotion("standard"):
        _, state = update(grads(0), jax.jit(optimizer.init)(params()), params())
        before = state.inner_state
        for bad in (np.nan, np.inf, -np.inf):
            theirs, applied = gives_up.init(params()), []
            for _ in range(3):
                updates, state = update(spoiled(grads(1), bad), state, params())
                same(updates, jax.tree.map(np.zeros_like, PARAMS))
                same(state.inner_state, before)
                updates, theirs = their_update(spoiled(grads(1), bad), theirs, params())
                applied.append(bool(all_finite(updates)))
            assert applied == [True, True, False]
    assert int(state.skipped_total) == 9
    assert float(state.scale) == 2.0 ** (15 - 9)


@pytest.mark.parametrize("rule", ["skip", "zero_leaves"])
def test_an_update_that_is_not_finite_is_not_applied_either(rule):
    """Of finite gradients: 0/0 without an epsilon, and a step that float16 does not hold."""
    ratio = optax.stateless(lambda g, _: jax.tree.map(lambda x: x / jnp.abs(x), g))
    half = {"w": jnp.ones(2, jnp.float16), "b": jnp.ones((), jnp.float32)}
    optimizer = dynamic_loss_scale(
        optax.chain(optax.trace(0.5), ratio, optax.scale(7e4)),
        initial_scale=4.0,
        on_non_finite=rule,
    )
    update, state = jax.jit(optimizer.update), optimizer.init(half)
    for g in ({"w": [1.0, 2.0], "b": 1.0}, {"w": [0.0, 0.0], "b": 0.0}):
        g = jax.tree.map(lambda p, x: jnp.asarray(x, p.dtype), half, g)
        updates, after = update(g, state, half)
        same(updates, jax.tree.map(jnp.zeros_like, half))
        same(after.inner_state, state.inner_state)
        assert (float(after.scale), int(after.skipped_run)) == (2.0, 1)
        assert int(after.skipped_total) == 1


def test_other_rules_for_bad_steps():
    g = spoiled(grads(0), jnp.inf)
    shrinking = dynamic_loss_scale(optax.sgd(1.0, 0.9), on_non_finite="shrink", shrink=0.75)
    state = shrinking.init(params())
    updates, after = jax.jit(shrinking.update)(g, state, params())
    same(updates, jax.tree.map(lambda p: np.float32(-0.25) * p, PARAMS))
    same(after.inner_state, state.inner_state)
    assert float(after.scale) == 2.0**14
    with pytest.raises(ValueError, match="params must be given"):
        shrinking.update(g, state)
    partly = dynamic_loss_scale(optax.sgd(1.0), on_non_finite="zero_leaves", initial_scale=2.0)
    updates, after = jax.jit(partly.update)(g, partly.init(params()), params())
    same(updates["w"], np.zeros(3))
    same(updates["b"], -g["b"] / 2)
    assert (float(after.scale), int(after.skipped_total)) == (1.0, 1)


def test_half_parameters_are_updated_from_float32_gradients():
    half = jax.tree.map(lambda p: p.astype(jnp.float16), params())
    optimizer = dynamic_loss_scale(optax.sgd(1.0, momentum=0.9), initial_scale=2.0**14)
    state = optimizer.init(half)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.inner_state))
    assert optimizer.init({"w": jnp.ones(2, jnp.bfloat16)}).scale.dtype == jnp.float32
    # 3e-8 is 0 in float16; scaled it is not, and the momentum keeps it.
    tiny = jax.tree.map(lambda p: jnp.full(p.shape, 3e-8 * 2**14, jnp.float16), PARAMS)
    updates, state = jax.jit(optimizer.update)(tiny, state, half)
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


# Surroundings: scans, accumulation, devices, checkpoints. What is injected in each step, and where:
# in nothing (0), in one number of the matrix (1), in the scalar (2).

BAD_VALUE = np.asarray([0, 0, np.nan, 0, 0, 0, np.inf, -np.inf, 0, 0, 0, 0, np.nan, 0], np.float32)
BAD_LEAF = np.asarray([0, 0, 1, 0, 0, 0, 2, 1, 0, 0, 0, 0, 2, 0], np.int32)
STEPS = len(BAD_LEAF)
START = {"w": np.ones((8, 2), np.float32), "b": np.asarray(-1.0, np.float32)}
SCALING = {"initial_scale": 8.0, "growth_interval": 3, "min_scale": 2.0, "max_scale": 8.0}


def dyadic(count=STEPS):
    """Gradients that are small multiples of 1/8, so that all sums are exact."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(-8, 9, (count, *p.shape)) / 8).astype(np.float32)
        for name, p in START.items()
    }


def base(window=1):
    momentum = optax.sgd(0.5, momentum=0.5)
    if window == 1:
        return momentum
    # Sums, since a mean begins anew by itself where a window is empty.
    return optax.MultiSteps(momentum, window, use_grad_mean=False).gradient_transformation()


def trainer(optimizer):
    """A compiled scan over steps; the parameters and the scalars of the state after each."""

    def step(carry, x):
        p, state = carry
        g, value, leaf = x
        g = jax.tree.map(lambda x: x * loss_scale(state).astype(x.dtype), g)
        bad = lambda x, number: jnp.where(leaf == number, value.astype(x.dtype), x)
        g = {"w": g["w"].at[5, 1].set(bad(g["w"][5, 1], 1)), "b": bad(g["b"], 2)}
        updates, state = optimizer.update(g, state, p)
        p = optax.apply_updates(p, updates)
        now = loss_scale_state(state)
        return (p, state), (p, now.scale, now.good, now.skipped_total, now.skipped_run)

    return jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))


def expected(window=1, rule="skip"):
    """The same by the card's words, in NumPy."""
    gradients, p = dyadic(), dict(START)
    zeros = lambda: {name: np.zeros_like(x) for name, x in START.items()}
    velocity, window_sum, count = zeros(), zeros(), 0
    scale, good, total, row = 8.0, 0, 0, 0
    history = []
    for step, leaf in enumerate(BAD_LEAF):
        if leaf:
            scale, good, total, row = max(scale / 2, 2.0), 0, total + 1, row + 1
            if rule == "void_window":
                window_sum, count = zeros(), 0
        else:
            good, row, count = good + 1, 0, count + 1
            if good == 3:
                scale, good = min(2 * scale, 8.0), 0
            window_sum = {name: window_sum[name] + gradients[name][step] for name in window_sum}
            if count == window:
                velocity = {name: velocity[name] / 2 + window_sum[name] for name in window_sum}
                p = {name: p[name] - velocity[name] / 2 for name in p}
                window_sum, count = zeros(), 0
        history.append((p, scale, good, total, row))
    return jax.tree.map(lambda *x: np.stack(x), *history)


@pytest.mark.parametrize(
    ("window", "rule", "layout"),
    [
        (1, "skip", "single"),
        (1, "skip", "replicated"),
        (1, "skip", "sharded"),
        (2, "skip", "single"),
        (2, "skip", "sharded"),
        (2, "void_window", "sharded"),
    ],
)
def test_bad_leaves_in_a_scan(window, rule, layout):
    """Accumulation inside or none; parameters on one device, on all, or spread over them."""
    optimizer = dynamic_loss_scale(base(window), on_non_finite=rule, **SCALING)
    p, xs = START, (dyadic(), BAD_VALUE, BAD_LEAF)
    if layout != "single":
        mesh = Mesh(np.asarray(jax.devices()), ("data",))
        rows = ("data",) if layout == "sharded" else ()
        put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        p = {"w": put(p["w"], *rows), "b": put(p["b"])}
        xs = ({"w": put(xs[0]["w"], None, *rows), "b": put(xs[0]["b"])}, *map(put, xs[1:]))
    with users_settings():
        (_, state), history = trainer(optimizer)((p, optimizer.init(p)), xs)
    same(history, expected(window, rule))
    if layout != "single":
        assert len(state.scale.addressable_shards) == 8
        assert len({float(shard.data) for shard in state.scale.addressable_shards}) == 1
        shards = history[0]["w"].addressable_shards
        assert shards[0].data.shape == (STEPS, 1 if layout == "sharded" else 8, 2)


def test_accumulation_outside_applies_nothing_bad_but_never_recovers():
    """`optax.MultiSteps` keeps a NaN for good: (1 - emit) * NaN; so it belongs inside."""
    scaled = dynamic_loss_scale(base(), **{**SCALING, "max_scale": 32.0})
    optimizer = optax.MultiSteps(scaled, 2).gradient_transformation()
    with users_settings():
        p = jax.tree.map(jnp.asarray, START)
        _, (p, scale, _, total, _) = trainer(optimizer)(
            (p, optimizer.init(p)), (dyadic(), BAD_VALUE, BAD_LEAF)
        )
    first = jax.tree.map(lambda g, p: p - g[:2].mean(0) / 2, dyadic(), START)
    for step in range(1, STEPS):
        same(jax.tree.map(lambda x, step=step: x[step], p), first)
    # The windows that end at steps 3, 5, ... are bad; S is constant inside of each.
    np.testing.assert_array_equal(scale, [8, 8, 8, 4, 4, *[2] * (STEPS - 5)])
    np.testing.assert_array_equal(total, np.maximum((np.arange(STEPS) - 1) // 2, 0))


@pytest.mark.parametrize("store", ["numpy", "orbax"])
def test_a_checkpoint_continues_bit_for_bit(store, tmp_path):
    """Float16 parameters, in the middle of a window and of a run of finite steps."""
    optimizer = dynamic_loss_scale(base(2), **SCALING)
    with users_settings():
        half = jax.tree.map(lambda p: jnp.asarray(p, jnp.float16), START)
        scan = trainer(optimizer)
        g = jax.tree.map(lambda g: jnp.asarray(g, jnp.float16), dyadic())
        part = lambda of: jax.tree.map(lambda x: x[of], (g, BAD_VALUE, BAD_LEAF))
        middle, _ = scan((half, optimizer.init(half)), part(slice(0, 7)))
        window = optax.tree.get(middle[1], "mini_step")
        assert (int(window), int(middle[1].skipped_run)) == (1, 1)
        leaves, treedef = jax.tree.flatten(middle)
        if store == "numpy":
            np.savez(tmp_path / "state.npz", *leaves)
            with np.load(tmp_path / "state.npz") as file:
                kept = [jnp.asarray(file[f"arr_{number}"]) for number in range(len(leaves))]
            restored = jax.tree.unflatten(treedef, kept)
        else:
            ocp = pytest.importorskip("orbax.checkpoint")
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "state", middle)
                checkpointer.wait_until_finished()
                restored = checkpointer.restore(tmp_path / "state", middle)
        same(jax.tree.map(lambda x: x.dtype, restored), jax.tree.map(lambda x: x.dtype, middle))
        onward, again = (scan(carry, part(slice(7, 14))) for carry in (middle, restored))
    same(again, onward)
    assert int(onward[0][1].skipped_total) == 4


@pytest.mark.parametrize("rule", ["skip", "zero_leaves"])
def test_all_devices_skip_together(rule):
    """Inside `shard_map`, each device has gradients of its own; one of them is bad."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    optimizer = dynamic_loss_scale(
        optax.sgd(1.0, 0.5), axis_name="data", initial_scale=4.0, on_non_finite=rule
    )
    spread, whole = PartitionSpec("data"), PartitionSpec()

    def step(g):
        p = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), g)
        updates, state = optimizer.update(jax.tree.map(lambda x: x[0], g), optimizer.init(p), p)
        trace = optax.tree.get(state.inner_state, "trace")
        stacked = jax.tree.map(lambda x: x[None], (updates, trace))
        return *stacked, (state.scale, state.good, state.skipped_total)

    sharded = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=spread, out_specs=(spread, spread, whole))
    )
    g = {
        "w": np.arange(16, dtype=np.float32).reshape(8, 2),
        "b": np.arange(1.0, 9.0, dtype=np.float32),
    }
    updates, trace, scalars = sharded(g)
    same((updates, trace), ({k: -x / 4 for k, x in g.items()}, {k: x / 4 for k, x in g.items()}))
    assert [float(x) for x in scalars] == [4.0, 1.0, 0.0]
    for device, bad in ((5, np.nan), (0, np.inf), (7, -np.inf)):
        broken = {**g, "w": g["w"].copy()}
        broken["w"][device, 1] = bad
        updates, trace, scalars = sharded(broken)
        kept = g["b"] if rule == "zero_leaves" else 0 * g["b"]
        same(updates, {"w": 0 * g["w"], "b": -kept / 4})
        same(trace, {"w": 0 * g["w"], "b": kept / 4})
        assert [float(x) for x in scalars] == [2.0, 0.0, 1.0]


def test_all_devices_pass_over_an_update_that_one_cannot_make():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    optimizer = static_loss_scale(optax.sgd(4.0), 1.0, axis_name="data")

    def step(g, same_everywhere):
        p = {"own": jnp.zeros((), g.dtype), "same": jnp.zeros((), g.dtype)}
        given = {"own": g[0], "same": same_everywhere}
        updates, state = optimizer.update(given, optimizer.init(p), p)
        return updates["own"][None], updates["same"], state.skipped_total

    spread, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(spread, whole), out_specs=(spread, whole, whole))
    )
    g = np.ones(8, np.float32)
    own, everywhere, skipped = sharded(g, np.float32(2))
    same((own, everywhere, skipped), (-4 * g, np.float32(-8), np.int32(0)))
    g[3] = 3e38
    same(sharded(g, np.float32(2)), (0 * g, np.float32(0), np.int32(1)))


def test_vmapped_models_skip_alone():
    optimizer = dynamic_loss_scale(optax.sgd(1.0), initial_scale=2.0)
    both = jax.tree.map(lambda p: jnp.stack([p, p]), params())
    state = jax.vmap(optimizer.init)(both)
    g = jax.tree.map(jnp.ones_like, both)
    g = {**g, "b": g["b"].at[0].set(jnp.nan)}
    updates, state = jax.jit(jax.vmap(optimizer.update))(g, state, both)
    np.testing.assert_array_equal(updates["w"], [[0] * 3, [-0.5] * 3])
    np.testing.assert_array_equal(state.scale, [1.0, 2.0])


def test_defaults():
    """Card: 2^15, doubled at the 2000th finite step, halved, between 1 and 2^24; 50 bad steps."""
    optimizer = dynamic_loss_scale(optax.sgd(0.1))
    update, start = jax.jit(optimizer.update), optimizer.init(params())
    assert float(start.scale) == 2.0**15

    def after(bad=False, **changes):
        changes = {name: jnp.asarray(x, getattr(start, name).dtype) for name, x in changes.items()}
        g = spoiled(grads(0), np.nan) if bad else grads(0)
        state = update(g, start._replace(**changes), params())[1]
        return float(state.scale), int(state.good), bool(state.stalled)

    assert after(good=1998) == (2.0**15, 1999, False)
    assert after(good=1999) == (2.0**16, 0, False)
    assert after(good=1999, scale=2.0**24) == (2.0**24, 0, False)
    assert after(bad=True, good=1999) == (2.0**14, 0, False)
    assert after(bad=True, scale=1.0) == (1.0, 0, False)
    assert after(bad=True, skipped_run=48) == (2.0**14, 0, False)
    assert after(bad=True, skipped_run=49) == (2.0**14, 0, True)


def test_which_optimizers_ignore_a_constant_scale():
    """Card: sign methods do exactly, SGD is changed; unscaled, none is."""

    def final(make, scale, unscale):
        optimizer = static_loss_scale(make, scale, unscale=unscale)
        p, state, update = params(), optimizer.init(params()), jax.jit(optimizer.update)
        for step in range(4):
            updates, state = update(grads(step, scale), state, p)
            p = optax.apply_updates(p, updates)
        assert float(loss_scale(state)) == scale
        return p

    with users_settings():
        for make in (optax.lion(1e-2), tiger(1e-2)):
            same(final(make, 1024.0, False), final(make, 1.0, False))
        same(final(optax.sgd(1.0), 1024.0, False), final(optax.sgd(1024.0), 1.0, True))
        same(final(optax.sgd(1.0), 1024.0, True), final(optax.sgd(1.0), 1.0, True))


def test_a_scale_for_one_layer():
    """Where the gradients of one layer vanish at an S at which those of another overflow."""

    def loss(p, x, factor=1.0):
        hidden = x * p["steep"] * jnp.asarray(2.0**8, x.dtype)
        out = scale_cotangent(p["flat"] * scale_cotangent(x * 2.0**-14, 1 / factor), factor)
        return (hidden + out * jnp.asarray(2.0**-13, x.dtype)).astype(jnp.float32)

    p = {"steep": jnp.asarray(1.0, jnp.float16), "flat": jnp.asarray(1.0, jnp.float16)}
    x = jnp.asarray(1.0, jnp.float16)
    gradient = lambda **options: jax.grad(lambda p: loss(p, x, **options))(p)
    assert float(gradient()["flat"]) == 0.0  # 2^-27
    assert float(gradient()["steep"]) == 2.0**8
    g = gradient(factor=2.0**10)
    assert float(g["flat"]) == 2.0**-17
    optimizer = static_loss_scale(optax.sgd(1.0), 1.0, leaf_factors={"steep": 1.0, "flat": 2.0**10})
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), p)
    updates, _ = optimizer.update(g, optimizer.init(wide), wide)
    same(updates, {"steep": np.float32(-(2.0**8)), "flat": np.float32(-(2.0**-27))})
    with pytest.raises(ValueError, match="leaf_factors must be greater than 0"):
        static_loss_scale(optax.sgd(1.0), 1.0, leaf_factors={"w": 0.0})
    with pytest.raises(ValueError, match="factor must be greater than 0"):
        scale_cotangent(x, -1.0)


def test_finite_looks_at_every_number_of_every_kind_of_leaf():
    """By no maximum: compiled for a CPU, one over thousands of numbers may lose a NaN."""
    check = jax.jit(all_finite)
    x = np.ones(10_007, np.float32)
    assert check({"w": x, "n": np.arange(3)})
    for place in (0, 4096, 10_006):
        for bad in (np.nan, np.inf, -np.inf):
            broken = x.copy()
            broken[place] = bad
            assert not check({"w": broken, "n": np.arange(3)})
    others = {
        "none": None,
        "empty": np.zeros((0, 3)),
        "float0": np.zeros(2, jax.dtypes.float0),
        "key": jax.random.key(0),
        "flag": True,
    }
    assert all_finite(others)
    assert all_finite({})
    assert not all_finite({**others, "complex": np.asarray([1.0, complex(0, np.inf)])})
    assert not all_finite({**others, "half": jnp.asarray(np.nan, jnp.bfloat16)})
    assert not all_finite(float("inf"))


def test_how_flax_scales():
    """Card, check 6: growth a step later than asked for, and NaN at first with a float16 loss."""
    dynamic_scale = pytest.importorskip("flax.training.dynamic_scale")
    with users_settings():
        theirs = dynamic_scale.DynamicScale(growth_interval=3, scale=8.0)
        ours = dynamic_loss_scale(optax.sgd(0.0), growth_interval=3, initial_scale=8.0)
        one, update = jnp.ones(()), jax.jit(ours.update)
        state, scales = ours.init(one), []
        for _ in range(4):
            theirs, *_ = theirs.value_and_grad(lambda p: p**2)(one)
            _, state = update(one, state, one)
            scales.append((float(theirs.scale), float(state.scale)))
        assert scales == [(8, 8), (8, 8), (8, 16), (16, 16)]
        half = jnp.ones((), jnp.float16)
        theirs, _, loss, _ = dynamic_scale.DynamicScale().value_and_grad(lambda p: p**2)(half)
        assert np.isnan(float(loss))
        assert float(theirs.scale) == 32768.0


def test_how_jmp_scales():
    """Card, check 6: under jit it forgets its least scale."""
    jmp = pytest.importorskip("jmp")
    for compiled, seen in ((False, [4, 4, 4, 4]), (True, [4, 2, 1, 1])):
        adjust = lambda scale: scale.adjust(jnp.asarray(False))
        adjust = jax.jit(adjust) if compiled else adjust
        with users_settings():
            scale = jmp.DynamicLossScale(jnp.asarray(8.0), min_loss_scale=jnp.asarray(4.0))
            for expected_scale in seen:
                scale = adjust(scale)
                assert float(scale.loss_scale) == expected_scale


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
        ({"initial_scale": 8.0, "max_scale": 4.0}, "initial_scale must lie between"),
        ({"min_scale": float("nan")}, "min_scale must be"),
        ({"growth": float("inf")}, "growth must be finite"),
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


@pytest.mark.parametrize("name", ["initial_scale", "growth", "backoff", "growth_interval"])
def test_errors_of_type(name):
    with pytest.raises(TypeError, match=f"{name} must be"):
        dynamic_loss_scale(optax.sgd(0.1), **{name: "2"})


def test_state_is_found_once():
    with pytest.raises(ValueError, match="one LossScaleState; it holds 0"):
        loss_scale(optax.sgd(0.1).init(params()))
    twice = dynamic_loss_scale(dynamic_loss_scale(optax.sgd(0.1))).init(params())
    assert loss_scale_state(twice) is twice
    with pytest.raises(ValueError, match="it holds 2"):
        loss_scale((twice, twice))
    with pytest.raises(ValueError, match="scale must be greater than 0"):
        static_loss_scale(optax.sgd(0.1), 0.0)
