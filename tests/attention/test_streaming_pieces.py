"""Attention in pieces: splits, chunks, prefixes, and eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxkit.attention import streaming
from jaxkit.attention.streaming import Attended, blockwise_attention
from tests.attention import streaming_oracle as oracle
from tests.tolerance import tol


def problem(seed=0, batch=(2,), T=16, S=16, H=4, G=2, d=3, e=5, dtype=np.float64):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((*batch, T, H, d))
    k = rng.standard_normal((*batch, S, G, d))
    v = rng.standard_normal((*batch, S, G, e))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def agree(got, want, atol=1e-12):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=atol)


def number(result):
    lse = jnp.where(jnp.isneginf(result.lse), 0.0, result.lse)
    return jnp.sum(jnp.sin(result.out)) + jnp.sum(jnp.cos(lse))


def close(got, want, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, want)


# Splits.


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16])
def test_split_decode(splits):
    q, k, v = problem(T=1)
    run = jax.jit(functools.partial(streaming.split_decode, splits=splits))
    got = run(q[:, 0], k, v)
    out, lse = oracle.dense(q, k, v)
    agree(got, (out[:, 0], lse[:, 0]))


def test_split_decode_options():
    q, k, v = problem(1, batch=(3,), T=1)
    rng = np.random.default_rng(2)
    lengths, window = jnp.asarray([16, 0, 7]), 5
    bias = jnp.asarray(rng.standard_normal((4, 16)))
    mask = jnp.asarray(rng.random((3, 1, 16)) < 0.8)
    sinks = jnp.asarray([0.1, -jnp.inf, 2.0, -1.0])
    places = np.arange(16)
    seen = np.stack([(places < n) & (places >= n - window) for n in (16, 0, 7)])[:, None, None]
    want = oracle.dense(
        q,
        k,
        v,
        bias=np.asarray(bias)[:, None],
        mask=seen & np.asarray(mask)[:, :, None],
        sinks=sinks,
        soft_cap=1.5,
        scale=0.8,
    )
    run = functools.partial(
        streaming.split_decode,
        splits=3,
        window=window,
        soft_cap=1.5,
        scale=0.8,
    )
    got = jax.jit(run)(q[:, 0], k, v, kv_length=lengths, bias=bias, mask=mask, sinks=sinks)
    agree(got, (want[0][:, 0], want[1][:, 0]))
    # An empty cache: only the sink is seen.
    assert not np.any(got.out[1])
    np.testing.assert_array_equal(got.lse[1], sinks)


def test_split_decode_has_the_gradient_of_one_piece():
    q, k, v = problem(3, T=1)
    grads = [
        jax.jit(
            jax.grad(
                lambda q, k, v, n=n: number(
                    streaming.split_decode(q, k, v, splits=n, kv_length=jnp.asarray([9, 0]))
                ),
                (0, 1, 2),
            )
        )(q[:, 0], k, v)
        for n in (1, 5)
    ]
    close(*grads, atol=1e-14)
    assert not any(np.any(g[1]) for g in grads[0])

    def one(q, k, v):
        return number(blockwise_attention(q[:, None], k, v, kv_length=jnp.asarray([9, 0])))

    close(grads[0], jax.jit(jax.grad(one, (0, 1, 2)))(q[:, 0], k, v))


@pytest.mark.x32
def test_split_decode_in_bfloat16_against_jax():
    q, k, v = problem(4, T=1, S=64, d=16, e=16, dtype="bfloat16")
    got = streaming.split_decode(q[:, 0], k, v, splits=4)
    assert got.out.dtype == jnp.bfloat16
    assert got.lse.dtype == jnp.float32
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        want = jax.nn.dot_product_attention(*(x.astype("float32") for x in (q, k, v)))
    np.testing.assert_allclose(
        np.asarray(got.out, np.float64), want[:, 0], rtol=0, atol=tol("bfloat16")
    )


# Chunks.


@pytest.mark.parametrize(
    ("chunk", "window"), [(1, None), (5, None), (16, None), (99, None), (5, 4)]
)
def test_chunked_prefill(chunk, window):
    q, k, v = problem(5)
    run = functools.partial(
        streaming.chunked_prefill, chunk=chunk, window=window, block_q=4, block_k=4
    )
    got, cache = jax.jit(run)(q, k, v)
    mask = oracle.visible(16, 16, causal=True, window=window)
    agree(got, oracle.dense(q, k, v, mask=mask))
    np.testing.assert_array_equal(cache.k, k)
    np.testing.assert_array_equal(cache.v, v)
    assert cache.length == 16


def test_chunks_of_any_lengths_then_decoding():
    q, k, v = problem(6)
    q, k, v = (np.asarray(x) for x in (q, k, v))
    cache = streaming.init_cache((2,), 20, 2, 3, 5, dtype=jnp.float64)
    cache = cache._replace(k=cache.k + jnp.nan)  # what is not yet written is never read
    prefill = jax.jit(streaming.prefill_chunk)

    @jax.jit
    def decode(cache, q, k, v):
        cache = streaming.append(cache, k, v)
        result = streaming.split_decode(q[:, 0], cache.k, cache.v, splits=3, kv_length=cache.length)
        return Attended(result.out[:, None], result.lse[:, None]), cache

    outs, start = [], 0
    for size in (3, 1, 7, 1, 1, 1, 1, 1):
        part = slice(start, start + size)
        run = prefill if start < 11 else decode
        result, cache = run(cache, q[:, part], k[:, part], v[:, part])
        outs.append(result)
        start += size
    assert start == 16
    got = [np.concatenate(x, 1) for x in zip(*outs, strict=True)]
    agree(got, oracle.dense(q, k, v, mask=oracle.visible(16, 16, causal=True)))


def test_chunked_prefill_has_the_gradient_of_one_call():
    q, k, v = problem(7, batch=())
    chunks = lambda *x: number(streaming.chunked_prefill(*x, chunk=5, block_q=4, block_k=4)[0])
    whole = lambda *x: number(blockwise_attention(*x, causal=True))
    close(*(jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (chunks, whole)))


@pytest.mark.x32
def test_prefill_in_chunks_holds_no_matrix():
    length, chunk = 8192, 512
    spec = jax.ShapeDtypeStruct((length, 1, 8), jnp.float32)
    run = lambda q, k, v: streaming.chunked_prefill(q, k, v, chunk=chunk)[0].out
    plan = jax.jit(run).lower(spec, spec, spec).compile().memory_analysis()
    assert plan.temp_size_in_bytes < length * chunk * 4 / 4


def test_a_full_cache_is_not_overwritten():
    cache = streaming.init_cache((), 3, 1, 2, 2)
    one = jnp.ones((2, 1, 2))
    cache = streaming.append(cache, one, one)
    assert np.isfinite(cache.k).all()
    assert np.isnan(streaming.append(cache, one, one).k).all()
    with pytest.raises(ValueError, match="at most 3 positions, the capacity; got 4"):
        streaming.append(cache, jnp.ones((4, 1, 2)), jnp.ones((4, 1, 2)))
    with pytest.raises(ValueError, match=r"v must have shape \(2, 1, 2\); got \(2, 1, 3\)"):
        streaming.append(cache, one, jnp.ones((2, 1, 3)))


# Prefixes of one query.


@pytest.mark.parametrize("reverse", [False, True])
def test_prefix_attention(reverse):
    q, k, v = problem(8, T=1, S=7)
    got, state = jax.jit(functools.partial(streaming.prefix_attention, reverse=reverse))(
        q[:, 0], k, v
    )
    for t in range(7):
        part = slice(t, 7) if reverse else slice(0, t + 1)
        out, lse = oracle.dense(q, k[:, part], v[:, part])
        agree((got.out[:, t], got.lse[:, t]), (out[:, 0], lse[:, 0]))
    last = streaming.finalize(state)
    close(last.out, got.out[:, 0 if reverse else -1])


def test_prefix_attention_goes_on_and_masks():
    q, k, v = problem(9, T=1, S=9)
    rng = np.random.default_rng(0)
    bias, mask = jnp.asarray(rng.standard_normal((4, 9))), jnp.asarray(rng.random(9) < 0.6)
    mask = mask.at[0].set(False)
    run = jax.jit(streaming.prefix_attention)
    whole, _ = run(q[:, 0], k, v, bias=bias, mask=mask)
    first, state = run(q[:, 0], k[:, :4], v[:, :4], bias=bias[:, :4], mask=mask[:4])
    rest, _ = run(q[:, 0], k[:, 4:], v[:, 4:], bias=bias[:, 4:], mask=mask[4:], initial=state)
    close(jnp.concatenate([first.out, rest.out], 1), whole.out)
    # A prefix without visible keys.
    assert not np.any(whole.out[:, 0])
    assert np.all(np.isneginf(whole.lse[:, 0]))
    out, lse = oracle.dense(q, k, v, bias=np.asarray(bias)[:, None], mask=np.asarray(mask))
    agree((whole.out[:, -1], whole.lse[:, -1]), (out[:, 0], lse[:, 0]))
    grads = jax.jit(
        jax.grad(
            lambda q, k, v: number(streaming.prefix_attention(q, k, v, mask=mask)[0]), (0, 1, 2)
        )
    )(q[:, 0], k, v)
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.any(grads[1][:, 0])


def test_prefix_attention_is_causal_attention_of_a_repeated_query():
    q, k, v = problem(10, T=1, S=6)

    def scan(q, k, v):
        got = streaming.prefix_attention(q[:, 0], k, v)[0]
        return number(got), got

    def tiles(q, k, v):
        got = blockwise_attention(jnp.repeat(q, 6, 1), k, v, causal=True)
        return number(got), got

    (a, got), (b, _) = (
        jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v) for f in (scan, tiles)
    )
    repeated = np.repeat(np.asarray(q), 6, 1)
    agree(got, oracle.dense(repeated, k, v, mask=oracle.visible(6, 6, causal=True)))
    close(a, b)


# Eight devices.


def mesh():
    return Mesh(np.array(jax.devices()), ("x",))


SEQUENCE = P(None, "x")


def ring(**options):
    """Ring attention as a function of whole arrays; arrays in `options` are split likewise."""
    names = [name for name, value in options.items() if hasattr(value, "shape")]
    fixed = {name: value for name, value in options.items() if name not in names}
    specs = {
        "segment_ids": SEQUENCE,
        "bias": P(None, "x", None),
        "mask": P(None, "x", None),
        "sinks": P(),
    }

    def local(q, k, v, *arrays):
        given = dict(zip(names, arrays, strict=True))
        return streaming.ring_attention(q, k, v, "x", block_q=2, block_k=2, **fixed, **given)

    inside = (*(SEQUENCE,) * 3, *(specs[name] for name in names))
    run = jax.shard_map(local, mesh=mesh(), in_specs=inside, out_specs=SEQUENCE)
    return lambda q, k, v: run(q, k, v, *(options[name] for name in names))


RINGS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 5},
    "segments": {"segment_ids": jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 16)))},
    "bias": {
        "causal": True,
        "bias": jnp.asarray(np.random.default_rng(1).standard_normal((4, 16, 16))),
        "mask": jnp.asarray(np.random.default_rng(2).random((1, 16, 16)) < 0.7),
        "sinks": jnp.asarray([0.5, 1.0, -1.0, 0.0]),
        "soft_cap": 2.0,
    },
}


@pytest.mark.parametrize("name", RINGS)
def test_ring_attention_over_eight_devices(name):
    q, k, v = problem(11)
    options = RINGS[name]

    def loss(f, *x):
        got = f(*x)
        return number(got), got

    def whole(q, k, v):
        return blockwise_attention(q, k, v, **options)

    (grads, got), (want, _) = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2), has_aux=True))(q, k, v)
        for f in (ring(**options), whole)
    )
    mask = oracle.visible(16, 16, causal=options.get("causal", False), window=options.get("window"))
    if "segment_ids" in options:
        ids = np.asarray(options["segment_ids"])
        mask = mask & (ids[:, :, None] == ids[:, None, :])[:, None]
    if "mask" in options:
        mask = mask & np.asarray(options["mask"])
    kept = {key: options.get(key) for key in ("bias", "sinks", "soft_cap")}
    agree(got, oracle.dense(q, k, v, mask=mask, **kept))
    close(grads, want)


def test_ring_with_more_keys_than_queries():
    q, k, v = problem(12, T=8, S=16)
    got = jax.jit(ring(causal=True))(q, k, v)
    agree(got, oracle.dense(q, k, v, mask=oracle.visible(8, 16, causal=True)))


@pytest.mark.parametrize("method", ["sum", "gather"])
def test_keys_split_over_devices(method):
    """Queries everywhere, keys split: the partial results of eight devices are merged."""
    q, k, v = problem(13, T=3)
    lengths = jnp.asarray([16, 5], jnp.int32)  # the later devices have no real key at all

    def local(q, k, v):
        first = jax.lax.axis_index("x") * k.shape[1]
        here = jnp.clip(lengths - first, 0, k.shape[1])
        return streaming.merge_over_devices(
            blockwise_attention(q, k, v, kv_length=here), "x", method=method
        )

    # What was gathered is the same everywhere, which the type does not say.
    run = jax.shard_map(
        local,
        mesh=mesh(),
        in_specs=(P(), SEQUENCE, SEQUENCE),
        out_specs=P(),
        check_vma=method == "sum",
    )
    mask = np.stack([oracle.visible(3, 16, kv_length=n) for n in (16, 5)])[:, None]

    def loss(f, *x):
        got = f(*x)
        return number(got), got

    (a, got), (b, _) = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2), has_aux=True))(q, k, v)
        for f in (run, lambda *x: blockwise_attention(*x, kv_length=lengths))
    )
    agree(got, oracle.dense(q, k, v, mask=mask))
    close(a, b)


def test_tiles_follow_a_sharded_batch():
    q, k, v = problem(14, batch=(8,))
    sharding = jax.sharding.NamedSharding(mesh(), P("x"))
    q, k, v = (jax.device_put(x, sharding) for x in (q, k, v))
    run = jax.jit(functools.partial(blockwise_attention, causal=True, block_q=4, block_k=4))
    got = run(q, k, v)
    assert got.out.sharding.is_equivalent_to(sharding, 4)
    agree(got, oracle.dense(q, k, v, mask=oracle.visible(16, 16, causal=True)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: streaming.split_decode(q[:, 0], k, v, splits=0), "splits must be at leas"),
        (lambda q, k, v: streaming.split_decode(q[:, 0], k, v, splits=17), "at most the 16 keys"),
        (lambda q, k, v: streaming.split_decode(q[0, 0, 0], k, v), r"q must be \[\*batch, heads"),
        (lambda q, k, v: streaming.chunked_prefill(q, k, v, chunk=0), "chunk must be at least 1"),
        (lambda q, k, v: streaming.chunked_prefill(q[:, 1:], k, v, chunk=2), "k must have the 15"),
        (
            lambda q, k, v: streaming.chunked_prefill(
                q, k, v, chunk=2, cache=streaming.init_cache((2,), 15, 2, 3, 5)
            ),
            "cache must have room for the 16 positions of q; got a capacity of 15",
        ),
        (lambda q, k, v: streaming.prefix_attention(q, k, v), "k must have the batch axes of q"),
        (lambda q, k, v: streaming.prefix_attention(q[0, 0, 0], k, v), "q must be"),
        (
            lambda q, k, v: streaming.prefix_attention(
                q[:, 0], k, v, initial=streaming.identity((2,), 5)
            ),
            "initial must have shapes",
        ),
        (
            lambda q, k, v: streaming.merge_over_devices(Attended(q, q[..., 0]), "x", method="max"),
            "method must be one of 'sum', 'gather'",
        ),
        (lambda q, k, v: ring(causal=True)(jnp.repeat(q, 2, 1), k, v), "k must have at least as"),
        (lambda q, k, v: ring(window=2)(q, k, v), "window must come with causal"),
        (lambda q, k, v: ring(bias=jnp.zeros((4, 16, 8)))(q, k, v), "bias must have the 16 keys"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, *problem(15))
