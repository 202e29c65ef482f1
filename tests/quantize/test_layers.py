"""Layers hold state and call the functions; they train, jit, save and restore."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxkit.quantize import (
    FSQ,
    LFQ,
    CodebookState,
    ResidualVQ,
    VectorQuantizer,
    fsq,
    kmeans,
    lfq,
    lfq_entropy_loss,
    normalize,
    product_quantize,
    residual_quantize,
    spherical,
    vector_quantize,
)


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def equal(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


call = nnx.jit(lambda layer, z, **options: layer(z, **options), static_argnames=("train", "stages"))
decode = nnx.jit(lambda layer, index: layer.decode(index))
initialize = nnx.jit(
    lambda layer, key, z, **options: layer.initialize(key, z, **options),
    static_argnames=("method", "steps"),
)


@pytest.mark.parametrize("codebook", ["ema", "loss", "simvq", "frozen"])
@pytest.mark.parametrize(("heads", "shared"), [(1, False), (2, False), (2, True)])
def test_a_layer_is_its_function(codebook, heads, shared):
    layer = VectorQuantizer(
        6,
        8,
        codebook=codebook,
        heads=heads,
        shared=shared,
        estimator="rotation",
        init="normal",
        decay=0.9,
        dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    z, mask = random(5, 7, 6), jnp.arange(7)[None] < jnp.arange(3, 8)[:, None]
    quantize = vector_quantize if heads == 1 else product_quantize
    function = partial(
        quantize,
        update=True,
        codebook="loss" if codebook == "simvq" else codebook,
        estimator="rotation",
        decay=0.9,
    )
    expected = jax.jit(function)(layer.state(), z, mask=mask)
    before = layer.codebook()
    out = call(layer, z, mask=mask)
    equal(out[:3], expected[:3])
    equal(layer.codebook(), before)
    out = call(layer, z, mask=mask, train=True)
    equal(out, expected)
    equal(layer.state().ema, expected.state.ema)
    if codebook != "simvq":
        equal(layer.state(), expected.state)
    again = call(layer, z, mask=jnp.ones_like(mask))
    equal(decode(layer, again.index), again.z_q)
    assert out.index.shape == ((5, 7) if heads == 1 else (5, 7, 2))
    assert np.isnan(decode(layer, out.index)[~np.asarray(mask)]).all()
    trained = nnx.state(layer, nnx.Param)
    assert (len(jax.tree.leaves(trained)) > 0) == (codebook in ("loss", "simvq"))
    assert len(jax.tree.leaves(nnx.state(layer, CodebookState))) == 2 + (codebook != "loss")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("shared", [False, True])
def test_initialize_from_data(metric, shared):
    layer = VectorQuantizer(
        4, 5, heads=2, shared=shared, metric=metric, dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    z = 3 * random(40, 4)
    mask = jnp.arange(40) % 4 > 0
    error = lambda: float(call(layer, z, mask=mask).losses["commitment"])
    initialize(layer, jax.random.key(0), z, method="data", mask=mask)
    drawn = error()
    initialize(layer, jax.random.key(0), z, mask=mask)  # starts from the same rows
    assert error() < 0.9 * drawn
    np.testing.assert_array_equal(layer.state().ema.counts, 1)
    equal(layer.state().ema.sums, layer.codebook())
    if metric == "cosine":
        np.testing.assert_allclose(jnp.linalg.norm(layer.codebook(), axis=-1), 1, rtol=1e-12)
    if not shared:
        key = jax.random.split(jax.random.key(0), 2)[1]
        own = jax.jit(partial(kmeans, num_codes=5, steps=20, metric=metric))
        equal(layer.codebook()[1], own(key, z[:, 2:], mask=mask).codebook)


class AutoEncoder(nnx.Module):
    """An encoder, a quantizer and a decoder, linear."""

    def __init__(self, **options):
        rngs = nnx.Rngs(0)
        linear = partial(nnx.Linear, 4, 4, param_dtype=jnp.float64, rngs=rngs)
        self.encoder, self.decoder = linear(), linear()
        self.quantizer = VectorQuantizer(4, 16, dtype=jnp.float64, rngs=rngs, **options)

    def __call__(self, x, **options):
        out = self.quantizer(self.encoder(x), **options)
        return self.decoder(out.z_q), out


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "rotation"},
        {"codebook": "loss", "init": "normal", "revival_threshold": 0.5},
        {"codebook": "simvq"},
        {"estimator": "gumbel", "init": "normal"},
        {"heads": 2, "revival_threshold": 0.5, "temperature": 0.1},
    ],
)
def test_training_lowers_the_reconstruction_error(options):
    model = AutoEncoder(**options)
    x = random(128, 4)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def train(carry, key):
        model, optimizer = carry

        def loss(model):
            y, out = model(x, train=True, key=key)
            error = jnp.mean((x - y) ** 2)
            return error + sum(out.losses.values()), error

        grads, error = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, grads)
        return carry, error

    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction: float ** int
        _, values = train((model, optimizer), jax.random.split(jax.random.key(0), 400))
    assert values[-1] < 0.4 * np.mean(np.square(x))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(nnx.state(model)))


def test_revival_reaches_a_learned_codebook_inside_grad():
    layer = VectorQuantizer(
        2, 4, codebook="loss", revival_threshold=0.9, decay=0.5, dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    layer.codes[...] = jnp.array([[0.0, 0.0], [90.0, 90], [91, 90], [92, 90]])
    z = random(30, 2)

    @nnx.jit
    def step(layer, key):
        loss = lambda layer: sum(layer(z, train=True, key=key).losses.values())
        return nnx.grad(loss)(layer)

    step(layer, jax.random.key(0))
    codes = np.asarray(layer.codebook())
    np.testing.assert_array_equal(codes[0], 0)
    assert np.abs(codes[1:, None] - np.asarray(z)).max(-1).min(1).max() < 1e-14
    np.testing.assert_array_equal(layer.counts[1:], 0.9)


def test_temperature_is_for_training():
    layer = VectorQuantizer(2, 8, temperature=5.0, init="normal", rngs=nnx.Rngs(0))
    z = random(50, 2, dtype=jnp.float32)
    nearest = call(layer, z).index
    np.testing.assert_array_equal(call(layer, z).index, nearest)
    np.testing.assert_array_equal(call(layer, z, key=jax.random.key(0)).index, nearest)
    with pytest.raises(ValueError, match="key must be a random key"):
        layer(z, train=True)
    sampled = call(layer, z, train=True, key=jax.random.key(0)).index
    assert (np.asarray(sampled) != np.asarray(nearest)).any()


@pytest.mark.parametrize("heads", [1, 2])
def test_the_noise_of_gumbel_is_for_training(heads):
    """Without a key in evaluation; codes are parameters, and no loss pulls them together."""
    layer = VectorQuantizer(4, 8, estimator="gumbel", heads=heads, init="normal", rngs=nnx.Rngs(0))
    z = random(50, 4, dtype=jnp.float32)
    out = call(layer, z)
    equal(call(layer, z, key=jax.random.key(0)), out)
    equal(decode(layer, out.index), out.z_q)
    assert out.losses == {}
    assert len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == 1
    drawn = call(layer, z, train=True, key=jax.random.key(0))
    assert (np.asarray(drawn.index) != np.asarray(out.index)).any()
    assert float(jnp.sum(layer.counts[...])) != float(layer.counts[...].size)
    with pytest.raises(ValueError, match="key must be a random key"):
        layer(z, train=True)


def test_state_can_be_split_merged_and_set():
    build = lambda seed: ResidualVQ(
        3, (8, 4), init="normal", dtype=jnp.float64, rngs=nnx.Rngs(seed)
    )
    layer, other = build(0), build(1)
    z = random(20, 3)
    layer(z, train=True)
    graph, state = nnx.split(layer)
    equal(nnx.merge(graph, state)(z), layer(z))
    other.set_state(layer.state())
    equal(other(z), layer(z))


@pytest.mark.parametrize("codebook", ["ema", "loss", "simvq"])
def test_residual_layer_is_its_function(codebook):
    layer = ResidualVQ(
        3,
        (8, 4, 2),
        codebook=codebook,
        estimator="rotation",
        per_stage=True,
        init="normal",
        dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    z = random(30, 3)
    if codebook != "simvq":
        initialize(layer, jax.random.key(0), z, steps=5)
    function = partial(
        residual_quantize,
        update=True,
        codebook="loss" if codebook == "simvq" else codebook,
        estimator="rotation",
        per_stage=True,
    )
    expected = jax.jit(function)(layer.state(), z)
    out = call(layer, z, train=True)
    equal(out, expected)
    again = call(layer, z)
    equal(decode(layer, again.index), again.z_q)
    part = call(layer, z, stages=2)
    equal(decode(layer, part.index.astype(jnp.uint8)), part.z_q)
    assert np.isnan(layer.decode(jnp.array([8, 4, 2]))).all()


def test_fsq_and_lfq_layers():
    z = random(10, 4)
    layer = FSQ((8, 5, 5, 2), convention=("default", "paper", "default", "symmetric"))
    assert (layer.dim, layer.num_codes) == (4, 400)
    out = nnx.jit(lambda layer, z: layer(z))(layer, z)
    equal(out, fsq(z, layer.levels, convention=layer.convention))
    np.testing.assert_allclose(layer.decode(out.index), out.z_q, atol=1e-7)
    mask = jnp.arange(10) % 3 > 0
    for ball in (False, True):
        layer = LFQ(16, spherical=ball, entropy_weight=0.5, inv_temperature=2.0)
        out, losses = nnx.jit(lambda layer, z, mask: layer(z, mask=mask))(layer, z, mask)
        equal(out, spherical(z, mask=mask) if ball else lfq(z, mask=mask))
        vectors = normalize(z) if ball else z
        entropy = lfq_entropy_loss(
            vectors, scale=0.5 if ball else 1.0, inv_temperature=2.0, mask=mask
        )
        gap = np.asarray(vectors - out.z_q)[np.asarray(mask)]
        equal(losses, {"commitment": 0.25 * (gap**2).mean(), "entropy": 0.5 * entropy})
        decoded = np.asarray(layer.decode(out.index))
        np.testing.assert_allclose(decoded[np.asarray(mask)], out.z_q[mask], atol=1e-7)
        assert np.isnan(decoded[~np.asarray(mask)]).all()


@pytest.mark.x32
def test_layers_with_a_users_settings():
    z = random(16, 4, dtype=jnp.bfloat16)
    layer = VectorQuantizer(4, 8, estimator="rotation", rngs=nnx.Rngs(0))
    out = call(layer, z, train=True)
    assert out.z_q.dtype == jnp.bfloat16
    assert layer.codebook().dtype == jnp.float32


def test_errors_name_the_argument():
    rngs = nnx.Rngs(0)
    build = partial(VectorQuantizer, 4, 8, rngs=rngs)
    layer = build()
    cases = [
        (lambda: VectorQuantizer(0, 8, rngs=rngs), "dim must be at least 1"),
        (lambda: VectorQuantizer(4, 0, rngs=rngs), "num_codes must be at least 1"),
        (lambda: build(codebook="emma"), "Did you mean 'ema'"),
        (lambda: build(estimator="st"), "estimator must be one of"),
        (lambda: build(metric="dot"), "metric must be one of"),
        (lambda: build(init="zeros"), "init must be one of"),
        (lambda: build(heads=3), "heads must divide dim = 4"),
        (lambda: build(codebook="simvq", revival_threshold=1.0), "revival_threshold must be 0"),
        (lambda: layer(jnp.ones((3, 5))), "z must have 4 features"),
        (lambda: layer.initialize(jax.random.key(0), jnp.ones((3, 4)), method="x"), "method must"),
        (
            lambda: build(codebook="simvq").initialize(jax.random.key(0), jnp.ones((3, 4))),
            "codebook must not be 'simvq'",
        ),
        (lambda: ResidualVQ(4, (8, 8), stages=3, rngs=rngs), "stages must be 2"),
        (lambda: ResidualVQ(4, 8, stages=2, metric="cosine", rngs=rngs), "metric must be one of"),
        (lambda: FSQ((8, 1)), "levels must be at least 2"),
        (lambda: LFQ(12), "num_codes must be a power of 2; got 12"),
        (lambda: LFQ(16)(jnp.ones((3, 5))), "z must have 4 features"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="stages must be an integer"):
        ResidualVQ(4, 8, rngs=rngs)
