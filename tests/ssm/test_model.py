"""The sequence model: as a map, as a stream, over seeds, and trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkit.ssm import SequenceModel

SMALL = {"heads": 4, "state_size": 4, "l_max": 12, "dtype": jnp.float64}


def make(features_in=1, features_out=3, **options):
    return SequenceModel(features_in, features_out, rngs=nnx.Rngs(0), **SMALL | options)


def inputs(length=9):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, length, 1)))


ARMS = {
    "dplr": {},
    "diag-last-post": {"kernel": "diag", "init": "inv", "pooling": "last", "norm": "post"},
    "rtf": {"kernel": "rtf"},
    "s5": {"mixer": "s5"},
    "gru": {"mixer": "gru"},
    "lstm": {"mixer": "lstm", "layers": 1},
}


@pytest.mark.parametrize("arm", ARMS)
def test_step_by_step_classification_equals_the_convolutional_one(arm):
    model = make(**ARMS[arm])
    x = inputs()
    mask = jnp.arange(9)[None, :] < jnp.asarray([[9], [6]])
    systems, state = model.discretize(), model.init_state((2,))
    graph, values = nnx.split(model)

    def body(state, now):
        logits, state = nnx.merge(graph, values).step(state, now[0], mask=now[1], systems=systems)
        return state, logits

    steps = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(mask, 1, 0))
    _, logits = jax.lax.scan(body, state, steps)
    np.testing.assert_allclose(logits[-1], model(x, mask=mask), atol=1e-11)
    # Every prefix is classified as the model would classify it alone.
    np.testing.assert_allclose(logits[4], model(x[:, :5]), atol=1e-11)
    _, middle = model.prefill(state, x[:, :4], mask=mask[:, :4], systems=systems)
    filled, _ = model.prefill(middle, x[:, 4:], mask=mask[:, 4:], systems=systems)
    np.testing.assert_allclose(filled, model(x, mask=mask), atol=1e-11)


def test_padding_that_the_mask_drops_has_no_influence():
    for options in ({}, {"pooling": "last"}, {"kernel": "diag", "bidirectional": True}):
        model = make(**options)
        x = inputs()
        mask = jnp.arange(9)[None, :] < jnp.asarray([[5], [5]])
        short = model(x[:, :5])
        np.testing.assert_allclose(model(x, mask=mask), short, atol=1e-12)
        np.testing.assert_allclose(model(x.at[:, 5:].set(7.0), mask=mask), short, atol=1e-12)
    nothing = make()(inputs(), mask=jnp.zeros((2, 9), bool))
    assert bool(jnp.isfinite(nothing).all())


def test_generation_equals_repeated_prediction():
    model = make(5, 5, encoder="embedding", pooling="none")
    prompt = jnp.asarray([[1, 4, 2], [0, 3, 3]])
    drawn = model.generate(prompt, 4, key=jax.random.key(0), temperature=0.0)
    tokens = prompt
    for _ in range(4):
        # A causal model: padding on the right keeps one shape, and one compilation.
        padded = jnp.pad(tokens, ((0, 0), (0, 7 - tokens.shape[1])))
        following = jnp.argmax(model(padded)[:, tokens.shape[1] - 1], axis=-1)
        tokens = jnp.concatenate([tokens, following[:, None].astype(tokens.dtype)], axis=1)
    np.testing.assert_array_equal(drawn, tokens[:, 3:])
    assert drawn.dtype == prompt.dtype
    one = model.generate(prompt, 1, key=jax.random.key(1))
    assert one.shape == (2, 1)
    assert bool(((one >= 0) & (one < 5)).all())


def test_dropout_needs_a_key_and_follows_it():
    model = make(dropout=0.5)
    x = inputs()
    plain = model(x)
    np.testing.assert_array_equal(model(x), plain)
    first, again, other = (model(x, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-6
    assert float(jnp.abs(first - plain).max()) > 1e-6


def test_rate_of_the_whole_model():
    model = make(kernel="diag", init="lin")
    rated = make(kernel="diag", init="lin")
    for block in rated.blocks:
        block.mixer.log_step[...] = block.mixer.log_step[...] + np.log(2.0)
    np.testing.assert_allclose(model(inputs(), rate=2.0), rated(inputs()), atol=1e-13)


def test_seeds_vmap_and_one_step_learns():
    create = lambda key: nnx.state(SequenceModel(1, 3, rngs=nnx.Rngs(key), **SMALL))
    graph, _ = nnx.split(make())
    states = jax.vmap(create)(jax.random.split(jax.random.key(0), 3))
    x, label = inputs(), jnp.asarray([0, 2])

    def loss(state):
        logits = nnx.merge(graph, state)(x)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1))

    both = jax.jit(jax.vmap(jax.value_and_grad(loss)))
    before, grads = both(states)
    assert len(set(np.asarray(before).tolist())) == 3
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    for name in ("log_neg_re", "im", "p", "b", "c", "log_step", "d"):
        assert float(jnp.abs(grads["blocks"][0]["mixer"][name][...]).max()) > 0, name
    moved = jax.tree.map(lambda value, grad: value - 0.01 * grad, states, grads)
    after, _ = both(moved)
    assert bool((after < before).all())


@pytest.mark.x32
def test_float32():
    model = make(dtype=jnp.float32, pooling="none")
    y = model(inputs().astype(jnp.float32))
    assert y.shape == (2, 9, 3)
    assert y.dtype == jnp.float32


def test_errors_name_the_argument():
    model = make()
    cases = [
        (lambda: make(mixer="s6"), "mixer must be one of"),
        (lambda: make(encoder="conv"), "encoder must be one of"),
        (lambda: make(pooling="max"), "pooling must be one of"),
        (lambda: make(norm="both"), "norm must be one of"),
        (lambda: make(layers=0), "layers must be at least 1"),
        (lambda: make(dropout=1.0), "dropout must be less than 1"),
        (lambda: make(mixer="gru", dt_min=0.1), "dt_min must not be given"),
        (lambda: make(mixer="gru", bidirectional=True), "bidirectional must not be given"),
        (lambda: model(jnp.ones((2, 9, 2))), "x must have features_in = 1"),
        (lambda: model(inputs(), mask=jnp.ones((2, 8), bool)), "mask must have shape"),
        (lambda: model(inputs(13)), "length must be at most l_max = 12"),
        (lambda: make(bidirectional=True).discretize(), "bidirectional must be False"),
        (lambda: model.generate(jnp.ones((2, 3), int), 2, key=jax.random.key(0)), "generate"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="x must be real"):
        model(jnp.ones((2, 9, 1), int))
    with pytest.raises(TypeError, match="x must be integer tokens"):
        make(5, 5, encoder="embedding")(jnp.ones((2, 9)))
