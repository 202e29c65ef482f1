"""Attention over recent keys and codes: the card's digits, masks, biases, precision, decoding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxkit_kernels import vq_attention, vq_attention_decode
from jaxkit_kernels.vq_attention import VqAttentionXlaBlocks, skew

from tests.kernels import contract
from tests.tolerance import tol

ALL = ["reference", "xla", *contract.PALLAS]
# Small problems gain nothing from what half of the time to compile is spent on.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def options(implementation):
    return {"implementation": implementation, "interpret": implementation in contract.PALLAS}


def cache(z, v, codes, length, before=2):
    """Means [R, S, dv] and counts [R, S] of the blocks up to r - before."""
    blocks = len(z) // length
    means, counts = np.zeros((blocks, codes, v.shape[-1])), np.zeros((blocks, codes))
    for r in range(blocks):
        old = np.arange(len(z)) < (r - before + 1) * length
        for s in range(codes):
            counts[r, s] = np.sum(old & (z == s))
            if counts[r, s]:
                means[r, s] = v[old & (z == s)].mean(0)
    return means, counts


def card():
    """Check 1 of the card: T = 12, L = W = 3, S = 4."""
    t, c = np.arange(12)[:, None], np.arange(2)
    q, k = 2 * np.sin(0.7 * t + 1.3 * c), np.sin(0.9 * t + 2.1 * c + 0.5)
    v = np.sin(0.4 * t + 0.8 * c + 1)
    codebook = np.array([[0.8, 0.2], [-0.5, 0.7], [-0.6, -0.6], [0.4, -0.9]])
    z = np.argmin(((k[:, None] - codebook) ** 2).sum(-1), 1)
    return q, k, v, codebook, z, np.array([[0.5, 0.3, 0.1, -0.2]])


def problem(length, codes, blocks, *, seed=0, dtype=jnp.float64, heads=2, dk=3, dv=5):
    """A sequence with quantised keys and the caches that belong to it; one group."""
    rng = np.random.default_rng(seed)
    time = blocks * length
    codebook = rng.standard_normal((codes, dk))
    z = rng.integers(0, codes, time)
    v = rng.standard_normal((time, dv))
    means, counts = cache(z, v, codes, length)
    arrays = (
        rng.standard_normal((1, heads, time, dk)),
        codebook[z][None, None],
        v[None, None],
        codebook[None],
        means[None, None],
    )
    arrays = tuple(jnp.asarray(x, dtype) for x in arrays)
    return (*arrays, jnp.asarray(counts[None, None], jnp.int32)), z


def dense(q, keys, v, bias, reach):
    """Causal attention, all keys one by one; the bias by lag up to `reach`."""
    lag = np.arange(len(q))[:, None] - np.arange(len(keys))
    scores = q @ keys.T + np.where(lag <= reach, bias[np.clip(lag, 0, reach)], 0)
    weights = np.exp(np.where(lag >= 0, scores, -np.inf))
    return weights @ v / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("implementation", ALL)
def test_digits_of_the_card(implementation):
    exact = implementation in ("reference", "xla")
    dtype = jnp.float64 if exact else jnp.float32
    q, _, v, codebook, z, bias = card()
    means, counts = cache(z, v, 4, 3)
    np.testing.assert_array_equal(z, [0, 0, 3, 3, 2, 1, 1, 0, 0, 3, 3, 2])
    np.testing.assert_array_equal(counts[-1], [2, 1, 1, 2])
    some = [
        [0.913460357398, 0.891172017349],
        [0.141120008060, -0.611857890943],
        [0.515501371821, -0.255541102027],
        [0.891172017349, 0.328310689941],
    ]
    np.testing.assert_allclose(means[-1], some, atol=1e-11)
    arrays = (q[None, None], codebook[z][None, None], v[None, None], codebook[None])
    arrays = [jnp.asarray(x, dtype) for x in (*arrays, means[None, None])]
    counts = jnp.asarray(counts[None, None], jnp.int32)
    run = jit(partial(vq_attention, block_length=3, **options(implementation)))
    out = run(*arrays, counts, jnp.asarray(bias, dtype))
    out = np.asarray(out, np.float64)[0, 0]
    atol = 1e-10 if exact else 2e-6
    np.testing.assert_allclose(out[5], [0.708699325004, 0.071936607814], atol=atol)
    np.testing.assert_allclose(out[11], [0.071034608593, -0.067006505278], atol=atol)
    np.testing.assert_allclose(out.sum(), 7.701162282441, atol=10 * atol)


@pytest.mark.parametrize("implementation", ALL)
def test_decoding_gives_the_digits_of_the_card(implementation):
    exact = implementation in ("reference", "xla")
    dtype = jnp.float64 if exact else jnp.float32
    q, _, v, codebook, z, bias = card()
    old = np.arange(12) < 8  # older than W = 3 at t = 11
    means, counts = cache(np.where(old, z, -1), v, 4, 1, before=1)
    near = [11, 10, 9, 8]
    arrays = (q[11][None, None], codebook[z][near][None, None], v[near][None, None])
    cached = (codebook[None], means[-1][None, None])
    out = jit(partial(vq_attention_decode, **options(implementation)))(
        *(jnp.asarray(x, dtype) for x in arrays),
        jnp.ones((1, 4), bool),
        *(jnp.asarray(x, dtype) for x in cached),
        jnp.asarray(counts[-1][None, None], jnp.int32),
        jnp.asarray(bias, dtype),
    )
    atol = 1e-10 if exact else 2e-6
    np.testing.assert_allclose(out[0, 0], [0.071034608593, -0.067006505278], atol=atol)


@pytest.mark.parametrize(("length", "window"), [(1, 1), (2, 1), (3, 3), (4, 2), (6, 0), (12, 5)])
def test_any_block_length_gives_dense_attention(length, window):
    """Checks 2, 4 and 5: every key is a codeword, so the block form is exact attention."""
    (q, k, v, *rest), _ = problem(length, 3, 12 // length)
    bias = np.random.default_rng(1).standard_normal((2, window + 1))
    run = partial(vq_attention, block_length=length, window=window, implementation="xla")
    got = jit(run)(q, k, v, *rest, jnp.asarray(bias))
    for h in range(2):
        want = dense(*(np.asarray(x) for x in (q[0, h], k[0, 0], v[0, 0])), bias[h], window)
        np.testing.assert_allclose(got[0, h], want, atol=1e-12)


def test_one_code_and_no_bias_is_the_running_mean():
    (q, k, v, *rest), _ = problem(4, 1, 5)
    got = jit(partial(vq_attention, block_length=4, implementation="xla"))(q, k, v, *rest)
    want = np.cumsum(np.asarray(v[0, 0]), 0) / np.arange(1, 21)[:, None]
    np.testing.assert_allclose(got[0], np.broadcast_to(want, got[0].shape), atol=1e-13)


def test_gradients_are_those_of_the_mixed_quadratic_form():
    """Check 3: straight through for keys of the last two blocks, none through older keys."""
    length, blocks, codes = 3, 5, 4
    (q, k, v, codebook, _, _), z = problem(length, codes, blocks)
    bias = jnp.asarray(np.random.default_rng(2).standard_normal((2, length + 1)))
    time = blocks * length
    onehot = jax.nn.one_hot(z, codes, dtype=v.dtype)
    block = np.arange(time) // length
    old = jnp.asarray(block[None] <= np.arange(blocks)[:, None] - 2, v.dtype)
    weight = np.random.default_rng(3).standard_normal((1, 2, time, v.shape[-1]))

    def in_blocks(q, k, v, bias, codebook):
        counts = old @ onehot
        means = jnp.einsum("rt,ts,td->rsd", old, onehot, v[0, 0])
        means = means / jnp.where(counts > 0, counts, 1.0)[..., None]
        out = vq_attention(
            q, k, v, codebook, means[None, None], counts[None, None], bias,
            block_length=length, implementation="xla",
        )  # fmt: skip
        return jnp.sum(out * weight)

    def quadratic(q, k, v, bias, codebook):
        near = jnp.asarray(block[:, None] - block[None] <= 1)[None]
        stopped = jax.lax.stop_gradient(k[0, 0])
        scores = jnp.where(near, q[0] @ k[0, 0].T, q[0] @ stopped.T)
        lag = np.arange(time)[:, None] - np.arange(time)
        by_lag = bias[:, np.clip(lag, 0, length)]
        scores = scores + jnp.where(jnp.asarray(lag <= length)[None], by_lag, 0.0)
        scores = jnp.where(jnp.asarray(lag >= 0)[None], scores, -1e30)
        return jnp.sum(jax.nn.softmax(scores) @ v[0, 0] * weight[0])

    operands = (q, k, v, bias, codebook)
    both = lambda *x: [jax.grad(f, range(5))(*x) for f in (in_blocks, quadratic)]
    got, want = jit(both)(*operands)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_array_equal(got[4], np.zeros_like(got[4]))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("by_query", [False, True])
def test_masked_keys_are_never_read(implementation, by_query):
    """NaN in the padding; a row that sees nothing is 0; all gradients are finite."""
    rng = np.random.default_rng(0)
    f32 = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    q, k, v, codebook = f32(2, 4, 12, 3), f32(2, 2, 12, 3), f32(2, 2, 12, 2), f32(2, 3, 3)
    means, counts = f32(2, 2, 3, 3, 2), jnp.zeros((2, 2, 3, 3), jnp.int32).at[:, :, 2].set(2)
    bias = f32(2, 4, 12, 4) if by_query else f32(4, 4)
    valid = jnp.asarray(rng.uniform(size=(2, 12)) > 0.3).at[:, :2].set(False)
    hole = ~valid[:, None, :, None]
    bad_k, bad_v = (jnp.where(hole, jnp.nan, x) for x in (k, v))

    def run(q, k, v, means, bias, implementation):
        return vq_attention(
            q, k, v, codebook, means, counts, bias,
            block_length=4, window=3, valid=valid, **options(implementation),
        )  # fmt: skip

    cotangent = f32(2, 4, 12, 2)

    @partial(jit, static_argnums=0)
    def evaluate(implementation, *operands):
        out, pull = jax.vjp(partial(run, implementation=implementation), *operands)
        return out, pull(cotangent)

    want, bars_want = evaluate("reference", q, k, v, means, bias)
    got, bars = evaluate(implementation, q, bad_k, bad_v, means, bias)
    np.testing.assert_array_equal(got[:, :, :2], np.zeros_like(got[:, :, :2]))
    assert contract.error(got, want) <= 4 * tol(jnp.float32, 12)
    assert contract.error(bars, bars_want) <= 4 * tol(jnp.float32, 12)
    # Padding in the middle is as good as a shorter sequence.
    if implementation == "xla" and not by_query:
        other, _ = evaluate("xla", q, jnp.where(hole, jnp.float32(7), k), v, means, bias)
        np.testing.assert_array_equal(other, got)


@pytest.mark.parametrize("implementation", ALL)
def test_future_tokens_change_nothing(implementation):
    (q, k, v, *rest), _ = problem(4, 3, 3, dtype=jnp.float32)
    run = jit(lambda k, v: vq_attention(q, k, v, *rest, block_length=4, **options(implementation)))
    before, after = run(k, v), run(k.at[:, :, 7:].add(1.0), v.at[:, :, 7:].add(1.0))
    np.testing.assert_array_equal(before[:, :, :7], after[:, :, :7])
    assert (before[:, :, 7:] != after[:, :, 7:]).all()


@pytest.mark.parametrize("implementation", ALL)
def test_what_is_not_finite_shows_in_what_sees_it_and_nowhere_else(implementation):
    """Token 5 of blocks of 4, or a mean of block 2; one fault a sequence, none in the first."""
    parts, _ = problem(4, 3, 3, dtype=jnp.float32)
    tile = lambda x: jnp.tile(x, (6, *(1,) * (x.ndim - 1)))
    q, k, v, means, counts = (tile(x) for x in (*parts[:3], *parts[4:]))
    k = k.at[1, 0, 5, 0].set(jnp.nan).at[2, 0, 5, 1].set(-jnp.inf)
    v = v.at[3, 0, 5, 2].set(jnp.nan)
    counts = counts.at[:, 0, 2, 0].set(0).at[:, 0, 2, 1].set(2)
    # A code that stands for nothing is not seen.
    means = means.at[4, 0, 2, 1, 0].set(jnp.nan).at[5, 0, 2, 0, 0].set(jnp.nan)
    run = jit(partial(vq_attention, block_length=4, **options(implementation)))
    out = run(q, k, v, parts[3], means, counts)
    same = jnp.broadcast_to(out[:1], out.shape)
    assert bool(jnp.isfinite(out[0]).all())
    close = partial(np.testing.assert_allclose, atol=1e-6)
    close(out[:4, :, :5], same[:4, :, :5])
    assert bool(jnp.isnan(out[1:4, :, 5:]).all())
    close(out[4, :, :8], same[4, :, :8])
    assert bool(jnp.isnan(out[4, :, 8:]).all())
    close(out[5], same[5])

    visible = jnp.ones((6, 4), bool).at[:, 2].set(False)
    step = q[:, :, 0], k[:, :, 4:8], v[:, :, 4:8], visible.at[2].set(False)
    run = jit(partial(vq_attention_decode, **options(implementation)))
    out = run(*step, parts[3], means[:, :, 2], counts[:, :, 2])
    spoiled = jnp.isnan(out).all((1, 2))
    assert spoiled.tolist() == [False, True, False, True, True, False]
    assert bool(jnp.isfinite(out[~spoiled]).all())


@pytest.mark.parametrize("implementation", ALL)
def test_large_scores_do_not_overflow(implementation):
    (q, k, v, *rest), _ = problem(4, 3, 3, dtype=jnp.float32)
    run = partial(vq_attention, block_length=4, **options(implementation))

    @jit
    def evaluate(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: run(q, k, v, *rest), q, k, v)
        return out, pull(2 * out)

    got, bars = evaluate(1e3 * q, k, v)
    for bar in bars:
        assert np.isfinite(bar).all()
    high = contract.as64((1e3 * q, k, v, *rest[:-1]))
    exact = jit(partial(vq_attention, block_length=4, implementation="reference"))
    # Scores near 1e3 carry an error of 1e3 units of roundoff into the exponent.
    assert contract.error(got, exact(*high, rest[-1])) <= 1e3 * tol(jnp.float32)


@pytest.mark.parametrize("implementation", ["xla", *contract.PALLAS])
def test_fractional_counts(implementation):
    (q, k, v, codebook, means, counts), _ = problem(4, 3, 4, dtype=jnp.float32)
    soft = counts.astype(jnp.float32) * 0.37
    run = jit(partial(vq_attention, block_length=4, **options(implementation)))
    got = run(q, k, v, codebook, means, soft)
    high = contract.as64((q, k, v, codebook, means, soft))
    want = jit(partial(vq_attention, block_length=4, implementation="reference"))(*high)
    assert contract.error(got, want) <= 4 * tol(jnp.float32, 16)


def test_float32_at_4096_tokens():
    """Check 2 of the card: 5e-6 against the exact result, dk = 64, L = S = 128."""
    operands, _ = problem(128, 128, 32, dtype=jnp.float32, heads=1, dk=64, dv=64)
    q, k, v, codebook, means, counts = operands
    q, k, codebook = q * 64**-0.25, k * 64**-0.25, codebook * 64**-0.25
    got = jax.jit(partial(vq_attention, block_length=128))(q, k, v, codebook, means, counts)
    high = contract.as64((q, k, v, codebook, means))
    want = jit(partial(vq_attention, block_length=128, implementation="reference"))(*high, counts)
    assert np.abs(np.asarray(got, np.float64) - want).max() <= 5e-6


@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu"])
def test_float16(implementation):
    operands, _ = problem(4, 3, 3, dtype=jnp.float16)
    run = partial(vq_attention, block_length=4, **options(implementation))
    high = contract.as64(operands[:5])
    exact = partial(vq_attention, block_length=4, implementation="reference")

    @partial(jit, static_argnums=0)
    def evaluate(function, *operands):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, *operands[3:]), *operands[:3])
        return out, pull(out)

    got, bars = evaluate(run, *operands)
    want, bars_want = evaluate(exact, *high, operands[5])
    assert got.dtype == jnp.float16
    assert contract.error(got, want) <= tol(jnp.float16)
    assert contract.error(bars, bars_want) <= tol(jnp.float16, 12)


@pytest.mark.parametrize("bias", [None, (4, 6), (2, 4, 6)])
@pytest.mark.parametrize("implementation", ["xla", *contract.PALLAS])
def test_decode(implementation, bias):
    rng = np.random.default_rng(0)
    f32 = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    visible = jnp.asarray(rng.uniform(size=(2, 6)) > 0.3).at[:, 1].set(False)
    counts = jnp.asarray(rng.integers(0, 3, (2, 2, 140)), jnp.int32)
    q, keys, values = f32(2, 4, 3), f32(2, 2, 6, 3), f32(2, 2, 6, 5)
    codebook, means = f32(2, 140, 3), f32(2, 2, 140, 5)
    added = None if bias is None else f32(*bias)

    def run(q, keys, values, means, implementation):
        return vq_attention_decode(
            q, keys, values, visible, codebook, means, counts, added, **options(implementation)
        )

    cotangent = f32(2, 4, 5)

    @partial(jit, static_argnums=0)
    def evaluate(implementation, *operands):
        out, pull = jax.vjp(partial(run, implementation=implementation), *operands)
        return out, pull(cotangent)

    hole = ~visible[:, None, :, None]
    broken = (q, *(jnp.where(hole, jnp.nan, x) for x in (keys, values)), means)
    want, bars_want = evaluate("reference", q, keys, values, means)
    got, bars = evaluate(implementation, *broken)
    assert contract.error(got, want) <= 4 * tol(jnp.float32, 146)
    assert contract.error(bars, bars_want) <= 4 * tol(jnp.float32, 146)
    if bias is not None:
        return
    nothing = jit(partial(vq_attention_decode, **options(implementation)))(
        q, keys, values, ~visible & visible, codebook, means, 0 * counts
    )
    np.testing.assert_array_equal(nothing, np.zeros_like(nothing))


def test_decode_lowers_to_one_launch_on_tpu():
    f32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    spec = (f32(2, 4, 64), f32(2, 2, 257, 64), f32(2, 2, 257, 128))
    cached = (f32(2, 256, 64), f32(2, 2, 256, 128), f32(2, 2, 256), f32(4, 257))
    traced = jax.jit(vq_attention_decode).trace(
        *spec, jax.ShapeDtypeStruct((2, 257), jnp.bool_), *cached
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 1


def test_batches_stay_sharded():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    parts, _ = problem(4, 3, 3, dtype=jnp.float32)
    shift = jnp.arange(8, dtype=jnp.float32).reshape(8, 1, 1, 1)
    q, k, v = (jnp.tile(x, (8, 1, 1, 1)) + shift for x in parts[:3])
    means, counts = jnp.tile(parts[4], (8, 1, 1, 1, 1)), jnp.tile(parts[5], (8, 1, 1, 1))
    run = jit(
        jax.value_and_grad(
            lambda q, k, v, m, n: jnp.sum(
                vq_attention(q, k, v, parts[3], m, n, block_length=4) ** 2
            ),
            (0, 1, 2),
        )
    )
    spread = NamedSharding(mesh, PartitionSpec("data"))
    apart = [jax.device_put(x, spread) for x in (q, k, v, means, counts)]
    got, want = run(*apart), run(q, k, v, means, counts)
    assert contract.error(got, want) <= tol(jnp.float32, 96)
    for bar in got[1]:
        assert bar.sharding.is_equivalent_to(spread, bar.ndim)


@pytest.mark.parametrize("queries", [1, 2, 3, 6])
@pytest.mark.parametrize("bias", [None, (4, 5), (2, 4, 18, 5)])
def test_blocks_in_parts(queries, bias):
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s))
    operands = (
        normal(2, 4, 18, 3),
        normal(2, 2, 18, 3),
        normal(2, 2, 18, 2),
        normal(2, 2, 3, 5, 2),
    )
    codebook, counts = normal(2, 5, 3), jnp.asarray(rng.integers(0, 3, (2, 2, 3, 5)))
    added = () if bias is None else (normal(*bias),)

    def run(q, k, v, means, *bias, **options):
        bias = bias or (None,)
        return vq_attention(
            q, k, v, codebook, means, counts, *bias, block_length=6, window=4, **options
        )

    sizes = VqAttentionXlaBlocks(blocks=1, queries=queries)
    functions = (
        partial(run, implementation="xla", block_sizes=sizes),
        partial(run, implementation="reference"),
    )

    @jit
    def both(*operands):
        pulls = [jax.vjp(function, *operands) for function in functions]
        return [(out, pull(jnp.cos(out))) for out, pull in pulls]

    (got, bars), (want, bars_want) = both(*operands, *added)
    np.testing.assert_allclose(got, want, atol=1e-13)
    assert contract.error(bars, bars_want) <= tol(jnp.float64, 18)


@pytest.mark.parametrize(("length", "rows", "window"), [(1, 1, 0), (4, 4, 4), (5, 3, 2)])
def test_skew(length, rows, window):
    bias = np.random.default_rng(0).standard_normal((2, rows, window + 1))
    got = skew.to_keys(jnp.asarray(bias), length, 2)
    want = np.zeros((2, rows, length + rows + 2))
    for i in range(rows):
        for lag in range(window + 1):
            want[:, i, length + i - lag] = bias[:, i, lag]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(skew.to_lags(got[..., :-2], window), bias)


def test_errors():
    (q, k, v, codebook, means, counts), _ = problem(4, 3, 3)
    run = partial(vq_attention, block_length=4)
    with pytest.raises(ValueError, match=r"block_length must be at least 1; got 0"):
        run(q, k, v, codebook, means, counts, block_length=0)
    with pytest.raises(TypeError, match=r"block_length must be an int; got 4.0"):
        run(q, k, v, codebook, means, counts, block_length=4.0)
    with pytest.raises(ValueError, match=r"multiple of block_length = 5 as time; got 12"):
        run(q, k, v, codebook, means, counts, block_length=5)
    with pytest.raises(ValueError, match=r"window must be at most block_length = 4; got 5"):
        run(q, k, v, codebook, means, counts, window=5)
    with pytest.raises(ValueError, match=r"k must be \[batch, groups, time, dk\].*got shape"):
        run(q, k[..., :2], v, codebook, means, counts)
    with pytest.raises(ValueError, match=r"v must be \[batch, groups, time, dv\].*got shape"):
        run(q, k, v[:, :, :8], codebook, means, counts)
    two = jnp.repeat(k, 2, 1), jnp.repeat(v, 2, 1)
    with pytest.raises(ValueError, match=r"multiple of k's 2 groups as heads; got 3 heads"):
        run(jnp.repeat(q[:, :1], 3, 1), *two, codebook, means, counts)
    with pytest.raises(ValueError, match=r"codebook must be \[groups, codes, dk\].*got shape"):
        run(q, k, v, codebook[..., :2], means, counts)
    with pytest.raises(ValueError, match=r"codebook must hold at least one code"):
        run(q, k, v, codebook[:, :0], means[..., :0, :], counts[..., :0])
    with pytest.raises(ValueError, match=r"means must be .*blocks, codes, dv\].*got shape"):
        run(q, k, v, codebook, means[:, :, :2], counts)
    with pytest.raises(ValueError, match=r"counts must be .*codes\].*got shape"):
        run(q, k, v, codebook, means, counts[..., :2])
    with pytest.raises(TypeError, match=r"counts must be integer or floating-point; got bool"):
        run(q, k, v, codebook, means, counts > 0)
    with pytest.raises(TypeError, match=r"bfloat16 stops counting at 256; got bfloat16"):
        run(q, k, v, codebook, means, counts.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"bias must be None, .* = \(2, 5\).*got shape \(2, 4\)"):
        run(q, k, v, codebook, means, counts, jnp.ones((2, 4)))
    with pytest.raises(TypeError, match=r"valid must be boolean; got int"):
        run(q, k, v, codebook, means, counts, valid=jnp.ones((1, 12), int))
    with pytest.raises(TypeError, match=r"v must have q's dtype float64; got float32"):
        run(q, k, v.astype(jnp.float32), codebook, means, counts)
    step = (q[:, :, 0], k[:, :, :4], v[:, :, :4])
    cached = (codebook, means[:, :, 0], counts[:, :, 0])
    with pytest.raises(TypeError, match=r"visible must be boolean; got float64"):
        vq_attention_decode(*step, jnp.ones((1, 4)), *cached)
    with pytest.raises(ValueError, match=r"visible must be \[batch, lags\].*got shape"):
        vq_attention_decode(*step, jnp.ones((1, 3), bool), *cached)
    with pytest.raises(ValueError, match=r"values must be \[batch, groups, lags, dv\]"):
        vq_attention_decode(*step[:2], step[2][:, :, :2], jnp.ones((1, 4), bool), *cached)
    with pytest.raises(ValueError, match=r"bias must be None, .* = \(2, 4\)"):
        vq_attention_decode(*step, jnp.ones((1, 4), bool), *cached, jnp.ones((2, 3)))


def test_the_gradient_on_a_gpu_says_how_wide_it_is():
    (q, k, v, codebook, means, counts), _ = problem(4, 3, 3, dtype=jnp.float32, dk=100, dv=130)
    run = partial(vq_attention, block_length=4, implementation="pallas_gpu", interpret=True)
    loss = lambda q: jnp.sum(run(q, k, v, codebook, means, counts))
    assert jax.eval_shape(loss, q).shape == ()
    with pytest.raises(NotImplementedError, match=r"dk \+ dv up to 256 .* got 100 and 130"):
        jax.eval_shape(jax.grad(loss), q)


def test_empty():
    (q, k, v, codebook, means, counts), _ = problem(4, 3, 3)
    out = vq_attention(q[:0], k[:0], v[:0], codebook, means[:0], counts[:0], block_length=4)
    assert out.shape == (0, 2, 12, 5)
