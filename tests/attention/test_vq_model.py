"""The language model: as a map, as a stream, generating, trained, and over devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxkit_experiments.training import train

from jaxkit.attention import vq
from tests.attention.vq_cases import XLA, jit

SMALL = {"dim": 8, "layers": 2, "key_dim": 4, "num_codes": 5, "block_length": 3}


def make(vocab=7, seed=0, **options):
    options = SMALL | {"param_dtype": jnp.float64} | XLA | options
    return vq.VQTransformer(vocab, rngs=nnx.Rngs(seed), **options)


def tokens(length=11, batch=2, vocab=7, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, length)))


@pytest.mark.parametrize(
    "options",
    [{}, {"head_type": "mqa", "bias": "table", "positions": "sinusoids", "tied": True}],
    ids=["shga", "mqa"],
)
def test_map_and_stream_agree_and_padding_goes_unseen(options):
    model = make(**options)
    x = tokens()
    # The second sequence is two tokens shorter, padded on the left.
    mask = jnp.arange(11)[None] >= jnp.asarray([[0], [2]])

    @jit
    def run(x):
        whole = model(x, mask=mask)
        first, state = model.prefill(model.init_state((2,)), x[:, :6], mask=mask[:, :6])
        one, state = model.step(state, x[:, 6], mask=mask[:, 6])
        rest, state = model.prefill(state, x[:, 7:], mask=mask[:, 7:])
        return whole, jnp.concatenate([first, one[:, None], rest], axis=1), state.position

    whole, pieces, position = run(x)
    assert whole.shape == (2, 11, 7)
    assert int(position) == 11
    np.testing.assert_allclose(pieces, whole, atol=1e-12)
    other = run(x.at[1, :2].set(3))[0]
    np.testing.assert_allclose(other[1, 2:], whole[1, 2:], atol=1e-12)
    if "positions" not in options:
        alone = jit(lambda x: model(x))(x[1:, 2:])
        np.testing.assert_allclose(alone, whole[1:, 2:], atol=1e-12)


def test_generation_equals_repeated_prediction():
    model = make()
    prompt = tokens(4)
    run = jit(lambda p: model.generate(p, 9, key=jax.random.key(0), temperature=0.0))
    drawn = run(prompt)
    assert drawn.shape == (2, 9)
    assert drawn.dtype == prompt.dtype
    whole = jnp.concatenate([prompt, drawn], axis=1)
    logits = jit(lambda x: model(x))(whole)
    np.testing.assert_array_equal(jnp.argmax(logits[:, 3:-1], axis=-1), drawn)


def test_sampling_cuts_to_the_most_likely():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = lambda **o: np.asarray(jax.vmap(lambda k: vq.sample_token(k, logits, **o))(keys))
    share = lambda drawn: [np.bincount(column, minlength=4) / 2000 for column in drawn.T]
    plain = share(draw())
    np.testing.assert_allclose(plain[0], [0.4, 0.3, 0.2, 0.1], atol=0.05)
    np.testing.assert_allclose(plain[1], [0.1, 0.2, 0.3, 0.4], atol=0.05)
    np.testing.assert_allclose(share(draw(top_k=2))[0], [4 / 7, 3 / 7, 0, 0], atol=0.05)
    np.testing.assert_allclose(share(draw(top_p=0.65))[1], [0, 0, 3 / 7, 4 / 7], atol=0.05)
    assert (draw(top_p=1e-9)[:, 0] == 0).all()
    cold = np.array([0.4, 0.3, 0.2, 0.1]) ** 2
    np.testing.assert_allclose(share(draw(temperature=0.5))[0], cold / cold.sum(), atol=0.05)
    assert draw(temperature=0.0)[0].tolist() == [0, 3]
    assert (share(draw(top_k=9))[0] > 0).all()


def test_loss_is_the_mean_cross_entropy_plus_the_commitment():
    model = make()
    x = tokens()
    mask = jnp.arange(11)[None] >= jnp.asarray([[0], [3]])
    loss, aux = jit(lambda x: vq.next_token_loss(model, x, mask=mask, commitment_weight=0.5))(x)
    logits, found = jit(lambda x: model(x, mask=mask, statistics=True))(x)
    logp = np.log(np.asarray(jax.nn.softmax(logits)))
    chosen = np.take_along_axis(logp[:, :-1], np.asarray(x)[:, 1:, None], -1)[..., 0]
    expected = -chosen[np.asarray(mask)[:, 1:]].mean()
    np.testing.assert_allclose(aux.cross_entropy, expected, rtol=1e-12)
    commitment = sum(float(layer.commitment) for layer in found)
    np.testing.assert_allclose(loss, expected + 0.5 * commitment, rtol=1e-12)
    np.testing.assert_allclose(aux.commitment, commitment, rtol=1e-12)
    assert [int(layer.counts.sum()) for layer in aux.statistics] == [int(mask.sum())] * 2
    given, _ = jit(
        lambda x: vq.next_token_loss(
            model, x, targets=jnp.roll(x, -1, 1), loss_mask=jnp.arange(11)[None] + 0 * x < 10
        )
    )(x)
    shifted, _ = jit(lambda x: vq.next_token_loss(model, x))(x)
    np.testing.assert_allclose(given, shifted, rtol=1e-12)
    assert vq.bits_per_byte(math.log(2), bytes_per_token=4) == 0.25


@pytest.mark.x32
def test_trains_with_its_codebooks_over_seeds():
    """A periodic sequence: the loss falls, and codes move to the keys that there are."""
    data = [{"x": np.tile(np.arange(6) + s, 4)[None].repeat(4, 0) % 7} for s in range(40)]

    def loss(model, batch, key):
        value, aux = vq.next_token_loss(model, batch["x"], commitment_weight=1e-2, key=key)
        model.update_codebooks(aux.statistics, key=key, threshold=0.05)
        return value, {"commitment": aux.commitment}

    result = train(
        init=lambda key: vq.VQTransformer(
            7,
            **SMALL | {"block_length": 8, "dropout": 0.1, "layer_drop": 0.1, "bias": "table"},
            rngs=nnx.Rngs(key),
            decay=0.8,
            **XLA,
        ),
        loss=loss,
        optimizer=optax.adam(2e-2),
        batches=[data] * 2,
        steps=40,
        seeds=(0, 1),
        chunk=20,
    )
    first, last = (np.asarray(record["loss"]) for record in result.history)
    assert (last < first - 0.3).all()
    assert (result.history[1]["commitment"] < np.asarray(result.history[0]["commitment"])).all()
    for state in result.model(0).codebooks():
        np.testing.assert_allclose(float(state.counts.sum()), 4 * 24, rtol=0.05)


def test_pure_loss_and_update_over_eight_devices():
    model = make(head_type="mqa")
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jit
    def step(params, books, x):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            model.set_codebooks(books)
            return vq.next_token_loss(model, x)

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, grads, vq.update_codebooks(books, aux.statistics)

    x = tokens(6, batch=8)
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    one, eight = (step(params, model.codebooks(), batch) for batch in (x, spread))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    changed = one[2][0].counts - model.codebooks()[0].counts
    assert float(jnp.abs(changed).max()) > 1e-3


def test_codebooks_from_data_fit_better():
    model = make(codebook_init="normal")
    x = tokens(40)
    run = jit(lambda books, x: _commitment(model, books, x))
    before = run(model.codebooks(), x)
    model.init_codebooks(jax.random.key(0), x, method="kmeans", steps=5)
    assert float(run(model.codebooks(), x)) < 0.5 * float(before)


def _commitment(model, books, x):
    copy = nnx.clone(model)
    copy.set_codebooks(books)
    return vq.next_token_loss(copy, x)[1].commitment


def test_unknown_tokens_show():
    model = make(layers=1)
    logits = jit(lambda x: model(x))(jnp.asarray([[1, 7, 2], [1, 2, -1]]))
    assert bool(jnp.isnan(logits[0, 1]).all())
    assert bool(jnp.isnan(logits[1, 2]).all())
    assert bool(jnp.isfinite(logits[1, :2]).all())


def test_errors_name_the_argument():
    model = make()
    cases = [
        (lambda: make(positions="learned"), "positions must be one of"),
        (lambda: make(tied=True, outputs=3), "outputs must be vocab_size = 7 with tied=True"),
        (lambda: make(layers=0), "layers must be at least 1"),
        (lambda: make(dropout=1.0), "dropout must be less than 1"),
        (lambda: make(layer_drop=-0.1), "layer_drop must be at least 0"),
        (lambda: model.generate(tokens(), 0, key=jax.random.key(0)), "steps must be at least 1"),
        (lambda: model.generate(tokens(0), 2, key=jax.random.key(0)), "at least one token"),
        (
            lambda: make(outputs=3).generate(tokens(), 2, key=jax.random.key(0)),
            "outputs must be vocab_size = 7 to generate",
        ),
        (
            lambda: make(quantizer="none", bias="table").init_state((1,)),
            "causal must be True and quantizer",
        ),
        (lambda: vq.next_token_loss(model, tokens(), targets=tokens(3)), "targets must have shape"),
        (lambda: model(tokens(), mask=jnp.ones((2, 3), bool)), "mask must have shape"),
        (lambda: model.set_codebooks(()), "states must have one entry"),
        (lambda: vq.sample_token(None, jnp.ones(3), top_k=0), "top_k must be at least 1"),
        (lambda: vq.sample_token(None, jnp.ones(3), top_p=0.0), "top_p must be greater than 0"),
        (lambda: vq.sample_token(None, jnp.ones(3), temperature=-1.0), "temperature must be"),
        (lambda: vq.bits_per_byte(1.0, bytes_per_token=0), "bytes_per_token must be"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="tokens must be integers"):
        model(jnp.ones((2, 3)))
