"""Tiled attention against dense softmax in NumPy: masks, gradients, tiles, dtypes, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkit.attention import streaming
from jaxkit.attention.streaming import Attended, blockwise_attention
from tests.attention import streaming_oracle as oracle
from tests.tolerance import tol


def problem(seed=0, batch=(2,), T=7, S=9, H=4, G=2, d=3, e=5, dtype=np.float64):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((*batch, T, H, d))
    k = rng.standard_normal((*batch, S, G, d))
    v = rng.standard_normal((*batch, S, G, e))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def agree(got, want, atol=1e-12):
    np.testing.assert_allclose(np.asarray(got[0], np.float64), want[0], rtol=0, atol=atol)
    np.testing.assert_allclose(np.asarray(got[1], np.float64), want[1], rtol=0, atol=atol)


SEGMENTS = np.array([0, 0, 1, 1, 1, 3, 3]), np.array([0, 1, 1, 1, 2, 3, 3, 0, 0])
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "window-1": {"causal": True, "window": 1},
    "offset": {"causal": True, "offset": 0},
    "offset-before": {"causal": True, "offset": -3},  # the first queries see nothing
    "offset-window-gone": {"causal": True, "offset": 6, "window": 2},  # the last ones
    "kv_length": {"kv_length": 4},
    "nothing": {"kv_length": 0},
    "kv_length-causal": {"kv_length": 6, "causal": True, "window": 5},
    "segments": {"segments": SEGMENTS},
    "segments-causal": {"segments": SEGMENTS, "causal": True},
}


def options(case):
    case = dict(case)
    segments = case.pop("segments", None)
    if segments is not None:
        case["segment_ids"], case["kv_segment_ids"] = map(jnp.asarray, segments)
    return case


def loss_of(result):
    """A scalar of out and lse alike; the infinite lse of blind rows takes no part."""
    out, lse = result
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(jnp.isneginf(lse), 0.0, lse)))


@functools.cache
def dense_gradients():
    """Compiled once for all masks."""
    return jax.jit(
        jax.grad(lambda q, k, v, mask: loss_of(jax_dense(q, k, v, mask=mask)), (0, 1, 2))
    )


@pytest.mark.parametrize("name", CASES)
def test_masks(name):
    q, k, v = problem()
    mask = oracle.visible(7, 9, **CASES[name])
    run = functools.partial(blockwise_attention, block_q=3, block_k=4, **options(CASES[name]))

    def loss(*x):
        result = run(*x)
        return loss_of(result), result

    (_, got), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    agree(got, oracle.dense(q, k, v, mask=mask))
    blind = ~mask.any(1)
    assert not np.any(got.out[:, blind])
    assert np.all(np.isneginf(got.lse[:, blind]))
    # The backward formula, with its dlse term, against autodiff of the dense form.
    for a, b in zip(grads, dense_gradients()(q, k, v, jnp.asarray(mask)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)
    assert not np.any(grads[0][:, blind])


def jax_dense(q, k, v, *, mask=None, bias=None, soft_cap=None, scale=None):
    """The whole matrix at once, differentiable by JAX; rows without keys are 0."""
    each = q.shape[-2] // k.shape[-2]
    k, v = jnp.repeat(k, each, -2), jnp.repeat(v, each, -2)
    s = jnp.einsum("...qhd,...khd->...hqk", q, k)
    s = s * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)
    if bias is not None:
        s = s + jnp.broadcast_to(bias, s.shape)
    seen = jnp.broadcast_to(True if mask is None else jnp.asarray(mask), s.shape)
    some = seen.any(-1, keepdims=True)
    s = jnp.where(seen, s, jnp.where(some, -jnp.inf, 0.0))  # blind rows: any finite score
    p = jnp.where(some, jax.nn.softmax(s), 0.0)
    lse = jnp.where(some[..., 0], jax.nn.logsumexp(s, -1), -jnp.inf)
    return jnp.einsum("...hqk,...khd->...qhd", p, v), jnp.moveaxis(lse, -2, -1)


def test_backward_formula_of_the_card():
    """dS = P∘(dout vᵀ − D + dlse), written out in NumPy, for random cotangents."""
    q, k, v = problem(1, batch=(), H=1, G=1)
    mask = oracle.visible(7, 9, causal=True)
    rng = np.random.default_rng(2)
    (out, lse), pull = jax.vjp(
        lambda *x: tuple(blockwise_attention(*x, causal=True, block_q=2, block_k=3, scale=0.7)),
        q,
        k,
        v,
    )
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    q0, k0, v0 = (np.asarray(x[:, 0]) for x in (q, k, v))
    s = np.where(mask, 0.7 * q0 @ k0.T, -np.inf)
    P = np.exp(s - np.asarray(lse))
    D = (dout[:, 0] * np.asarray(out[:, 0])).sum(-1, keepdims=True)
    dS = P * (dout[:, 0] @ v0.T - D + dlse)
    want = 0.7 * dS @ k0, 0.7 * dS.T @ q0, P.T @ dout[:, 0]
    got = pull((jnp.asarray(dout), jnp.asarray(dlse)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[:, 0], b, rtol=0, atol=1e-13)
    # Without the dlse term the gradient of anything that uses lse is wrong by this much.
    assert np.abs(P * dlse).max() > 0.1


@pytest.mark.parametrize(
    "shape", [(7, 9), (1, 9), (7, 1), (1, 1), (4, 7, 9), (4, 1, 9), (2, 4, 7, 9), (2, 1, 1, 9)]
)
def test_bias_and_mask_broadcast_and_the_bias_has_a_gradient(shape):
    q, k, v = problem(3)
    rng = np.random.default_rng(4)
    bias = jnp.asarray(rng.standard_normal(shape))
    mask = jnp.asarray(rng.random(shape) < 0.7)

    def loss(function, q, k, v, bias):
        out, lse = function(q, k, v, bias=bias, mask=mask, soft_cap=1.5, scale=0.9)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse) ** 2)

    tiled = functools.partial(blockwise_attention, block_q=3, block_k=4)
    want = oracle.dense(q, k, v, bias=bias, mask=mask, soft_cap=1.5, scale=0.9)
    agree(tiled(q, k, v, bias=bias, mask=mask, soft_cap=1.5, scale=0.9), want)
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2, 3)))(q, k, v, bias)
        for f in (tiled, jax_dense)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_minus_infinity_in_the_bias_hides_a_key():
    q, k, v = problem(5)
    mask = np.random.default_rng(6).random((4, 7, 9)) < 0.6
    mask[:, 2] = False
    bias = jnp.where(mask, 0.3, -jnp.inf)

    def loss(bias, v):
        out, lse = blockwise_attention(q, k, v, bias=bias, block_q=4, block_k=2)
        return out.sum() + jnp.where(jnp.isneginf(lse), 0.0, lse).sum()

    agree(
        blockwise_attention(q, k, v, bias=bias, block_q=4, block_k=2),
        oracle.dense(q, k, v, bias=bias),
    )
    with jax.debug_nans(True):
        dbias, dv = jax.jit(jax.grad(loss, (0, 1)))(bias, v)
    assert not np.any(dbias[~mask])
    assert np.isfinite(dv).all()


@settings(deadline=None, max_examples=6)
@given(
    T=st.integers(1, 6),
    S=st.integers(1, 7),
    block_q=st.integers(1, 7),
    block_k=st.integers(1, 8),
    offset=st.integers(-4, 8),
    window=st.one_of(st.none(), st.integers(1, 5)),
)
def test_any_tiles_any_lengths(T, S, block_q, block_k, offset, window):
    q, k, v = problem(7, T=T, S=S, H=2, G=1, d=2, e=1)
    mask = oracle.visible(T, S, causal=True, offset=offset, window=window)
    got = blockwise_attention(
        q, k, v, causal=True, offset=offset, window=window, block_q=block_q, block_k=block_k
    )
    agree(got, oracle.dense(q, k, v, mask=mask))


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_heads_and_batch_axes(H, G, batch):
    q, k, v = problem(8, batch=batch, H=H, G=G)
    got = blockwise_attention(q, k, v, causal=True, block_q=4, block_k=4)
    assert got.out.shape == (*batch, 7, H, 5)
    assert got.lse.shape == (*batch, 7, H)
    agree(got, oracle.dense(q, k, v, mask=oracle.visible(7, 9, causal=True)))


def test_lengths_offsets_and_segments_of_each_example():
    q, k, v = problem(9, batch=(3,))
    lengths, offsets = jnp.asarray([9, 0, 5]), jnp.asarray([2, 0, -1])
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 7)))
    kv_ids = jnp.asarray(np.random.default_rng(1).integers(0, 2, (3, 9)))
    mask = np.stack(
        [
            oracle.visible(
                7,
                9,
                causal=True,
                offset=int(offsets[b]),
                kv_length=int(lengths[b]),
                segments=(np.asarray(ids[b]), np.asarray(kv_ids[b])),
            )
            for b in range(3)
        ]
    )
    run = functools.partial(blockwise_attention, causal=True, block_q=3, block_k=4)
    given = {"segment_ids": ids, "kv_segment_ids": kv_ids}
    got = run(q, k, v, offset=offsets, kv_length=lengths, **given)
    want = oracle.dense(q, k, v, mask=mask[:, None])
    agree(got, want)

    # The same under jit and vmap, with traced offsets.
    def one(q, k, v, offset, length, ids, kv_ids):
        return run(q, k, v, offset=offset, kv_length=length, segment_ids=ids, kv_segment_ids=kv_ids)

    agree(jax.jit(jax.vmap(one))(q, k, v, offsets, lengths, ids, kv_ids), want)


def test_padding_may_hold_anything():
    q, k, v = problem(10)
    want = blockwise_attention(q, k[:, :6], v[:, :6])
    k, v = k.at[:, 6:].set(jnp.nan), v.at[:, 6:].set(jnp.inf)

    def run(q, k, v):
        return blockwise_attention(q, k, v, kv_length=6, block_q=4, block_k=4)

    agree(run(q, k, v), [np.asarray(x) for x in want])
    grads = jax.jit(jax.grad(lambda *x: run(*x).out.sum(), (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)
    agree(streaming.split_decode(q[:, 0], k, v, kv_length=6), [np.asarray(x[:, 0]) for x in want])


def test_sinks():
    q, k, v = problem(11)
    sinks = jnp.asarray([0.5, -1.0, 3.0, -jnp.inf])
    mask = oracle.visible(7, 9, causal=True, offset=-2)
    run = functools.partial(blockwise_attention, causal=True, offset=-2, block_q=4, block_k=4)
    got = run(q, k, v, sinks=sinks)
    want = oracle.dense(q, k, v, mask=mask, sinks=sinks)
    agree(got, want)
    # A query that sees the sink alone gets out 0 and lse = the logit.
    np.testing.assert_array_equal(got.lse[:, 0], jnp.broadcast_to(sinks, (2, 4)))
    assert not np.any(got.out[:, 0])

    @jax.jit
    def loss(sinks):
        return loss_of(run(q, k, v, sinks=sinks))

    gradient = jax.jit(jax.grad(loss))(sinks)
    step = 1e-5
    for h in range(3):
        e = jnp.zeros(4).at[h].set(step)
        slope = (loss(sinks + e) - loss(sinks - e)) / (2 * step)
        np.testing.assert_allclose(gradient[h], slope, rtol=1e-6)
    assert gradient[3] == 0


def test_gradients_through_merged_parts():
    """Two calls over halves of the keys and a merge are one call, also backwards."""
    q, k, v = problem(12)

    def whole(q, k, v):
        return blockwise_attention(q, k, v, block_q=4, block_k=4)

    def halves(q, k, v):
        parts = [
            blockwise_attention(q, k[:, a:b], v[:, a:b], block_q=4, block_k=4)
            for a, b in ((0, 4), (4, 9))
        ]
        return streaming.merge_normalized(*parts)

    def loss(f, *x):
        out, lse = f(*x)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    agree(halves(q, k, v), [np.asarray(x) for x in whole(q, k, v)])
    a, b = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(q, k, v) for f in (whole, halves)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-13), a, b)


@pytest.mark.slow
def test_plain_autodiff_forward_mode_and_second_order():
    q, k, v = problem(13, batch=(), T=4, S=5, H=2, G=1, d=2, e=2)
    dense = functools.partial(jax_dense, mask=oracle.visible(4, 5, causal=True))

    def tiled(custom):
        return functools.partial(
            blockwise_attention, causal=True, block_q=2, block_k=2, custom_backward=custom
        )

    def loss(f, q, k, v):
        out, lse = f(q, k, v)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    want = jax.grad(functools.partial(loss, dense), (0, 1, 2))(q, k, v)
    got = jax.grad(functools.partial(loss, tiled(False)), (0, 1, 2))(q, k, v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-13), got, want)
    got, want = (
        jax.jvp(functools.partial(loss, f), (q, k, v), (q, k, v))[1] for f in (tiled(False), dense)
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)

    def curvature(f):
        inner = jax.grad(functools.partial(loss, f))
        return jax.jit(jax.grad(lambda q: (inner(q, k, v) ** 2).sum()))(q)

    np.testing.assert_allclose(curvature(tiled(True)), curvature(dense), rtol=0, atol=1e-12)


@pytest.mark.x32
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    q, k, v = problem(14, T=33, S=40, d=16, e=8, dtype=dtype)
    got = blockwise_attention(q, k, v, causal=True, block_q=16, block_k=16)
    assert got.out.dtype == jnp.dtype(dtype)
    assert got.lse.dtype == jnp.float32
    want = oracle.dense(q, k, v, mask=oracle.visible(33, 40, causal=True))
    # Only the last rounding is of the narrow dtype: scores and sums are float32.
    np.testing.assert_allclose(np.asarray(got.lse, np.float64), want[1], rtol=tol("float32", 40))
    np.testing.assert_allclose(np.asarray(got.out, np.float64), want[0], rtol=0, atol=tol(dtype))
    wide = blockwise_attention(q, k, v, causal=True, out_dtype=jnp.float32)
    np.testing.assert_allclose(wide.out, want[0], rtol=0, atol=tol("float32", 40))
    total = lambda *x: blockwise_attention(*x).out.astype("float32").sum()
    grads = jax.eval_shape(jax.grad(total, (0, 1, 2)), q, k, v)
    assert all(g.dtype == jnp.dtype(dtype) for g in grads)


@pytest.mark.x32
@pytest.mark.parametrize("causal", [False, True])
def test_against_jax(causal):
    q, k, v = problem(15, T=32, S=32, H=4, G=2, d=8, e=8, dtype="float32")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        want = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    got = blockwise_attention(q, k, v, causal=causal, block_q=8, block_k=16)
    np.testing.assert_allclose(got.out, want, rtol=0, atol=tol("float32", 32))


def test_large_scores_and_a_shift():
    q, k, v = problem(16)
    got = blockwise_attention(q, k, v, scale=1e4, block_q=4, block_k=4)
    agree(got, oracle.dense(q, k, v, scale=1e4), atol=1e-8)
    bias = jnp.full((1, 1), 500.0)
    moved = blockwise_attention(q, k, v, bias=bias, block_q=4, block_k=4)
    plain = blockwise_attention(q, k, v, block_q=4, block_k=4)
    np.testing.assert_allclose(moved.out, plain.out, rtol=0, atol=1e-12)
    np.testing.assert_allclose(moved.lse, plain.lse + 500, rtol=0, atol=1e-12)


def test_a_traced_scale_has_a_gradient():
    q, k, v = problem(17)
    run = lambda s: blockwise_attention(q, k, v, scale=s, block_q=4, block_k=4)
    agree(jax.jit(run)(0.4), oracle.dense(q, k, v, scale=0.4))
    slope = jax.grad(lambda s: run(s).lse.sum())(0.4)
    step = 1e-5
    want = (run(0.4 + step).lse.sum() - run(0.4 - step).lse.sum()) / (2 * step)
    np.testing.assert_allclose(slope, want, rtol=1e-7)


@pytest.mark.x32
def test_a_traced_scale_does_not_round_narrow_queries():
    q, k, v = problem(17, dtype="bfloat16")
    run = jax.jit(lambda s: blockwise_attention(q, k, v, scale=s, block_q=4, block_k=4))
    got = run(jnp.float32(0.3))
    assert got.out.dtype == jnp.bfloat16
    want = oracle.dense(q, k, v, scale=0.3)
    np.testing.assert_allclose(got.lse, want[1], rtol=0, atol=tol("float32", 9))


def test_a_length_on_the_device_counts_as_all_or_none_beyond_the_ends():
    q, k, v = problem(23)
    run = jax.jit(lambda n: blockwise_attention(q, k, v, kv_length=n, block_q=4, block_k=4))
    agree(run(jnp.int32(100)), oracle.dense(q, k, v))
    assert not np.any(run(jnp.int32(-3)).out)


def test_causality_by_the_jacobian():
    q, k, v = problem(18, batch=(), T=6, S=6, H=1, G=1)
    jacobian = jax.jacobian(
        lambda k, v: blockwise_attention(q, k, v, causal=True, block_q=2, block_k=2).out, (0, 1)
    )(k, v)
    for J in jacobian:
        reach = np.abs(J).sum((1, 2, 4, 5)) > 0  # [query, key]
        assert not reach[~np.tri(6, dtype=bool)].any()
        assert reach[np.tri(6, k=-1, dtype=bool)].all()


@pytest.mark.x32
def test_memory_is_linear_in_the_length():
    def plan(length, grad):
        spec = jax.ShapeDtypeStruct((length, 1, 8), jnp.float32)
        run = lambda q, k, v: blockwise_attention(q, k, v, causal=True).out
        if grad:
            run = jax.grad(lambda *x: blockwise_attention(*x, causal=True).out.sum(), (0, 1, 2))
        return jax.jit(run).lower(spec, spec, spec).compile().memory_analysis().temp_size_in_bytes

    for grad in (False, True):
        short, long = plan(2048, grad), plan(8192, grad)
        assert long < 5 * short
        assert long < 8192 * 8192 * 4 / 16


def test_skipped_tiles_are_not_computed():
    """A tile above the diagonal is never read: NaN there does not show, not even as 0 · NaN."""
    q, k, v = problem(19, T=8, S=8)
    # Keys 4…7 are hidden from queries 0…3, tile by tile.
    k, v = k.at[:, 4:].set(jnp.nan), v.at[:, 4:].set(jnp.nan)
    out, _ = blockwise_attention(q, k, v, causal=True, block_q=4, block_k=4)
    assert np.isfinite(out[:, :4]).all()
    assert np.isnan(out[:, 4:]).all()
    # Inside a visible tile NaN values do.
    out, _ = blockwise_attention(q, k, v, causal=True, block_q=8, block_k=8)
    assert np.isnan(out).all()


@pytest.mark.parametrize("order", ["newest-first", "oldest-first"])
@pytest.mark.parametrize("name", ["plain", "causal", "window", "offset-before"])
def test_sequential_reference(order, name):
    q, k, v = problem(20)
    mask = oracle.visible(7, 9, **CASES[name])
    got = streaming.sequential_attention(q, k, v, order=order, **CASES[name])
    agree(got, oracle.dense(q, k, v, mask=mask))
    extra = np.random.default_rng(0).random((4, 7, 9)) < 0.5
    got = streaming.sequential_attention(
        q, k, v, order=order, mask=jnp.asarray(extra), soft_cap=2.0, **CASES[name]
    )
    agree(got, oracle.dense(q, k, v, mask=mask & extra, soft_cap=2.0))


def test_sequential_reference_has_the_same_gradients():
    q, k, v = problem(21, batch=())

    def loss(f, *x):
        out, lse = f(*x, causal=True)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    a, b = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(q, k, v)
        for f in (streaming.sequential_attention, blockwise_attention)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-13), a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": (7, 3, 3)}, ValueError, "q must have a multiple of the 2 heads of k; got 3 heads"),
        ({"q": (7, 4, 2)}, ValueError, "k must have the size of q on its last axis, 2"),
        ({"v": (8, 2, 5)}, ValueError, "v must have a value for each of the 9 keys"),
        ({"v": (9, 1, 5)}, ValueError, "v must have the 2 heads of k"),
        ({"k": (2, 9, 2, 3)}, ValueError, "k must have the batch axes of q"),
        ({"q": (4, 3)}, ValueError, "q must be "),
        ({"k": (0, 2, 3), "v": (0, 2, 5)}, ValueError, "without empty axes"),
        ({"causal": True, "q": (10, 4, 3)}, ValueError, "offset must be given for a causal mask"),
        ({"offset": 1}, ValueError, "offset must come with causal=True"),
        ({"window": 2}, ValueError, "window must come with causal=True"),
        ({"causal": True, "window": 0}, ValueError, "window must be at least 1; got 0"),
        ({"block_q": 0}, ValueError, "block_q must be at least 1; got 0"),
        ({"block_k": -1}, ValueError, "block_k must be at least 1; got -1"),
        ({"block_k": 2.5}, TypeError, "block_k must be an integer"),
        ({"kv_length": 10}, ValueError, "kv_length must be from 0 to the number of keys, 9"),
        ({"kv_length": -1}, ValueError, "kv_length must be from 0 to the number of keys, 9"),
        ({"kv_length": np.array(10)}, ValueError, "kv_length must be from 0 to"),
        ({"kv_length": 2.0}, TypeError, "kv_length must be an integer; got 2.0"),
        ({"kv_segment_ids": np.zeros(9, int)}, ValueError, "must come with segment_ids"),
        ({"segment_ids": np.zeros(7, int)}, ValueError, "kv_segment_ids must be given"),
        ({"segment_ids": np.zeros(7), "kv_segment_ids": np.zeros(9)}, TypeError, "segment_ids"),
        ({"mask": np.zeros((7, 9))}, TypeError, "mask must be boolean"),
        ({"mask": np.zeros((3, 7, 9), bool)}, ValueError, "mask must broadcast to"),
        ({"bias": np.zeros((7, 9), int)}, TypeError, "bias must be an array of real"),
        ({"sinks": np.zeros(2)}, ValueError, "sinks must have one logit for each head"),
        ({"soft_cap": 0.0}, ValueError, "soft_cap must be greater than 0"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"scale": np.ones(2)}, ValueError, "scale must be one number; got shape (2,)"),
    ],
)
def test_errors(change, error, message):
    shapes = {"q": (7, 4, 3), "k": (9, 2, 3), "v": (9, 2, 5)}
    arrays = {name: np.zeros(change.pop(name, shape)) for name, shape in shapes.items()}
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        jax.eval_shape(lambda: blockwise_attention(**arrays, **change))


def test_a_traced_soft_cap_is_refused():
    q, k, v = problem(22)
    with pytest.raises(TypeError, match="soft_cap must be a number, not traced"):
        jax.eval_shape(lambda c: blockwise_attention(q, k, v, soft_cap=c), 2.0)


def test_integer_queries_are_refused():
    one = jnp.ones((3, 1, 2), jnp.int32)
    with pytest.raises(TypeError, match="q must be an array of real floating-point numbers"):
        blockwise_attention(one, one, one)


def test_result_is_a_named_pair():
    q, k, v = problem(22)
    assert isinstance(blockwise_attention(q, k, v), Attended)
