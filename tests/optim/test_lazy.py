"""Remedies for sparse gradients, under optimizers of optax and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxkit.optim import (
    lazy_rows,
    split_embeddings,
    swap_halves,
    tied_logits,
    tiger,
)
from tests.tolerance import tol

PARAMS = {
    "embed": {"embedding": np.random.default_rng(0).normal(size=(5, 3))},
    "dense": {"kernel": np.random.default_rng(1).normal(size=(3, 2))},
}
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lion": lambda: optax.lion(0.1, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
}


def run(optimizer, params, history, **extra_args):
    """Parameters and states after every step; optax's optimizers promote."""
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads, extra_args):
        updates, state = optimizer.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    after = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for grads in history:
            params, state = step(params, state, grads, extra_args)
            after.append((params, state))
    return after


def sparse_history(steps, seed=2):
    """Row 0 in every batch, row 4 in none, the others now and then."""
    rng = np.random.default_rng(seed)
    history = []
    for _ in range(steps):
        rows = rng.uniform(size=5) < 0.5
        rows[0], rows[4] = True, False
        history.append(
            {
                "embed": {"embedding": rng.normal(size=(5, 3)) * rows[:, None]},
                "dense": {"kernel": rng.normal(size=(3, 2))},
            }
        )
    return history


def embedding(params):
    return np.asarray(params["embed"]["embedding"])


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
@pytest.mark.parametrize("mode", ["param", "full"])
def test_rows_without_a_gradient_stay(name, mode):
    history = sparse_history(4)
    after = run(lazy_rows(OPTIMIZERS[name](), mode=mode), PARAMS, history)
    plain = run(OPTIMIZERS[name](), PARAMS, history)
    before = embedding(PARAMS)
    for (params, _), grads in zip(after, history, strict=True):
        touched = np.any(embedding(grads) != 0, axis=1)
        same = np.all(embedding(params) == before, axis=1)
        np.testing.assert_array_equal(same, ~touched)
        before = embedding(params)
    np.testing.assert_array_equal(before[4], PARAMS["embed"]["embedding"][4])
    # A row of every batch, and what is no embedding, are trained as ever.
    np.testing.assert_allclose(before[0], embedding(plain[-1][0])[0], rtol=tol("float64"))
    for (params, _), (expected, _) in zip(after, plain, strict=True):
        np.testing.assert_allclose(
            params["dense"]["kernel"], expected["dense"]["kernel"], rtol=tol("float64")
        )


def test_moments_go_on_or_wait():
    """Lion's momentum by hand: it decays in the mode "param" and waits in the mode "full"."""
    history = sparse_history(5)
    for mode in ("param", "full"):
        x, m = embedding(PARAMS).copy(), np.zeros((5, 3))
        after = run(lazy_rows(OPTIMIZERS["lion"](), mode=mode), PARAMS, history)
        for (params, state), grads in zip(after, history, strict=True):
            g = embedding(grads)
            touched = np.any(g != 0, axis=1)
            x[touched] -= 0.1 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * x)[touched]
            fades = touched if mode == "full" else slice(None)
            m[fades] = (0.99 * m + 0.01 * g)[fades]
            np.testing.assert_allclose(embedding(params), x, rtol=tol("float64", 5))
            momentum = optax.tree.get(state, "mu")
            np.testing.assert_allclose(embedding(momentum), m, rtol=tol("float64", 5))


def test_moments_of_parameters_of_one_name():
    """The path of a moment may end in the names of two parameters: the longer one is its own."""
    params = {"embedding": np.ones((3, 2)), "position": {"embedding": np.ones((3, 2))}}
    first = np.eye(3)[:, :1] * np.ones((3, 2))
    grads = {"embedding": first, "position": {"embedding": first[::-1]}}
    _, state = run(lazy_rows(optax.lion(0.1)), params, [grads, jax.tree.map(np.zeros_like, grads)])[
        -1
    ]
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose(mu["embedding"], 0.01 * first)
    np.testing.assert_allclose(mu["position"]["embedding"], 0.01 * first[::-1])
    chosen = lazy_rows(optax.lion(0.1), is_rows=lambda path, leaf: len(path) == 1)
    _, state = run(chosen, params, [grads, jax.tree.map(np.zeros_like, grads)])[-1]
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose(mu["embedding"], 0.01 * first)
    np.testing.assert_allclose(mu["position"]["embedding"], 0.99 * 0.01 * first[::-1])


def test_statistics_of_rows_wait_too():
    """Adafactor keeps one number a row, and one a column, which is no row's."""
    params, history = {"embedding": embedding(PARAMS)}, sparse_history(3)
    history = [{"embedding": embedding(grads)} for grads in history]
    _, state = run(lazy_rows(OPTIMIZERS["adafactor"]()), params, history)[-1]
    _, plain = run(OPTIMIZERS["adafactor"](), params, history)[-1]
    rows, all_rows = (optax.tree.get(s, "v_row")["embedding"] for s in (state, plain))
    columns, all_columns = (optax.tree.get(s, "v_col")["embedding"] for s in (state, plain))
    assert {rows.shape, columns.shape} == {(5,), (3,)}
    if rows.shape != (5,):
        rows, all_rows, columns, all_columns = columns, all_columns, rows, all_rows
    assert float(rows[4]) == 0.0 < float(all_rows[4])
    np.testing.assert_allclose(rows[0], all_rows[0], rtol=1e-12)
    np.testing.assert_array_equal(columns, all_columns)


def test_dense_gradients_with_touched_rows():
    rng = np.random.default_rng(3)
    history = [jax.tree.map(lambda p: rng.normal(size=p.shape), PARAMS) for _ in range(3)]
    rows = np.array([True, False, True, False, False])
    zeroed = [
        {**grads, "embed": {"embedding": embedding(grads) * rows[:, None]}} for grads in history
    ]
    for mode in ("param", "full"):
        optimizer = lazy_rows(OPTIMIZERS["lion"](), mode=mode)
        given = run(optimizer, PARAMS, history, touched_rows={"embed/embedding": rows})
        masked = run(optimizer, PARAMS, zeroed)
        np.testing.assert_array_equal(
            embedding(given[-1][0])[~rows], PARAMS["embed"]["embedding"][~rows]
        )
        np.testing.assert_array_equal(embedding(given[-1][0]), embedding(masked[-1][0]))


def test_tiger_inside_takes_the_same_touched_rows():
    rows = np.array([True, False, True, False, False])
    history = [jax.tree.map(np.ones_like, PARAMS)] * 3
    wrapped = run(
        lazy_rows(tiger(0.1), mode="full"), PARAMS, history, touched_rows={"embed/embedding": rows}
    )
    own = run(tiger(0.1, lazy="full"), PARAMS, history, touched_rows={"embed/embedding": rows})
    np.testing.assert_array_equal(embedding(wrapped[-1][0]), embedding(own[-1][0]))
    np.testing.assert_array_equal(
        embedding(wrapped[-1][0])[~rows], PARAMS["embed"]["embedding"][~rows]
    )


def test_anomaly_and_remedy():
    """A token that is never seen again drifts to 1/λ under Lion whose momentum cannot fade."""
    params = {"embedding": np.full((2, 2), 0.02)}
    once = {"embedding": np.array([[-1.0, -1.0], [-1.0, -1.0]])}
    later = {"embedding": np.array([[-1.0, 1.0], [0.0, 0.0]])}
    history = [once] + [later] * 300
    lion = lambda: optax.lion(0.1, b1=0.999, b2=0.999, weight_decay=0.1)
    drifted = run(lion(), params, history)[-1][0]["embedding"]
    lazy = run(lazy_rows(lion()), params, history)[-1][0]["embedding"]
    # θ_t = -σ/λ + (1 - ηλ)^t (θ_0 + σ/λ) with σ = -1
    np.testing.assert_allclose(drifted[1], 10 + 0.99**301 * (0.02 - 10), rtol=1e-10)
    np.testing.assert_allclose(lazy[1], 10 + 0.99 * (0.02 - 10), rtol=1e-10)


def test_accumulation_outside_touches_the_rows_of_any_micro_step():
    optimizer = optax.MultiSteps(lazy_rows(optax.lion(0.1)), 2).gradient_transformation()
    row = lambda r: np.eye(3)[:, r : r + 1] * np.ones((3, 2))
    params = {"embedding": np.ones((3, 2))}
    after = run(optimizer, params, [{"embedding": row(0)}, {"embedding": row(1)}])
    moved = np.any(np.asarray(after[-1][0]["embedding"]) != 1, axis=1)
    np.testing.assert_array_equal(moved, [True, True, False])


def test_other_rows_by_is_rows():
    optimizer = lazy_rows(optax.sgd(1.0), is_rows=lambda path, leaf: leaf.ndim == 2)
    history = [{"kernel": np.array([[1.0, 1.0], [0.0, 0.0]]), "bias": np.zeros(2)}]
    params = {"kernel": np.ones((2, 2)), "bias": np.ones(2)}
    decayed = optax.chain(optax.add_decayed_weights(0.5), optimizer)
    # The decay before makes every gradient dense: no row is untouched.
    assert np.all(np.asarray(run(decayed, params, history)[-1][0]["kernel"])[1] == 0.5)
    inside = lazy_rows(
        optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0)),
        is_rows=lambda path, leaf: leaf.ndim == 2,
    )
    moved = run(inside, params, history)[-1][0]
    np.testing.assert_array_equal(moved["kernel"], [[-0.5, -0.5], [1.0, 1.0]])
    np.testing.assert_array_equal(moved["bias"], [0.5, 0.5])


def test_a_module_of_flax():
    class Model(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(4, 2, rngs=nnx.Rngs(0))

    model = Model()
    before = np.asarray(model.embed.embedding[...])
    optimizer = nnx.Optimizer(model, lazy_rows(optax.adam(0.1)), wrt=nnx.Param)
    loss = lambda model: jnp.sum(model.embed(jnp.asarray([1, 3])))
    with jax.numpy_dtype_promotion("standard"):
        optimizer.update(model, nnx.grad(loss)(model))
    moved = np.any(np.asarray(model.embed.embedding[...]) != before, axis=1)
    np.testing.assert_array_equal(moved, [False, True, False, True])


def test_parameters_that_are_one_array():
    optimizer = lazy_rows(optax.lion(0.1), is_rows=lambda path, leaf: True)
    params = jnp.ones((2, 2))
    grads = jnp.asarray([[1.0, 1.0], [0.0, 0.0]])
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_array_equal(updates[1], 0.0)
    _, later = optimizer.update(grads[::-1], state, params)
    np.testing.assert_array_equal(optax.tree.get(later, "mu")[0], optax.tree.get(state, "mu")[0])


def test_split_embeddings():
    history = [jax.tree.map(np.ones_like, PARAMS)] * 2
    both = run(split_embeddings(optax.adam(0.1), tiger(0.1)), PARAMS, history)[-1][0]
    adam = run(optax.adam(0.1), PARAMS, history)[-1][0]
    ours = run(tiger(0.1), PARAMS, history)[-1][0]
    np.testing.assert_allclose(embedding(both), embedding(adam), rtol=tol("float64"))
    kernels = (both["dense"]["kernel"], ours["dense"]["kernel"])
    np.testing.assert_allclose(*kernels, rtol=tol("float64"))
    chosen = split_embeddings(
        optax.sgd(1.0), optax.set_to_zero(), is_embedding=lambda path, leaf: leaf.shape == (3, 2)
    )
    moved = run(chosen, PARAMS, history[:1])[-1][0]
    np.testing.assert_array_equal(moved["dense"]["kernel"], PARAMS["dense"]["kernel"] - 1)
    np.testing.assert_array_equal(embedding(moved), embedding(PARAMS))


@pytest.mark.parametrize("shape", [(4,), (2, 6), (1, 2)])
def test_swap_halves(shape):
    x = np.random.default_rng(0).normal(size=shape)
    half = shape[-1] // 2
    swapped = np.concatenate([x[..., half:], x[..., :half]], axis=-1)
    np.testing.assert_array_equal(swap_halves(jnp.asarray(x)), swapped)
    np.testing.assert_array_equal(swap_halves(swap_halves(jnp.asarray(x))), x)
    np.testing.assert_array_equal(swap_halves(jnp.asarray(x.T), axis=0), swapped.T)


def test_tied_logits():
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(2, 3, 6)), rng.normal(size=(5, 6))
    swapped = np.concatenate([table[:, 3:], table[:, :3]], axis=1)
    logits = tied_logits(jnp.asarray(hidden), jnp.asarray(table))
    np.testing.assert_allclose(logits, hidden @ swapped.T)
    plain = tied_logits(jnp.asarray(hidden), jnp.asarray(table), swap=False)
    np.testing.assert_allclose(plain, hidden @ table.T)
    # The gradient of the embedding is dense: every token is in the normaliser.
    loss = lambda e: jnp.sum(jax.nn.logsumexp(tied_logits(jnp.asarray(hidden), e), axis=-1))
    assert np.all(np.any(np.asarray(jax.grad(loss)(jnp.asarray(table))) != 0, axis=1))
    half = tied_logits(jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(table, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lazy_rows(optax.sgd(1.0), mode="rows"), "mode must be one of 'param', 'full'"),
        (lambda: swap_halves(jnp.ones(3)), "x must have an even size on axis -1"),
        (lambda: swap_halves(jnp.ones((2, 2)), axis=2), "axis must be one of the 2 axes"),
        (lambda: tied_logits(jnp.ones((2, 4)), jnp.ones((3, 2))), "embedding must be"),
        (lambda: tied_logits(jnp.ones((2, 3)), jnp.ones((4, 3))), "even size"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"embed/embeding": np.ones(5, bool)}, "Did you mean 'embed/embedding'"),
        ({"embed/embedding": np.ones(4, bool)}, r"must be bool of shape \(5,\); got bool of shape"),
        ({"embed/embedding": np.ones(5, np.int32)}, "got int32"),
    ],
)
def test_wrong_touched_rows(rows, message):
    optimizer = lazy_rows(optax.sgd(1.0))
    params = jax.tree.map(jnp.asarray, PARAMS)
    with pytest.raises(ValueError, match=message):
        optimizer.update(params, optimizer.init(params), params, touched_rows=rows)


def test_touched_rows_of_a_leaf_of_another_optimizer():
    """Under optax.masked the tree lacks the leaf; and the optimizer inside is told the rows too."""
    told = []

    def update(grads, state, params=None, **extra_args):
        told.append(extra_args)
        return grads, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    mask = {"embed": {"embedding": False}, "dense": {"kernel": True}}
    optimizer = optax.masked(lazy_rows(inner), mask)
    rows = {"embed/embedding": np.ones(5, bool)}
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, touched_rows=rows, x=1)
    assert told == [{"touched_rows": rows, "x": 1}]
    np.testing.assert_array_equal(updates["dense"]["kernel"], PARAMS["dense"]["kernel"])


def test_rows_are_those_of_the_last_axis():
    params = {"embedding": jnp.ones((2, 3, 4)), "scalar": {"embedding": jnp.ones(())}}
    grads = {
        "embedding": jnp.ones((2, 3, 4)).at[1, 2].set(0.0).at[0, 0, 1:].set(0.0),
        "scalar": {"embedding": jnp.zeros(())},
    }
    inner = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0, momentum=0.9))
    optimizer = lazy_rows(inner)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    expected = np.asarray(grads["embedding"]) + 0.5
    expected[1, 2] = 0  # the only row without any gradient
    np.testing.assert_array_equal(updates["embedding"], -expected)
    np.testing.assert_array_equal(optax.tree.get(state, "trace")["embedding"], expected)
    assert float(updates["scalar"]["embedding"]) == -0.5  # a scalar is never lazy
