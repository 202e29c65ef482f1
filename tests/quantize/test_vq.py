"""The whole step, SimVQ, product and residual codes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxkit.quantize import (
    ESTIMATORS,
    EMAState,
    batch_statistics,
    commitment_loss,
    ema_codebook,
    ema_init,
    ema_update,
    entropy_loss,
    estimate,
    lookup,
    merge_heads,
    nearest_code,
    normalize,
    orthogonality_loss,
    product_quantize,
    residual_init,
    residual_quantize,
    simvq_codebook,
    simvq_init,
    split_heads,
    vector_quantize,
    vq_init,
)


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def equal(got, expected, **options):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-13, "atol": 1e-13} | options)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_step_is_its_parts(metric):
    z, state = random(4, 9, 3), vq_init(random(6, 3, seed=1))
    mask = jnp.asarray(np.random.default_rng(2).random((4, 9)) > 0.3)
    out = jax.jit(
        partial(
            vector_quantize,
            update=True,
            metric=metric,
            estimator="rotation",
            orthogonality_weight=2.0,
            entropy_weight=3.0,
            decay=0.8,
        )
    )(state, z, mask=mask)
    unit = normalize if metric == "cosine" else lambda x: x
    vectors, codes = unit(z), unit(state.codebook)
    index = nearest_code(vectors, codes, mask=mask)
    np.testing.assert_array_equal(out.index, index)
    q = lookup(codes, index, pad="zeros")
    equal(out.z_q, q)
    equal(out.losses["commitment"], 0.25 * commitment_loss(vectors, q, mask=mask))
    equal(out.losses["orthogonality"], 2 * orthogonality_loss(codes))
    equal(out.losses["entropy"], 3 * entropy_loss(vectors, codes, mask=mask))
    ema = ema_update(
        ema_init(state.codebook), *batch_statistics(vectors, index, 6, mask=mask), decay=0.8
    )
    equal(out.state.ema, ema)
    equal(out.state.codebook, unit(ema_codebook(ema)))
    same = vector_quantize(state, z, metric=metric)
    equal(same.state, state)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("codebook", ["ema", "loss", "frozen"])
def test_gradients_go_where_they_should(estimator, codebook):
    z, codes = random(9, 3), random(6, 3, seed=1)
    g = random(9, 3, seed=2)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(z, codes):
        out = vector_quantize(
            vq_init(codes), z, estimator=estimator, codebook=codebook, update=True
        )
        return jnp.sum(g * out.z_q) + sum(out.losses.values()), out

    (dz, dc), out = run(z, codes)
    q = lookup(codes, out.index)
    task = jax.vjp(lambda z: estimate(z, q, estimator=estimator), z)[1](g)[0]
    equal(dz, task + 0.25 * 2 * (z - q) / z.size)
    expected = np.zeros((6, 3))
    if codebook == "loss":
        np.add.at(expected, np.asarray(out.index), np.asarray(2 * (q - z) / z.size))
    if estimator == "none":
        np.add.at(expected, np.asarray(out.index), np.asarray(g))
    equal(dc, expected)
    assert ("codebook" in out.losses) == (codebook == "loss")
    moved = float(jnp.max(jnp.abs(out.state.codebook - codes)))
    assert (moved > 0) == (codebook == "ema")
    assert float(jnp.max(jnp.abs(out.state.ema.counts - 1))) > 0  # usage is always followed


def test_the_new_state_carries_no_gradient():
    z, state = random(9, 3), vq_init(random(6, 3, seed=1))
    run = lambda z: jnp.sum(vector_quantize(state, z, update=True).state.codebook ** 2)
    np.testing.assert_array_equal(jax.grad(run)(z), 0)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_shows_and_stays_out_of_the_state(bad, metric):
    state = vq_init(random(6, 3, seed=1))
    z = random(8, 3)
    dirty = z.at[2, 1].set(bad)
    quantize = jax.jit(
        partial(
            vector_quantize,
            update=True,
            metric=metric,
            revival_threshold=0.995,
            key=jax.random.key(0),
        )
    )
    out = quantize(state, dirty)
    assert int(out.index[2]) == 6
    assert np.isnan(out.z_q[2]).all()
    assert np.isfinite(np.delete(np.asarray(out.z_q), 2, 0)).all()
    assert np.isnan(out.losses["commitment"])
    equal(out.state.ema.counts, quantize(state, dirty, mask=jnp.arange(8) != 2).state.ema.counts)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out.state))
    # Masked, the same row is as if it were not there.
    mask = jnp.arange(8) != 2
    masked = quantize(state, dirty, mask=mask)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(masked))
    np.testing.assert_array_equal(masked.z_q[2], 0)

    @jax.jit
    @jax.grad
    def gradient(z):
        out = vector_quantize(
            state, z, mask=mask, metric=metric, estimator="rotation", entropy_weight=1.0
        )
        return jnp.sum(jnp.sin(out.z_q)) + sum(out.losses.values())

    equal(gradient(dirty), gradient(z))
    np.testing.assert_array_equal(gradient(dirty)[2], 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(dtype):
    codebook = random(6, 3, seed=1, dtype=jnp.float32)
    z = random(9, 3, dtype=dtype)
    for metric in ("euclidean", "cosine"):
        out = vector_quantize(
            vq_init(codebook), z, update=True, metric=metric, estimator="rotation"
        )
        assert out.z_q.dtype == dtype
        codes = normalize(codebook) if metric == "cosine" else codebook
        expected = lookup(codes, out.index).astype(dtype)
        assert np.asarray(out.z_q).tobytes() == np.asarray(expected).tobytes()
        assert {x.dtype.name for x in jax.tree.leaves((out.losses, out.state))} == {"float32"}
    gradient = jax.grad(lambda z: vector_quantize(vq_init(codebook), z).losses["commitment"])(z)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("codebook", ["ema", "loss"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_revival_brings_back_every_code(codebook, metric):
    """Codes far from all data: without revival a single one is used for ever."""
    far = vq_init(jnp.array([[0.1, 0.0]] + [[-50.0, -50.0 - i] for i in range(7)]))
    z = jnp.abs(random(64, 2))
    step = partial(vector_quantize, update=True, codebook=codebook, metric=metric, decay=0.5)

    @jax.jit
    @jax.vmap
    def run(threshold):  # 0: without revival
        one = lambda state, key: step(state, z, key=key, revival_threshold=threshold, reset_size=2)
        return jax.lax.scan(
            lambda state, key: (one(state, key).state, one(state, key).index),
            far,
            jax.random.split(jax.random.key(0), 5),
        )

    (_, state), (without, revived) = (
        [jax.tree.map(lambda x, i=i: x[i], part) for i in range(2)]
        for part in run(jnp.array([0.0, 0.9]))
    )
    assert len(set(without[-1].tolist())) == 1
    assert len(set(revived[-1].tolist())) >= 6
    rows = np.asarray(normalize(z) if metric == "cosine" else z)
    if codebook == "loss":
        # Codes are rows of the batch, and the one that lived was not touched.
        gap = np.abs(np.asarray(state.codebook)[1:, None] - rows).max(-1).min(1)
        assert gap.max() < 1e-12
        np.testing.assert_array_equal(state.codebook[0], far.codebook[0])


def test_sampling_and_gumbel():
    z, state = random(3000, 2), vq_init(random(4, 2, seed=1))
    key = jax.random.key(0)
    out = jax.jit(partial(vector_quantize, temperature=1.0))(state, z, key=key)
    nearest = jax.jit(vector_quantize)(state, z)
    assert 0.2 < float(jnp.mean(out.index == nearest.index)) < 0.95
    np.testing.assert_array_equal(out.z_q, lookup(state.codebook, out.index))

    def loss(codes, codebook):
        out = vector_quantize(
            vq_init(codes), z, estimator="gumbel", key=key, codebook=codebook, codebook_weight=0.0
        )
        return jnp.sum(out.z_q * random(3000, 2, seed=3))

    assert float(jnp.max(jnp.abs(jax.grad(loss)(state.codebook, "loss")))) > 0.1
    np.testing.assert_array_equal(jax.grad(loss)(state.codebook, "ema"), 0)
    run = jax.jit(partial(vector_quantize, estimator="gumbel", metric="cosine"))
    gumbel = run(state, z, key=key)
    np.testing.assert_allclose(jnp.linalg.norm(gumbel.z_q, axis=-1), 1, rtol=1e-12)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_gumbel_without_a_key_takes_the_nearest_code(metric):
    """With the gradient of the mixture, its noise left out; and without losses of its own."""
    z, codes, g = random(9, 3), random(6, 3, seed=1), random(9, 3, seed=2)
    unit = normalize if metric == "cosine" else lambda x: x

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(z, codes):
        out = vector_quantize(vq_init(codes), z, estimator="gumbel", metric=metric)
        return jnp.sum(g * out.z_q), out

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def mixture(z, codes):
        z, codes = unit(z), unit(codes)
        distances = jnp.sum((z[:, None] - codes[None]) ** 2, axis=-1)
        return jnp.sum(g * (jax.nn.softmax(-distances) @ codes))

    gradient, out = run(z, codes)
    np.testing.assert_array_equal(out.index, nearest_code(z, codes, metric=metric))
    equal(out.z_q, lookup(unit(codes), out.index))
    assert out.losses == {}
    equal(gradient, mixture(z, codes))


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"estimator": "gumbel"}])
def test_devices_draw_noise_of_their_own(options):
    """From one key, with which all of them revive the same codes."""
    z = jnp.tile(random(9, 3), (8, 1))
    state = vq_init(random(6, 3, seed=1))

    def step(z):
        out = vector_quantize(
            state,
            z,
            update=True,
            key=jax.random.key(0),
            revival_threshold=1.0,
            axis_name="data",
            **options,
        )
        return out.index, out.state

    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()))
    index, new = jax.jit(spread)(z)
    assert len({tuple(row) for row in np.asarray(index).reshape(8, 9)}) == 8
    counts = 0.99 + 0.01 * np.bincount(np.asarray(index), minlength=6)
    np.testing.assert_allclose(new.ema.counts, np.maximum(counts, 1.0), rtol=1e-14)


def test_product_codes_are_one_quantizer_a_head():
    z, codebooks = random(5, 8, 6), random(2, 7, 3, seed=1)
    mask = jnp.asarray(np.random.default_rng(2).random((5, 8)) > 0.3)
    options = {"update": True, "estimator": "rotation"}
    one = jax.jit(partial(vector_quantize, **options))
    out = jax.jit(partial(product_quantize, **options))(jax.vmap(vq_init)(codebooks), z, mask=mask)
    assert out.index.shape == (5, 8, 2)
    for head in range(2):
        own = one(vq_init(codebooks[head]), split_heads(z, 2)[..., head, :], mask=mask)
        equal(split_heads(out.z_q, 2)[..., head, :], own.z_q)
        np.testing.assert_array_equal(out.index[..., head], own.index)
        equal(jax.tree.map(lambda x, head=head: x[head], out.state), own.state)
    shared = jax.jit(partial(product_quantize, **options))(vq_init(codebooks[0]), z, mask=mask)
    own = one(vq_init(codebooks[0]), split_heads(z, 2), mask=jnp.stack([mask, mask], -1))
    equal(shared, own._replace(z_q=merge_heads(own.z_q)))
    keyed = jax.jit(partial(product_quantize, temperature=1.0))(
        jax.vmap(vq_init)(codebooks), z, key=jax.random.key(0)
    )
    assert keyed.index.shape == (5, 8, 2)


def test_residual_codes():
    z = random(50, 4)
    states = [vq_init(random(n, 4, seed=n) / (i + 1)) for i, n in enumerate((5, 6, 7))]
    out = jax.jit(partial(residual_quantize, update=True))(states, z)
    residual, total, losses = np.asarray(z), 0.0, 0.0
    one = jax.jit(partial(vector_quantize, update=True))
    for stage, state in enumerate(states):
        own = one(state, jnp.asarray(residual))
        np.testing.assert_array_equal(out.index[:, stage], own.index)
        equal(out.state[stage], own.state)
        total = total + np.asarray(own.z_q)
        losses = losses + own.losses["commitment"]
        residual = residual - np.asarray(own.z_q)
    equal(out.z_q, total)
    equal(out.losses["commitment"], losses)


@pytest.mark.parametrize("estimator", ["ste", "rotation", "reflection"])
def test_estimator_once_or_per_stage(estimator):
    z, g = random(8, 4), random(8, 4, seed=9)
    states = [vq_init(random(5, 4, seed=seed)) for seed in (1, 2, 3)]

    def gradient(per_stage):
        loss = lambda z: jnp.sum(
            g * residual_quantize(states, z, estimator=estimator, per_stage=per_stage).z_q
        )
        return jax.jit(jax.grad(loss))(z)

    total = residual_quantize(states, z).z_q
    once = jax.vjp(lambda z: estimate(z, total, estimator=estimator), z)[1](g)[0]
    equal(gradient(False), once)
    if estimator == "ste":
        np.testing.assert_allclose(gradient(False), g, atol=1e-14)
        np.testing.assert_allclose(gradient(True), 3 * g, atol=1e-14)
        return
    # Every stage has a G of its own residual.
    residual, expected = z, 0
    for state in states:
        q = vector_quantize(state, residual).z_q
        pull = jax.vjp(lambda z, q=q: estimate(z, q, estimator=estimator), residual)[1]
        expected = expected + pull(g)[0]
        residual = residual - q
    equal(gradient(True), expected)


def test_residual_stages_can_be_left_out():
    z = random(9, 4)
    states = [vq_init(random(5, 4, seed=seed)) for seed in (1, 2, 3)]
    run = jax.jit(partial(residual_quantize, update=True))
    two = run(states[:2], z)
    for stages in (2, jnp.array(2)):
        out = run(states, z, stages=stages)
        equal(out.z_q, two.z_q)
        equal(out.losses, two.losses)
        equal(out.state[:2], two.state)
        equal(out.state[2], states[2])
        np.testing.assert_array_equal(out.index[:, 2], 5)
    numbers = jnp.arange(9) % 3 + 1
    each = run(states, z, stages=numbers)
    for row in range(9):
        one = run(states, z[row], stages=numbers[row])
        equal(each.z_q[row], one.z_q)
        np.testing.assert_array_equal(each.index[row], one.index)


def test_residual_masks_and_initialisation():
    z = random(200, 4)
    mask = jnp.arange(200) % 5 > 0
    dirty = jnp.where(mask[:, None], z, jnp.nan)
    run = jax.jit(lambda states, stages: residual_quantize(states, dirty, mask=mask, stages=stages))
    init = jax.jit(partial(residual_init, num_codes=(16, 8, 4), steps=8), static_argnames="method")
    for method in ("kmeans", "data"):
        states = init(jax.random.key(0), dirty, method=method, mask=mask)
        assert [s.codebook.shape for s in states] == [(16, 4), (8, 4), (4, 4)]
        errors = []
        for stages in (1, 2, 3):
            out = run(states, jnp.int32(stages))
            np.testing.assert_array_equal(out.z_q[~mask], 0)
            errors.append(float(jnp.mean((out.z_q - z)[mask] ** 2)))
        assert errors[0] > errors[1] > errors[2] or method == "data"
        assert np.isfinite(errors).all()


def test_simvq_moves_all_codes_at_once():
    frozen, weight = simvq_init(jax.random.key(0), 64, 4, dtype=jnp.float64)
    np.testing.assert_allclose(jnp.std(frozen), 0.5, rtol=0.15)
    np.testing.assert_array_equal(simvq_codebook(frozen, weight), frozen)
    w = random(4, 4)
    np.testing.assert_allclose(
        simvq_codebook(frozen, w, bias=jnp.arange(4.0)),
        np.asarray(frozen) @ np.asarray(w) + np.arange(4),
        atol=1e-14,
    )
    z = frozen[:1] + 0.01  # one code is used

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradient(frozen, weight):
        state = vq_init(simvq_codebook(frozen, weight))
        return vector_quantize(state, z, codebook="loss").losses["codebook"]

    df, dw = gradient(frozen, weight)
    np.testing.assert_array_equal(df, 0)
    moved = jnp.abs(simvq_codebook(frozen, weight - 0.1 * dw) - frozen).max(1)
    assert float(moved.min()) > 0


def test_errors_name_the_argument():
    z, state, key = jnp.ones((4, 3)), vq_init(jnp.ones((5, 3))), jax.random.key(0)
    run = partial(vector_quantize, state, z)
    many = jax.vmap(vq_init)(jnp.ones((2, 5, 3)))
    cases = [
        (lambda: run(estimator="rot"), "estimator must be one of"),
        (lambda: run(codebook="sgd"), "codebook must be one of"),
        (lambda: run(metric="dot"), "metric must be one of"),
        (lambda: run(update=True, decay=1.0), r"decay must be in \[0, 1\)"),
        (lambda: run(update=True, smoothing="x"), "smoothing must be one of"),
        (lambda: run(commitment_weight=-1.0), "commitment_weight must be at least 0"),
        (lambda: run(temperature=1.0), "key must be a random key"),
        (lambda: run(estimator="gumbel", update=True), "key must be a random key"),
        (lambda: run(update=True, revival_threshold=1.0), "key must be a random key"),
        (lambda: run(codebook="frozen", revival_threshold=1.0), "revival_threshold must be 0"),
        (lambda: run(mask=jnp.ones(3, bool)), "mask must have shape"),
        (lambda: vector_quantize(state, z[:, :2]), "z must have 3 features"),
        (lambda: vector_quantize(many, z), "codebook must be"),
        (lambda: product_quantize(many, z), r"z must have heads"),
        (lambda: product_quantize(many, jnp.ones((4, 6)), mask=jnp.ones(3, bool)), "mask must"),
        (lambda: split_heads(z, 2), "heads must divide the 3 features"),
        (lambda: residual_quantize([], z), "states must hold at least one"),
        (lambda: residual_quantize([state], z, estimator="gumbel"), "estimator must be one of"),
        (lambda: residual_quantize([state], z, metric="cosine"), "metric must be one of"),
        (lambda: residual_quantize([state], z, stages=-1), "stages must be at least 0"),
        (lambda: residual_init(key, z, (4, 5), stages=3), "stages must be 2"),
        (lambda: residual_init(key, z, ()), "num_codes must hold"),
        (lambda: residual_init(key, z, 4, stages=2, method="x"), "method must be one of"),
        (lambda: simvq_init(key, 0, 3), "num_codes must be at least 1"),
        (lambda: simvq_codebook(z, jnp.ones((2, 2))), "weight must have shape"),
        (lambda: simvq_codebook(z, jnp.eye(3), bias=jnp.ones(2)), "bias must have shape"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="z must be an array of real"):
        vector_quantize(state, z.astype(int))
    with pytest.raises(TypeError, match="mask must be a boolean"):
        run(mask=jnp.ones(4))
    assert isinstance(state.ema, EMAState)


def test_an_empty_batch_revives_nothing():
    state = vq_init(random(4, 3))
    out = vector_quantize(
        state,
        jnp.zeros((0, 3)),
        update=True,
        key=jax.random.key(0),
        revival_threshold=2.0,
        decay=0.5,
    )
    assert out.z_q.shape == (0, 3)
    np.testing.assert_allclose(out.state.codebook, state.codebook, rtol=1e-5)
