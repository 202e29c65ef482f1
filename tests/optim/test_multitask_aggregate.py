"""From losses to gradients: every way to form rows, heads, groups, faults, sharding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkit.optim import multitask as mt

C = np.array([[1.0, -0.4, 0.3], [-0.8, 1, 0.5]])


def make_params(dtype=jnp.float64):
    return {
        "body": {"kernel": jnp.asarray(C, dtype), "bias": jnp.asarray([0.1, -0.2, 0.3], dtype)},
        "head": jnp.asarray([0.5, -1.0], dtype),
    }


def losses_fn(params):
    h = jnp.tanh(params["body"]["kernel"] @ params["body"]["bias"] + params["head"])
    a, b = params["body"]["bias"][0], params["head"]
    return jnp.stack([jnp.sum(h**2), jnp.sum((h - 1) ** 2) * 3, (a - 2) ** 2 + b[0] ** 2])


def dense(tree):
    return np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in jax.tree.leaves(tree)], 1)


def rows_by_hand(params):
    return jax.jacobian(losses_fn)(params)


@pytest.fixture(scope="module")
def params():
    return make_params()


def test_jacobian_and_gram_matrix(params):
    want = dense(rows_by_hand(params))
    for batched in (True, False):
        losses, J = mt.jacobian(losses_fn, params, batched=batched)
        np.testing.assert_allclose(losses, losses_fn(params))
        np.testing.assert_allclose(dense(J), want, atol=1e-15)
    np.testing.assert_allclose(mt.gram_matrix(J), want @ want.T, atol=1e-13)
    u = mt.combine(J, jnp.array([0.2, 0, 2.0]))
    np.testing.assert_allclose(
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(u)]), [0.2, 0, 2] @ want
    )


@pytest.mark.parametrize("rows", ["vmap", "map", "recompute"])
def test_all_ways_to_form_rows_agree(params, rows):
    want = dense(rows_by_hand(params))
    call = jax.jit(lambda p: mt.aggregate(losses_fn, p, method="mgda", rows=rows))
    grads, aux = call(params)
    np.testing.assert_allclose(aux.gram, want @ want.T, atol=1e-13)
    w = mt.mgda(jnp.asarray(want @ want.T))
    np.testing.assert_allclose(aux.weights, w, atol=1e-12)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
    np.testing.assert_allclose(flat, w @ want, atol=1e-12)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    assert aux.finite.tolist() == [True] * 3


def test_every_method_runs_and_gives_a_gradient_of_its_weights(params):
    """One compilation for all; stateful ones twice."""
    J = rows_by_hand(params)
    losses = losses_fn(params)
    key = jax.random.key(0)
    options = {"inverse_reference": {"reference": (1.0, 2.0, 3.0)}, "power_mean": {"gamma": 0.0}}

    def run(J, losses):
        out = {}
        for name, method in mt.METHODS.items():
            state = mt.init_state(params, 3, method=name) if method.init else None
            for _ in range(2 if method.init else 1):
                u, aux = mt.aggregate_rows(
                    J, method=name, losses=losses, state=state, key=key, **options.get(name, {})
                )
                state = aux.state
            out[name] = u, aux.weights
        return out

    for name, (u, w) in jax.jit(run)(J, losses).items():
        assert np.isfinite(w).all(), name
        if name != "graddrop":
            flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(u)])
            np.testing.assert_allclose(flat, w @ dense(J), atol=1e-11, err_msg=name)


def test_heads_get_the_gradient_of_the_sum(params):
    shared = {"body": True, "head": False}
    J = rows_by_hand(params)
    body = dense(J["body"])
    for method in ("mgda", "real_time"):
        grads, aux = mt.aggregate(losses_fn, params, method=method, shared=shared)
        np.testing.assert_allclose(grads["head"], J["head"].sum(0), atol=1e-14)
        u = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads["body"])])
        np.testing.assert_allclose(u, aux.weights @ body, atol=1e-13)
    _, aux = mt.aggregate(losses_fn, params, method="mgda", shared=shared)
    np.testing.assert_allclose(aux.gram, body @ body.T, atol=1e-13)


def test_measured_parameters_enter_the_gram_matrix_alone(params):
    measured = {"body": {"kernel": False, "bias": True}, "head": False}
    state = mt.init_state(params, 3, method="gradnorm")
    grads, aux = mt.aggregate(
        losses_fn, params, method="gradnorm", measured=measured, state=state, learning_rate=0.1
    )
    J = rows_by_hand(params)
    bias = np.asarray(J["body"]["bias"])
    np.testing.assert_allclose(aux.gram, bias @ bias.T, atol=1e-13)
    r = np.linalg.norm(bias, axis=1)
    w = 1 - 0.1 * np.sign(r - r.mean()) * r
    w = np.maximum(w, 0)
    np.testing.assert_allclose(aux.state.inner.weights[0], 3 * w / w.sum(), atol=1e-12)
    np.testing.assert_allclose(grads["head"], J["head"].sum(0), atol=1e-13)


@pytest.mark.parametrize(("granularity", "count"), [("layer", 2), ("leaf", 3)])
def test_granularity(params, granularity, count):
    grads, aux = mt.aggregate(losses_fn, params, method="pcgrad", granularity=granularity)
    assert aux.weights.shape == (count, 3)
    J = rows_by_hand(params)
    groups = [J["body"], J["head"]]
    if granularity == "leaf":
        groups = [J["body"]["bias"], J["body"]["kernel"], J["head"]]
    for group, w in zip(groups, aux.weights, strict=True):
        rows = dense(group)
        np.testing.assert_allclose(w, mt.pcgrad(jnp.asarray(rows @ rows.T)), atol=1e-12)
    rows = np.asarray(J["head"])
    np.testing.assert_allclose(grads["head"], aux.weights[-1] @ rows, atol=1e-13)


def test_gradvac_remembers_in_every_group(params):
    state = mt.init_state(params, 3, method="gradvac", granularity="leaf")
    assert state.inner.rho.shape == (3, 3, 3)
    for _ in range(2):
        _, aux = mt.aggregate(
            losses_fn, params, method="gradvac", state=state, granularity="leaf", beta=0.5
        )
        state = aux.state
    assert int(state.steps) == 2
    rows = np.asarray(rows_by_hand(params)["head"])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    # The first partner of the last task is met before anything is changed.
    want = 0.75 * unit[2] @ unit[0]
    assert float(state.inner.rho[2, 2, 0]) == pytest.approx(want, abs=1e-12)


def test_update_every_reuses_weights(params):
    step = jax.jit(lambda p, s: mt.aggregate(losses_fn, p, method="nash", state=s, update_every=3))
    state = mt.init_state(params, 3, method="nash")
    seen, moved = [], params
    for _ in range(4):
        grads, aux = step(moved, state)
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
        np.testing.assert_allclose(flat, aux.weights @ dense(rows_by_hand(moved)), atol=1e-11)
        seen.append(np.asarray(aux.weights))
        state = aux.state
        moved = jax.tree.map(lambda p, g: p - 0.05 * g, moved, grads)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[1], seen[2])
    assert not np.allclose(seen[2], seen[3])


def huge(p):
    """1e300, by which the compiler cannot multiply in another order: 0·(1e300·1e300) is NaN."""
    return jax.lax.stop_gradient(1e301 * p["body"]["bias"][0])


def broken(p):
    """The second loss and its gradient overflow."""
    losses = losses_fn(p)
    return losses.at[1].set(huge(p) * (huge(p) * losses[1]))


@pytest.mark.parametrize("rows", ["vmap", "recompute"])
def test_a_task_that_is_not_finite(params, rows):
    grads, aux = mt.aggregate(broken, params, method="mgda", rows=rows)
    assert aux.finite.tolist() == [True, False, True]
    J = dense(rows_by_hand(params))[[0, 2]]
    w = mt.mgda(jnp.asarray(J @ J.T))
    np.testing.assert_allclose(aux.weights, [w[0], 0, w[1]], atol=1e-12)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
    np.testing.assert_allclose(flat, w @ J, atol=1e-12)
    grads, aux = mt.aggregate(broken, params, method="mgda", rows=rows, nonfinite="propagate")
    assert np.isnan(aux.weights).all()
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_task_that_breaks_while_weights_are_reused(params):
    state = mt.init_state(params, 3, method="nash")
    step = lambda f, state, **options: jax.jit(
        lambda p, s: mt.aggregate(f, p, method="nash", state=s, update_every=3, **options)
    )(params, state)
    _, first = step(losses_fn, state)
    grads, aux = step(broken, first.state)
    want = np.asarray(first.weights) * [1, 0, 1]
    np.testing.assert_array_equal(aux.weights, want)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
    np.testing.assert_allclose(flat, want @ dense(rows_by_hand(params)), atol=1e-12)
    grads, _ = step(broken, first.state, nonfinite="propagate")
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(grads))
    # It is back as soon as it is mended.
    np.testing.assert_array_equal(step(losses_fn, aux.state)[1].weights, first.weights)


def overflowing(p):
    """The second loss is finite, but the slope of its part in the head overflows."""
    small = jnp.sum(p["head"] - jax.lax.stop_gradient(p["head"]))
    return losses_fn(p).at[1].add(huge(p) * (huge(p) * small))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("equal", {}),
        ("equal", {"shared": {"body": True, "head": False}}),
        ("mgda", {"shared": {"body": True, "head": False}}),
        ("mgda", {"measured": {"body": True, "head": False}}),
        ("mean", {"measured": {"body": True, "head": False}, "rows": "recompute"}),
    ],
)
def test_a_finite_loss_with_a_gradient_that_is_not(params, method, options):
    """Wherever the leaf is that spoils the task: among heads, or where G does not look."""
    grads, aux = jax.jit(lambda p: mt.aggregate(overflowing, p, method=method, **options))(params)
    assert np.isfinite(aux.losses).all()
    assert aux.finite.tolist() == [True, False, True]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    J = rows_by_hand(params)
    w = np.asarray(aux.weights)
    if "shared" in options:
        np.testing.assert_allclose(grads["head"], J["head"][0] + J["head"][2], atol=1e-12)
    else:
        assert w[1] == 0
        np.testing.assert_allclose(grads["head"], w @ np.asarray(J["head"]), atol=1e-12)


def test_heads_of_a_broken_task_and_its_state(params):
    state = mt.init_state(params, 3, method="gradvac")
    shared = {"body": True, "head": False}
    grads, aux = mt.aggregate(broken, params, method="gradvac", state=state, shared=shared)
    J = rows_by_hand(params)["head"]
    np.testing.assert_allclose(grads["head"], J[0] + J[2], atol=1e-13)
    np.testing.assert_array_equal(aux.state.inner.rho, state.inner.rho)


def test_nan_in_a_backward_pass_spoils_all_rows_and_moves_nothing(params):
    spoilt = lambda p: losses_fn(p).at[1].multiply(jnp.nan)
    grads, aux = mt.aggregate(spoilt, params, method="mgda")
    assert aux.finite.tolist() == [False] * 3
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
    J = dense(rows_by_hand(params))
    J[1] = np.nan
    u, aux = mt.aggregate_rows(jnp.asarray(J), method="mgda")
    assert aux.finite.tolist() == [True, False, True]
    np.testing.assert_allclose(u, np.asarray(aux.weights)[[0, 2]] @ J[[0, 2]], atol=1e-13)


def test_has_aux(params):
    _, aux = mt.aggregate(lambda p: (losses_fn(p), {"n": 3}), params, method="sum", has_aux=True)
    assert aux.aux == {"n": 3}
    losses, _, other = mt.jacobian(lambda p: (losses_fn(p), 1.5), params, has_aux=True)
    assert other == 1.5
    np.testing.assert_allclose(losses, aux.losses)


def test_vmap_over_models(params):
    many = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x + 0.1]), params)
    both, aux = jax.jit(jax.vmap(lambda p: mt.aggregate(losses_fn, p, method="upgrad")))(many)
    for i in range(2):
        one, of = mt.aggregate(losses_fn, jax.tree.map(lambda x, i=i: x[i], many), method="upgrad")
        np.testing.assert_allclose(aux.weights[i], of.weights, atol=1e-11)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], both), one, atol=1e-11)


def test_the_shared_encoder_bound_can_climb():
    """The card's numbers: the bound lets the second loss rise where the exact method does not."""
    M = np.array([[1.0, -1.2], [-1.2, 2]])
    encoder = jnp.asarray(np.linalg.cholesky(M))  # features are Lᵀθ, so that their metric is M
    z = jnp.array([[1.0, -2], [1, 1]])
    loss = lambda h, head: z @ h + head
    theta = jnp.zeros(2)
    (grad, head), aux = mt.aggregate_encoder(
        lambda t: encoder @ t, loss, theta, jnp.zeros(2), method="mgda"
    )
    np.testing.assert_allclose(aux.weights, (1 / 3, 2 / 3), atol=1e-12)
    falls = z @ encoder @ grad
    np.testing.assert_allclose(falls, (3.4, -0.2), atol=1e-12)
    assert head.tolist() == [1, 1]
    exact, aux = mt.aggregate(lambda t: loss(encoder @ t, jnp.zeros(2)), theta, method="mgda")
    np.testing.assert_allclose(aux.weights, (2 / 15, 13 / 15), atol=1e-12)
    np.testing.assert_allclose(z @ encoder @ exact, (0.28, 0.28), atol=1e-12)


def test_feeds_an_optimizer_without_a_second_compilation(params):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9))

    @chex.assert_max_traces(n=1)
    def step(params, state):
        grads, aux = mt.aggregate(losses_fn, params, method="mgda")
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, aux.losses

    step, state, history = jax.jit(step), optimizer.init(params), []
    for _ in range(30):
        params, state, losses = step(params, state)
        history.append(losses)
    assert (history[-1] <= history[0] + 1e-9).all()


@pytest.mark.x32
def test_bfloat16_parameters_have_a_float32_gram_matrix():
    params = make_params(jnp.bfloat16)
    grads, aux = mt.aggregate(losses_fn, params, method="mgda")
    chex.assert_trees_all_equal_dtypes(grads, params)
    assert aux.gram.dtype == aux.weights.dtype == jnp.float32
    J = dense(jax.tree.map(lambda x: x.astype(jnp.float32), rows_by_hand(params)))
    np.testing.assert_allclose(aux.gram, J @ J.T, rtol=1e-5)


def test_scalars_empty_trees_and_none():
    losses = lambda p: jnp.stack([(p["a"] - 1) ** 2, (p["a"] + 1) ** 2 + jnp.sum(p["b"])])
    params = {"a": jnp.array(3.0), "b": jnp.zeros((0, 2)), "c": None}
    grads, aux = mt.aggregate(losses, params, method="mgda")
    assert float(grads["a"]) == 4
    assert grads["b"].shape == (0, 2)
    grads, aux = mt.aggregate(lambda p: jnp.ones(2), {}, method="upgrad")
    assert grads == {}
    assert aux.weights.tolist() == [0, 0]


def test_sharded_parameters():
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("model",))
    J = np.random.default_rng(0).standard_normal((3, 16, 5))
    split = jax.device_put(J, NamedSharding(mesh, PartitionSpec(None, "model")))
    u, aux = jax.jit(lambda J: mt.aggregate_rows(J, method="mgda"))(split)
    whole, want = mt.aggregate_rows(jnp.asarray(J), method="mgda")
    np.testing.assert_allclose(u, whole, atol=1e-13)
    assert u.sharding.spec[0] == "model"
    manual = jax.shard_map(
        lambda J: mt.aggregate_rows(J, method="mgda", axis_name="model")[0],
        mesh=mesh,
        in_specs=PartitionSpec(None, "model"),
        out_specs=PartitionSpec("model"),
    )
    np.testing.assert_allclose(jax.jit(manual)(split), whole, atol=1e-13)

    # From losses, whose parameters are split: sums over the devices make them, and G.
    x = np.random.default_rng(1).standard_normal((16, 5))

    def losses(x, J, total=lambda y: y):
        return total(jnp.stack([jnp.sum(J[i] * x) + (i + 1) * jnp.sum(x**2) for i in range(3)]))

    for method, axis in (("mgda", "model"), ("equal", "model"), ("equal", None)):
        inside = jax.shard_map(
            lambda x, J, method=method, axis=axis: mt.aggregate(
                lambda x: losses(x, J, lambda y: jax.lax.psum(y, "model")),
                x,
                method=method,
                axis_name=axis,
            )[0],
            mesh=mesh,
            in_specs=(PartitionSpec("model"), PartitionSpec(None, "model")),
            out_specs=PartitionSpec("model"),
        )
        expected, _ = mt.aggregate(lambda x: losses(x, J), jnp.asarray(x), method=method)
        np.testing.assert_allclose(jax.jit(inside)(x, J), expected, atol=1e-12)
    np.testing.assert_allclose(aux.gram, want.gram, atol=1e-12)


def test_the_gram_matrix_does_not_copy_the_rows():
    J = jax.ShapeDtypeStruct((8, 100_000), jnp.float32)
    call = jax.jit(lambda J: mt.aggregate_rows(J, method="mgda")[0])
    plan = call.lower(J).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 8 * 100_000 * 4 / 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: mt.aggregate(lambda p: losses_fn(p)[0], p), ValueError, "vector of losses"),
        (lambda p: mt.aggregate(lambda p: losses_fn(p)[:1], p), ValueError, "at least 2 losses"),
        (lambda p: mt.aggregate(losses_fn, p, method="mdga"), ValueError, "Did you mean 'mgda'"),
        (lambda p: mt.aggregate(losses_fn, p, method=max), TypeError, "name or a Method"),
        (lambda p: mt.aggregate(losses_fn, p, method="mgda", c=1), TypeError, "got 'c'"),
        (lambda p: mt.aggregate(losses_fn, p, method="cagrad", c=-1.0), ValueError, "c must be"),
        (
            lambda p: mt.aggregate(losses_fn, p, method="mean", preference=[1.0, 2.0]),
            ValueError,
            "preference must have shape",
        ),
        (lambda p: mt.aggregate(losses_fn, p, rows="loop"), ValueError, "rows must be one of"),
        (lambda p: mt.aggregate(losses_fn, p, method="dwa"), ValueError, "state must be given"),
        (lambda p: mt.aggregate(losses_fn, p, update_every=2), ValueError, "state must be given"),
        (lambda p: mt.aggregate(losses_fn, p, method="random"), ValueError, "key must be given"),
        (
            lambda p: mt.aggregate(losses_fn, p, method="dwa", granularity="leaf"),
            ValueError,
            "granularity must be 'model'",
        ),
        (lambda p: mt.aggregate(losses_fn, p, shared={"body": True}), ValueError, "shared must"),
        (
            lambda p: mt.aggregate(lambda p: losses_fn(p) - 1e3, p, method="real_time"),
            ValueError,
            "losses must be positive",
        ),
        (lambda p: mt.aggregate_rows(p), ValueError, "one leading axis for the tasks"),
        (lambda p: mt.aggregate_rows(C, method="dwa"), ValueError, "must be given"),
        (lambda p: mt.init_state(p, 1, method="dwa"), ValueError, "tasks must be at least 2"),
        (lambda p: mt.aggregate(losses_fn, {"a": jnp.arange(3)}), ValueError, "floating-point"),
    ],
)
def test_errors(params, call, error, message):
    with pytest.raises(error, match=message):
        call(params)
