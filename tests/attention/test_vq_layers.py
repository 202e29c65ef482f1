"""The layer: against NumPy, as a map and as a stream, and its codebook as state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkit.attention import vq
from jaxkit.quantize import EMAState
from tests.attention.vq_cases import XLA, by_hand, jit

DIM = 8


def make(**options):
    base = {"key_dim": 4, "num_codes": 6, "block_length": 3, "param_dtype": jnp.float64}
    layer = vq.VQAttention(DIM, rngs=nnx.Rngs(0), **base | XLA | options)
    rng = np.random.default_rng(7)
    for name in ("table", "u", "w", "norm_gain", "norm_bias"):
        if hasattr(layer, name):
            value = getattr(layer, name)
            noise = jnp.asarray(rng.standard_normal(value.shape), value[...].dtype)
            value[...] = value[...] + noise
    return layer


def inputs(length=11, batch=(2,), seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*batch, length, DIM)))


def norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def layer_by_hand(layer, x):
    """The card's layer, in NumPy."""
    silu = lambda x: x / (1 + np.exp(-x))
    weight = lambda linear: np.asarray(linear.kernel[...])
    x = np.asarray(x)
    y = norm(x) * np.asarray(layer.norm_gain[...]) + np.asarray(layer.norm_bias[...])
    split = lambda x, n: np.moveaxis(x.reshape(*x.shape[:2], n, -1), 2, 1)
    scale = layer.key_dim**-0.25
    q = norm(split(y @ weight(layer.query), layer.heads)) * scale
    k = norm(split(y @ weight(layer.key), layer.groups)) * scale
    v = split(y @ weight(layer.value), layer.groups)
    assert np.allclose(np.linalg.norm(k, axis=-1), layer.key_dim**0.25, rtol=1e-4)
    if layer.gated:
        v = silu(v)
    bias = None
    if layer.bias_type == "table":
        bias = np.asarray(layer.table[...])
    if layer.bias_type == "xl":
        omega = 1e5 ** (-np.arange(0, DIM, 2) / DIM)
        phase = np.arange(layer.window + 1)[:, None] * omega
        r = np.concatenate([np.sin(phase), np.cos(phase)], -1) @ weight(layer.relative)
        r = r.reshape(-1, layer.heads, layer.key_dim) * scale
        w, u = (np.asarray(p[...])[None, :, None] * scale for p in (layer.w, layer.u))
        bias = np.einsum("bhtd,lhd->bhtl", q + w, r)
        q = q + u
    state = layer.codebook_state()
    codebook = np.asarray(state.sums) / np.maximum(np.asarray(state.counts), 0.01)[..., None]
    out = by_hand(q, k, v, codebook, bias, layer.window)
    out = np.moveaxis(out, 1, 2).reshape(*x.shape[:2], -1)
    if layer.gated:
        out = out * silu(y @ weight(layer.gate))
    return out @ weight(layer.out)


HEADS = {
    "shga": {},
    "mha": {"head_type": "mha", "bias": "table", "window": 2},
    "mqa": {"head_type": "mqa", "bias": "xl"},
    "gqa": {"head_type": "gqa", "key_dim": 2, "groups": 2, "bias": "none"},
}


@pytest.mark.parametrize("name", HEADS)
def test_the_layer_is_the_cards(name):
    layer = make(**HEADS[name])
    x = inputs()
    np.testing.assert_allclose(jit(lambda x: layer(x))(x), layer_by_hand(layer, x), atol=1e-12)


@pytest.mark.x32
@pytest.mark.parametrize("name", ["shga", "mqa"])
def test_the_layer_in_float32(name):
    layer = make(**HEADS[name], param_dtype=jnp.float32)
    x = inputs().astype(jnp.float32)
    out = jit(lambda x: layer(x))(x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, layer_by_hand(layer, np.float64(x)), atol=2e-6)


STREAMS = {
    "shga": {},
    "mha-rotary": {"head_type": "mha", "bias": "none", "rotary_base": 9.0, "query_scale": 2.0},
    "soft": {"quantizer": "soft", "bias": "none"},
    "no-cache": {"cache": False, "bias": "table"},
}


@pytest.mark.parametrize("name", STREAMS)
def test_map_steps_and_prefill_agree(name):
    layer = make(**STREAMS[name])
    x = inputs(9, batch=(2, 1))
    mask = jnp.asarray(np.random.default_rng(1).random((2, 1, 9)) < 0.8)

    @jit
    def run(x):
        whole = layer(x, mask=mask)
        first, state = layer.prefill(layer.init_state((2, 1)), x[:, :, :4], mask=mask[:, :, :4])
        outs = [first]
        for t in (4, 5):
            out, state = layer.step(state, x[:, :, t], mask=mask[:, :, t])
            outs.append(out[:, :, None])
        rest, _ = layer.prefill(state, x[:, :, 6:], mask=mask[:, :, 6:])
        return whole, jnp.concatenate([*outs, rest], axis=2)

    whole, pieces = run(x)
    assert whole.shape == x.shape
    np.testing.assert_allclose(pieces, whole, atol=1e-12)


def test_dense_and_encoder_layers():
    x = inputs(7)
    dense = make(quantizer="none", bias="table")
    # With as many codes as keys, and the keys as codes, quantising changes nothing.
    vast = make(bias="table", num_codes=14)
    vast.init_codebook_from(jax.random.key(0), x)
    np.testing.assert_allclose(jit(lambda x: vast(x))(x), jit(lambda x: dense(x))(x), atol=1e-12)
    encoder = make(causal=False, bias="none")
    out = jit(lambda x: encoder(x))(x)
    np.testing.assert_allclose(jit(lambda x: encoder(x))(x[:, ::-1])[:, ::-1], out, atol=1e-12)
    for layer in (dense, encoder):
        with pytest.raises(ValueError, match="causal must be True and quantizer 'hard' or 'soft'"):
            layer.init_state((1,))


def test_the_codebook_is_no_parameter_and_has_no_gradient():
    layer = make()
    _, params, rest = nnx.split(layer, nnx.Param, ...)
    names = {path[-1] for path, _ in nnx.to_flat_state(rest)}
    assert names == {"code_sums", "code_counts"}
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    x = inputs()

    @jit
    @jax.grad
    def grads(both):
        y, found = nnx.merge(graph, *both)(x, statistics=True)
        return jnp.sum(y**2) + found.commitment

    moved = grads((params, rest))
    assert not any(leaf.any() for leaf in jax.tree.leaves(moved[1]))
    for path, leaf in nnx.to_flat_state(moved[0]):
        assert float(jnp.abs(leaf[...]).max()) > 0, path


def test_statistics_and_update_are_the_cards():
    layer = make(head_type="mha", bias="none", decay=0.9)
    x = inputs(10)
    mask = jnp.asarray(np.random.default_rng(1).random((2, 10)) < 0.7)
    _, found = jit(lambda x: layer(x, mask=mask, statistics=True))(x)
    k = np.asarray(layer._operands(x).k)
    before = layer.codebook_state()
    codebook = np.asarray(layer.codebook())
    keep = np.asarray(mask)
    square = 0.0
    for g in range(2):
        rows = k[:, g][keep]
        codes = ((rows[:, None] - codebook[g]) ** 2).sum(-1).argmin(-1)
        square += ((rows - codebook[g][codes]) ** 2).sum()
        for s in range(6):
            assert int(found.counts[g, s]) == (codes == s).sum()
            np.testing.assert_allclose(found.sums[g, s], rows[codes == s].sum(0), atol=1e-12)
    assert found.counts.dtype == jnp.int32
    np.testing.assert_allclose(found.commitment, square / keep.sum(), rtol=1e-12)
    layer.update_codebook(found)
    after = layer.codebook_state()
    for new, old, own in zip(after, before, (found.sums, found.counts), strict=True):
        mixed = 0.9 * np.asarray(old) + 0.1 * np.asarray(own)
        np.testing.assert_allclose(new, mixed, atol=1e-12)
    fixed = make(head_type="mha", bias="none", decay=1.0, codebook_init="sinusoids")
    first = fixed.codebook()
    fixed.update_codebook(found)
    np.testing.assert_array_equal(fixed.codebook(), first)
    np.testing.assert_allclose(jnp.linalg.norm(first, axis=-1), 4**0.25, rtol=1e-6)


def test_unused_codes_decay_together_until_the_floor():
    """459 steps at γ = 0.99 from n = 1 to below 0.01; then the code shrinks."""
    state = EMAState(jnp.asarray([[[2.0, 1.0]]]), jnp.ones((1, 1)))
    k, codes = jnp.zeros((1, 1, 3, 2)), jnp.ones((1, 1, 3), jnp.int32)
    nothing = vq.code_statistics(k, codes, vq.codebook_of(state))  # all padding
    assert int(nothing.counts.sum()) == 0

    @jit
    def every(state):
        step = lambda state, _: ((new := vq.update_codebook(state, nothing)), vq.codebook_of(new))
        return jax.lax.scan(step, state, None, length=480)[1]

    codes = every(state)[:, 0, 0]
    np.testing.assert_allclose(codes[:458], jnp.broadcast_to(jnp.asarray([2.0, 1.0]), (458, 2)))
    assert float(codes[458, 0]) < 2.0
    np.testing.assert_allclose(codes[470] / codes[469], 0.99, rtol=1e-9)


def test_first_codes_of_the_paper_are_too_short_and_ours_are_not():
    official = vq.init_codebook(jax.random.key(0), 1, 512, 128, init="normal")
    norm = jnp.mean(jnp.linalg.norm(vq.codebook_of(official), axis=-1))
    np.testing.assert_allclose(norm, 0.5, rtol=0.02)
    ours = vq.init_codebook(jax.random.key(0), 1, 512, 128)
    np.testing.assert_allclose(jnp.linalg.norm(vq.codebook_of(ours), axis=-1), 3.3636, rtol=1e-4)


def test_revival_and_kmeans_draw_from_the_keys():
    layer = make(bias="none")
    x = inputs(30)
    layer.set_codebook_state(EMAState(jnp.ones((1, 6, 4)) * 1e-3, jnp.full((1, 6), 1e-3)))
    _, found = layer(x, statistics=True)
    layer.update_codebook(found, key=jax.random.key(1), threshold=0.5)
    used = np.asarray(layer.codebook()[0])
    keys = np.asarray(found.keys[0])
    near = np.abs(used[:, None] - keys[None]).max(-1).min(-1)
    assert (near < 1e-12).sum() >= 5  # one code had all the keys
    error = {}
    for method in ("data", "kmeans"):
        layer.init_codebook_from(jax.random.key(2), x, method=method)
        _, found = layer(x, statistics=True)
        error[method] = float(found.commitment)
    assert error["kmeans"] < error["data"]


def test_statistics_are_global_sums_over_devices():
    layer = make(head_type="mqa", bias="none")
    x = inputs(6, batch=(8,))
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    graph, values = nnx.split(layer)

    @jit
    def update(values, x):
        layer = nnx.merge(graph, values)
        y, found = layer(x, statistics=True)
        layer.update_codebook(found)
        return y, layer.codebook_state()

    one, eight = update(values, x), update(values, spread)
    assert eight[0].sharding.spec[0] == "data"
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert eight[1].sums.sharding.is_fully_replicated

    # Inside shard_map the sums need the axis by name.
    codebook = layer.codebook()
    k = jnp.asarray(np.random.default_rng(2).standard_normal((8, 1, 5, 4)))
    codes = vq.nearest_codes(k, codebook)
    codes = codes.at[3].set(codebook.shape[1])  # a device whose tokens are all padding

    def local(k, codes):
        found = vq.code_statistics(k, codes, codebook, axis_name="data")
        return found.commitment, (found.sums, found.counts)

    part = PartitionSpec("data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(part, part), out_specs=PartitionSpec())
    (commitment, (sums, counts)), slope = jit(jax.value_and_grad(mapped, has_aux=True))(k, codes)

    def alone(k):
        found = vq.code_statistics(k, codes, codebook)
        return found.commitment, found

    (_, whole), expected = jax.value_and_grad(alone, has_aux=True)(k)
    np.testing.assert_allclose(sums, whole.sums, atol=1e-12)
    np.testing.assert_array_equal(counts, whole.counts)
    np.testing.assert_allclose(commitment, whole.commitment, rtol=1e-12)
    np.testing.assert_allclose(slope, expected, rtol=1e-12, atol=1e-15)


def test_half_precision_activations():
    layer = make(param_dtype=jnp.float32, dtype=jnp.bfloat16)
    x = inputs(9).astype(jnp.bfloat16)
    y, found = jit(lambda x: layer(x, statistics=True))(x)
    assert y.dtype == jnp.bfloat16
    assert found.sums.dtype == found.commitment.dtype == jnp.float32
    assert layer.codebook().dtype == jnp.float32


def test_errors_name_the_argument():
    layer = make()
    cases = [
        (lambda: make(head_type="gau"), "head_type must be one of"),
        (lambda: make(head_type="mha", key_dim=3), "key_dim must divide dim = 8"),
        (lambda: make(head_type="gqa"), "groups must be given for head_type 'gqa'"),
        (lambda: make(groups=2), "groups must be given for head_type 'gqa' and for no other"),
        (lambda: make(head_type="gqa", key_dim=2, groups=3), "groups must divide the 4 heads"),
        (lambda: make(window=4), "window must be at most block_length = 3"),
        (lambda: make(block_length=0), "block_length must be at least 1"),
        (lambda: make(num_codes=0), "num_codes must be at least 1"),
        (lambda: make(bias="alibi"), "bias must be one of"),
        (lambda: make(reduction="scan"), "reduction must be one of"),
        (lambda: make(quantizer="soft"), "bias must be 'none'"),
        (lambda: make(causal=False), "bias must be 'none'"),
        (lambda: make(quantizer="none", causal=False, bias="none"), "causal must be True"),
        (lambda: make(key_dim=3, rotary_base=9.0), "key_dim must be even"),
        (lambda: make(decay=1.5), "decay must be"),
        (lambda: make(codebook_init="zeros"), "codebook_init must be one of"),
        (lambda: layer(jnp.ones((3, 4))), r"x must have shape \(…, length, 8\)"),
        (lambda: layer(inputs(), mask=jnp.ones((2, 3), bool)), "mask must have shape"),
        (
            lambda: make(quantizer="none")(inputs(), statistics=True),
            "statistics must be False without hard codes",
        ),
        (lambda: make(quantizer="none").codebook_state(), "quantizer must be 'hard'"),
        (
            lambda: layer.set_codebook_state(EMAState(jnp.ones((1, 5, 4)), jnp.ones((1, 5)))),
            "state.sums must have shape",
        ),
        (lambda: vq.init_codebook(jax.random.key(0), 1, 0, 4), "num_codes must be at least 1"),
        (
            lambda: vq.codebook_from_keys(jax.random.key(0), jnp.ones((1, 1, 2, 3)), 2, method="x"),
            "method must be one of",
        ),
        (lambda: vq.update_codebooks((1,), ()), "statistics must have one entry"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="x must be an array of real"):
        layer(jnp.ones((2, 3, 8), int))
