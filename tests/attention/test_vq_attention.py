"""Attention over quantised keys: the quadratic, block and decoding forms are one function."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.attention import vq
from tests.attention.vq_cases import TABLE, XLA, biases, by_hand, card, decoded, jit, operands
from tests.tolerance import tol


def every_form(
    q,
    k,
    v,
    codebook,
    *,
    block_length,
    window,
    bias=None,
    mask=None,
    reductions=("serial",),
    **options,
):
    """The outputs of all forms, from one compilation."""

    @jit
    def run(q, k, v, codebook, bias, mask):
        common = {"bias": bias, "mask": mask, **options}
        local = common | {"block_length": block_length}
        outs = {
            name: vq.vq_attention(q, k, v, codebook, window=window, reduction=name, **local, **XLA)
            for name in reductions
        }
        outs["quadratic"] = vq.quadratic_attention(q, k, v, codebook, window=window, **local)
        outs["decode"], state = decoded(q, k, v, codebook, window=window, **local, **XLA)
        return outs, state

    return run(q, k, v, codebook, bias, mask)


def test_card_digits():
    q, k, v, codebook = card()
    quantised = vq.quantize_keys(k, codebook)
    assert quantised.codes.ravel().tolist() == [0, 0, 3, 3, 2, 1, 1, 0, 0, 3, 3, 2]
    error = float(jnp.mean(jnp.sum((quantised.keys - k) ** 2, axis=-1)))
    np.testing.assert_allclose(error, 0.227234666552, atol=1e-10)
    bias = jnp.asarray(TABLE)
    outs, state = every_form(
        q, k, v, codebook, block_length=3, window=3, bias=bias, reductions=vq.REDUCTIONS
    )
    for name, out in outs.items():
        out = np.asarray(out[0, 0])
        tight = {"atol": 1e-10, "rtol": 0, "err_msg": name}
        np.testing.assert_allclose(out[5], [0.708699325004, 0.071936607814], **tight)
        np.testing.assert_allclose(out[11], [0.071034608593, -0.067006505278], **tight)
        np.testing.assert_allclose(out.sum(), 7.701162282441, **tight)
    assert state.cache.counts[0, 0].tolist() == [3, 2, 1, 2]
    exact = vq.quadratic_attention(q, k, v, None, bias=bias)
    np.testing.assert_allclose(
        exact[0, 0, 11], [0.063253158344, -0.082231702143], atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("reduction", vq.REDUCTIONS)
def test_card_cache(reduction):
    _, k, v, codebook = card()
    codes = vq.nearest_codes(k, codebook).reshape(1, 1, 4, 3)
    blocks = vq.summarize(codes, v.reshape(1, 1, 4, 3, 2), num_codes=4)
    # What the queries of the last block find: all tokens of the blocks 0 and 1.
    cache = jax.tree.map(lambda x: x[0, 0, 1], vq.reduce_blocks(blocks, reduction=reduction))
    assert cache.counts.tolist() == [2, 1, 1, 2]
    assert cache.counts.dtype == jnp.int32
    expected = [
        [0.913460357398, 0.891172017349],
        [0.141120008060, -0.611857890943],
        [0.515501371821, -0.255541102027],
        [0.891172017349, 0.328310689941],
    ]
    np.testing.assert_allclose(cache.means, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("heads", "groups", "kind"),
    [(1, 1, "rows"), (4, 4, "none"), (4, 1, "table"), (4, 2, "rows")],
    ids=["shga", "mha", "mqa", "gqa"],
)
def test_all_forms_and_numpy_agree(heads, groups, kind):
    # 13 tokens in blocks of 3: the last block is padded.
    q, k, v, codebook = operands(heads=heads, groups=groups, length=13)
    bias = biases(q, 3, kind)
    reductions = vq.REDUCTIONS if kind == "rows" else ("matmul",)
    outs, state = every_form(
        q, k, v, codebook, block_length=3, window=3, bias=bias, reductions=reductions
    )
    expected = by_hand(q, k, v, codebook, bias, 3)
    for name, out in outs.items():
        np.testing.assert_allclose(out, expected, atol=1e-12, err_msg=name)
    assert state.cache.counts.dtype == jnp.int32
    assert int(state.cache.counts.sum()) == 2 * groups * (13 - 4)


@pytest.mark.x32
def test_long_float32_forms_agree():
    q, k, v, codebook = operands(
        batch=1, heads=1, groups=1, length=4096, dk=64, dv=32, codes=128, dtype=jnp.float32
    )
    # As the layer scales them: |q·k| <= 8.
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) * 64**0.25 for x in (q, k))
    codebook = codebook / jnp.linalg.norm(codebook, axis=-1, keepdims=True) * 64**0.25
    bias = biases(q, 128, "table")
    outs, _ = every_form(
        q, k, v, codebook, block_length=128, window=128, bias=bias, reductions=vq.REDUCTIONS
    )
    for name, out in outs.items():
        assert float(jnp.abs(out - outs["quadratic"]).max()) < 5e-6, name


@pytest.mark.parametrize("options", [{}, {"rotary_base": 20.0}], ids=["kernel", "rotary"])
def test_padding_anywhere_goes_unseen(options):
    q, k, v, codebook = operands(length=10)
    mask = jnp.asarray(np.random.default_rng(3).random((2, 10)) < 0.6).at[0, :3].set(False)
    mask = mask.at[1, 4:8].set(False)
    bias = biases(q, 2, "table")
    hole = ~mask[:, None, :, None]
    k, v = (jnp.where(hole, jnp.nan, x) for x in (k, v))
    outs, state = every_form(
        q, k, v, codebook, block_length=2, window=2, bias=bias, mask=mask, **options
    )
    expected = by_hand(q, k, v, codebook, bias, 2, mask, **options)
    assert not expected[0, :, :3].any()  # nothing to see: zeros
    for name, out in outs.items():
        np.testing.assert_allclose(out, expected, atol=1e-12, err_msg=name)
    assert int(state.cache.counts.sum()) == 2 * int(mask[:, :7].sum())

    # The same by sentinel codes, and dense.
    codes = jnp.where(mask[:, None], vq.nearest_codes(k, codebook), 5)
    run = partial(vq.vq_attention, block_length=2, bias=bias, codes=codes, **options, **XLA)
    np.testing.assert_allclose(jit(run)(q, k, v, codebook), expected, atol=1e-12)
    if not options:
        dense = jit(vq.quadratic_attention)(q, k, v, None, bias=bias, mask=mask)
        assert bool(jnp.isfinite(dense).all())


@pytest.mark.parametrize(
    "options",
    [{}, {"rotary_base": 20.0}, {"cache": False}, {"cache": False, "local": "window"}],
    ids=["kernel", "rotary", "blocks", "window"],
)
def test_what_is_not_finite_shows_in_what_sees_it_and_nowhere_else(options):
    """Token 4 of group 0, in the middle of a block; one fault a sequence, none in the first."""
    q, k, v, codebook = operands(batch=1, length=13)
    q, k, v = (jnp.tile(x, (5, 1, 1, 1)) for x in (q, k, v))
    k = k.at[1, 0, 4].set(jnp.nan).at[2, 0, 4, 1].set(jnp.inf)
    v = v.at[3, 0, 4, 2].set(jnp.nan).at[4, 0, 4, 0].set(-jnp.inf)
    bias = biases(q, 2, "table")
    cached = options.get("cache", True)
    outs, _ = every_form(
        *(q, k, v, codebook),
        block_length=3,
        window=2,
        bias=bias,
        reductions=vq.REDUCTIONS if not options else ("serial",),
        **options,
    )
    # Blocks of 3 without a cache: token 4 is seen up to token 8, or up to its lag 2.
    last = 13 if cached else 7 if "local" in options else 9
    close = partial(np.testing.assert_allclose, atol=1e-12)
    for name, out in outs.items():
        clean, spoiled = out[:1], out[1:]
        assert bool(jnp.isfinite(clean).all())
        same = jnp.broadcast_to(clean, spoiled.shape)
        close(spoiled[:, 2:], same[:, 2:], err_msg=name)
        close(spoiled[:, :2, :4], same[:, :2, :4], err_msg=name)
        close(spoiled[:, :2, last:], same[:, :2, last:], err_msg=name)
        assert bool(jnp.isnan(spoiled[:, :2, 4:last]).all()), name


def test_gradients_show_what_is_not_finite():
    q, k, v, codebook = operands(batch=2, heads=2, groups=2, length=9)
    bad = v.at[1, 0, 4, 0].set(jnp.nan)
    run = lambda q, v: jnp.sum(vq.vq_attention(q, k, v, codebook, block_length=3, **XLA) ** 2)
    grad = jit(jax.grad(run))(q, bad)
    assert bool(jnp.isfinite(grad[0]).all())
    assert bool(jnp.isfinite(grad[1, 1]).all())
    assert bool(jnp.isfinite(grad[1, 0, :4]).all())
    assert bool(jnp.isnan(grad[1, 0, 4:]).all())


def test_codes_of_keys_that_are_not_finite_and_codes_out_of_range():
    k = jnp.asarray([0.4, jnp.nan, 2.5, jnp.inf, -jnp.inf]).reshape(1, 1, 5, 1)
    codebook = jnp.asarray([[[0.0], [1.0], [3.0]]])
    mask = jnp.asarray([[True, True, True, True, False]])
    assert vq.nearest_codes(k, codebook, mask=mask).tolist() == [[[0, 3, 2, 3, 3]]]
    quantised = vq.quantize_keys(k, codebook, mask=mask)
    # Unlike padding (3), they are seen.
    assert quantised.codes.tolist() == [[[0, 4, 2, 4, 3]]]
    assert quantised.valid.tolist() == mask.tolist()
    assert jnp.isnan(quantised.keys).ravel().tolist() == [False, True, False, True, False]
    given = vq.quantize_keys(
        jnp.ones((1, 1, 5, 1)), codebook, codes=jnp.asarray([[[-1, 0, 3, 9, 2]]])
    )
    assert given.codes.tolist() == [[[3, 0, 3, 3, 2]]]
    assert given.valid.tolist() == [[False, True, False, False, True]]
    assert given.keys.ravel().tolist() == [0, 0, 0, 0, 3]


def test_the_serial_form_carries_one_cache():
    """Its temporary memory does not hold R S dv numbers, whatever R; nor does its gradient."""
    codes, dv, block_length = 128, 256, 16
    caches = lambda length: 4 * length // block_length * codes * dv

    def temporary(length, reduction, grad=False):
        spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        run = partial(vq.vq_attention, block_length=block_length, reduction=reduction, **XLA)
        function = jax.grad(lambda *x: jnp.sum(run(*x) ** 2), (0, 1, 2)) if grad else run
        operands = [spec(1, 1, length, n) for n in (8, 8, dv)]
        lowered = jax.jit(function).lower(*operands, spec(1, codes, 8))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = (temporary(n, "serial") for n in (512, 2048))
    # q, k, v and the output grow with the length, 1/8 of the caches.
    assert long - short < (caches(2048) - caches(512)) / 4
    assert long < caches(2048) / 2
    assert temporary(2048, "assoc_scan") > 2 * caches(2048)
    assert temporary(2048, "serial", grad=True) < caches(2048)


def test_a_named_kernel_never_falls_back():
    q, k, v, codebook = operands()
    run = partial(vq.vq_attention, q, k, v, codebook, block_length=3)
    for options, words in (
        ({"rotary_base": 9.0}, "pallas_gpu has no kernel for rotary_base"),
        ({"cache": False, "local": "window"}, "pallas_gpu has no kernel for local='window'"),
        ({}, "float64"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            run(implementation="pallas_gpu", **options)


def test_auto_is_the_pure_jax_form_on_a_cpu():
    """The default of the layers: values, gradients and decoding."""
    q, k, v, codebook = operands(batch=1, length=7)
    bias = biases(q, 2, "rows")

    @partial(jit, static_argnames="implementation")
    def run(q, k, v, bias, implementation):
        whole = lambda *x: vq.vq_attention(
            *x[:3], codebook, bias=x[3], block_length=2, implementation=implementation
        )
        out, pull = jax.vjp(whole, q, k, v, bias)
        state = vq.init_state(1, 2, 5, 3, window=2, dtype=v.dtype)
        first = [x[:, :, :6] for x in (q, k, v, bias)]
        options = {"implementation": implementation}
        _, state = vq.prefill(state, *first[:3], codebook, bias=first[3], block_length=2, **options)
        last = [x[:, :, 6] for x in (q, k, v, bias)]
        step, _ = vq.step(state, *last[:3], codebook, bias=last[3], **options)
        return out, pull(jnp.cos(out)), step

    got, want = (run(q, k, v, bias, implementation=name) for name in ("auto", "xla"))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_allclose(got[0], by_hand(q, k, v, codebook, bias, 2), atol=1e-12)
    np.testing.assert_allclose(got[2], got[0][:, :, 6], atol=1e-12)


def test_gradients_are_finite_beside_padding():
    q, k, v, codebook = operands(length=6)
    mask = jnp.asarray([[False] * 3 + [True] * 3, [False] * 6])
    k, v = (jnp.where(mask[:, None, :, None], x, jnp.nan) for x in (k, v))

    @jit
    @partial(jax.grad, argnums=(0, 1, 2))
    def run(q, k, v):
        out = vq.vq_attention(q, k, v, codebook, block_length=2, mask=mask, **XLA)
        return jnp.sum(out**2)

    for grad in run(q, k, v):
        assert bool(jnp.isfinite(grad).all())
        assert not grad[1].any()


@pytest.mark.parametrize("window", [0, 2])
def test_block_length_does_not_matter_while_it_holds_the_window(window):
    q, k, v, codebook = operands(length=12, batch=1)
    bias = biases(q, window, "table")
    lengths = [n for n in (1, 2, 5, 20) if n >= window]

    @jit
    def run(q, k, v, bias):
        return [
            vq.vq_attention(q, k, v, codebook, bias=bias, block_length=n, **XLA) for n in lengths
        ]

    for out in run(q, k, v, bias):
        np.testing.assert_allclose(
            out, by_hand(q, k, v, codebook, bias, window), atol=1e-12, rtol=0
        )


def test_a_window_longer_than_the_block_is_refused_and_would_break_equality():
    q, k, v, codebook = operands(length=12)
    bias = biases(q, 3, "table")
    with pytest.raises(ValueError, match="window must be at most block_length = 2"):
        vq.vq_attention(q, k, v, codebook, bias=bias, block_length=2)
    # Blocks of 2 can bias 2 lags; the third is lost on tokens that are in the cache already.
    cut, whole = by_hand(q, k, v, codebook, bias, 2), by_hand(q, k, v, codebook, bias, 3)
    assert np.abs(cut - whole).max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"rotary_base": 20.0}], ids=["kernel", "rotary"])
def test_causal_by_the_jacobian(options):
    q, k, v, codebook = operands(batch=1, heads=2, groups=1, length=7)

    @jit
    def jacobians(q, k, v):
        run = lambda q, k, v: vq.vq_attention(
            q, k, v, codebook, block_length=2, bias=biases(q, 2, "table"), **options, **XLA
        ).sum((0, 1, 3))
        return jax.jacrev(run, argnums=(0, 1, 2))(q, k, v)

    future = np.triu(np.ones((7, 7)), 1).astype(bool)
    for jacobian in jacobians(q, k, v):
        size = np.abs(np.asarray(jacobian)).sum((1, 2, 4))
        assert size[future].max() == 0
        assert size[~future].max() > 1e-3
    # Codes have no gradient: change a token, its code with it.
    run = jit(partial(vq.vq_attention, block_length=2, **options, **XLA))
    before, after = run(q, k, v, codebook), run(q, k.at[:, :, 4].set(-9.0), v, codebook)
    np.testing.assert_array_equal(before[:, :, :4], after[:, :, :4])
    assert float(jnp.abs(before - after)[:, :, 4:].max()) > 1e-3


def test_keys_that_are_codewords_give_dense_attention():
    q, k, v, codebook = operands(heads=4, groups=2, length=11)
    k = jit(vq.quantize_keys)(k, codebook).keys
    bias = biases(q, 3, "rows")
    out = jit(partial(vq.vq_attention, block_length=4, window=3, **XLA))(
        q, k, v, codebook, bias=bias
    )
    dense = jit(vq.quadratic_attention)(q, k, v, None, bias=bias)
    np.testing.assert_allclose(out, dense, atol=1e-12)


def test_one_code_gives_the_cumulative_mean():
    q, k, v, codebook = operands(codes=1, length=11)
    outs, _ = every_form(q, k, v, codebook, block_length=3, window=3)
    mean = jnp.cumsum(v, axis=2) / jnp.arange(1.0, 12.0).reshape(1, 1, 11, 1)
    for name, out in outs.items():
        np.testing.assert_allclose(out, jnp.repeat(mean, 2, axis=1), atol=1e-12, err_msg=name)


def test_the_nearest_code_minimises_the_expected_squared_error_of_the_score():
    """E(q·k − q·c)² = ‖k − c‖² E‖q‖²/dk for an isotropic q: here one of ±axes, exactly."""
    _, k, _, codebook = operands(batch=1, groups=1, length=20, dk=4, codes=6)
    axes = np.concatenate([np.eye(4), -np.eye(4)]) * 2.0
    gap = np.asarray(k[0, 0])[:, None] - np.asarray(codebook[0])[None]
    expected = ((gap @ axes.T) ** 2).mean(-1)
    np.testing.assert_allclose(expected, (gap**2).sum(-1) * 4.0 / 4, atol=1e-12)
    np.testing.assert_array_equal(vq.nearest_codes(k, codebook)[0, 0], expected.argmin(-1))


def test_quantised_keys_are_codewords_to_the_last_bit():
    for dtype in (jnp.float32, jnp.bfloat16):
        _, k, _, codebook = operands(length=200, dtype=dtype)
        keys, codes, _ = vq.quantize_keys(k, codebook)
        np.testing.assert_array_equal(
            keys, jnp.stack([codebook[g][codes[:, g]] for g in (0, 1)], 1)
        )
        grad = jax.grad(lambda k, c: jnp.sum(vq.quantize_keys(k, c).keys ** 2), argnums=(0, 1))(
            k, codebook
        )
        np.testing.assert_array_equal(grad[0], 2 * keys)  # straight through
        assert not grad[1].any()


def test_counts_do_not_stall_in_half_precision():
    v = jnp.ones((1, 1, 600, 2), jnp.bfloat16)
    codes = jnp.zeros((1, 1, 600), jnp.int32)
    cache = vq.summarize(codes, v, 3)
    assert cache.counts.dtype == jnp.int32
    assert cache.means.dtype == jnp.float32
    assert cache.counts[0, 0].tolist() == [600, 0, 0]
    np.testing.assert_allclose(cache.means[0, 0, :, 0], [1, 0, 0], atol=1e-6)
    cache = vq.init_state(1, 1, 3, 2, window=0, dtype=jnp.bfloat16).cache
    every = lambda cache, v: (vq.absorb(cache, codes[:, :, 0], v), None)
    cache, _ = jit(lambda cache: jax.lax.scan(every, cache, jnp.moveaxis(v, 2, 0)))(cache)
    assert cache.counts[0, 0].tolist() == [600, 0, 0]
    np.testing.assert_allclose(cache.means[0, 0, :, 0], [1, 0, 0], atol=1e-6)


def test_half_precision_stays_near_and_in_its_dtype():
    q, k, v, codebook = operands(length=40, dk=8, codes=6)
    low = tuple(x.astype(jnp.bfloat16) for x in (q, k, v, codebook))
    expected = by_hand(*(x.astype(jnp.float64) for x in low))
    for reduction in ("assoc_scan", "sum"):
        out = jit(partial(vq.vq_attention, block_length=8, reduction=reduction, **XLA))(*low)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            out.astype(jnp.float64), expected, atol=4 * tol(jnp.bfloat16), err_msg=reduction
        )
    stepped, state = decoded(*low, window=8, **XLA)
    assert stepped.dtype == jnp.bfloat16
    assert state.cache.means.dtype == jnp.float32
    np.testing.assert_allclose(stepped.astype(jnp.float64), expected, atol=4 * tol(jnp.bfloat16))


def test_means_are_kept_where_sums_would_lose_digits():
    """Running sums of values with a large offset lose what means keep."""
    rng = np.random.default_rng(0)
    v = (1000 + rng.standard_normal((1, 1, 2048, 1))).astype(np.float32)
    codes = np.zeros((1, 1, 512, 4), np.int32)
    blocks = vq.summarize(jnp.asarray(codes), jnp.asarray(v).reshape(1, 1, 512, 4, 1), 1)
    exact = np.cumsum(v.astype(np.float64).ravel())[3::4] / np.arange(4, 2049, 4)
    error = {
        name: np.abs(
            np.asarray(jit(partial(vq.reduce_blocks, reduction=name))(blocks).means).ravel() - exact
        )
        for name in ("assoc_scan", "sum")
    }
    assert error["assoc_scan"].max() < 4e-4
    assert error["assoc_scan"].max() <= error["sum"].max()


def test_vmap_and_scale():
    q, k, v, codebook = operands(batch=3, length=9)
    run = partial(vq.vq_attention, block_length=4, **XLA)
    out = jit(run)(q, k, v, codebook)
    one = lambda q, k, v: run(q[None], k[None], v[None], codebook)[0]
    np.testing.assert_allclose(jit(jax.vmap(one))(q, k, v), out, atol=1e-12)
    scaled = jit(partial(run, scale=0.5))(q, k, v, codebook)
    np.testing.assert_allclose(scaled, by_hand(q / 2, k, v, codebook), atol=1e-12)
    books = jnp.stack([codebook, codebook + 1])
    many = jit(jax.vmap(run, in_axes=(None, None, None, 0)))(q, k, v, books)
    np.testing.assert_allclose(many[0], out, atol=1e-12)
    np.testing.assert_allclose(many[1], by_hand(q, k, v, codebook + 1), atol=1e-12)


def test_without_the_cache():
    q, k, v, codebook = operands(length=11)
    bias = biases(q, 2, "table")
    by_blocks, _ = every_form(q, k, v, codebook, block_length=3, window=2, bias=bias, cache=False)
    by_lags, _ = every_form(
        q, k, v, codebook, block_length=3, window=2, bias=bias, cache=False, local="window"
    )
    for outs in (by_blocks, by_lags):
        for name, out in outs.items():
            np.testing.assert_allclose(out, outs["quadratic"], atol=1e-12, err_msg=name)
    # Token 8 sees the tokens 3 to 8, or 6 to 8.
    for outs, first in ((by_blocks, 3), (by_lags, 6)):
        part = [x[:, :, first:9] for x in (q, k, v)]
        expected = by_hand(*part, codebook, bias, 2)[:, :, -1]
        np.testing.assert_allclose(outs["serial"][:, :, 8], expected, atol=1e-12)


def test_errors_name_the_argument():
    q, k, v, codebook = operands()
    run = lambda q=q, k=k, v=v, codebook=codebook, **o: vq.vq_attention(
        q, k, v, codebook, **{"block_length": 3} | o
    )
    values = [
        (lambda: run(q=q[..., :2]), "k must have q's key_dim 2; got 4"),
        (lambda: run(q=q[:, :3]), "q must have a number of heads that k's groups divide"),
        (lambda: run(v=v[:, :1]), "v must have shape"),
        (lambda: run(q=q[:, :, :4]), "q must have k's length 12; got 4"),
        (lambda: run(q=q[0]), r"q must be \[batch, heads, length, key_dim\]"),
        (lambda: run(codebook=codebook[:1]), r"codebook must be \[2, codes, 4\]"),
        (lambda: run(codebook=codebook[:, :0]), "codebook must hold at least one code"),
        (lambda: run(codebook=codebook[0]), "codebook must be"),
        (lambda: run(block_length=0), "block_length must be at least 1; got 0"),
        (lambda: run(window=4), "window must be at most block_length = 3"),
        (lambda: run(window=-1), "window must be at least 0"),
        (lambda: run(bias=jnp.zeros((4, 3)), window=3), "bias must have shape"),
        (lambda: run(bias=jnp.zeros((3, 4))), "bias must have shape"),
        (lambda: run(reduction="assoc"), "reduction must be one of .* Did you mean 'assoc_scan'"),
        (lambda: run(local="lags"), "local must be one of"),
        (lambda: run(block_length=5, pad=False), "block_length = 5 divides with pad=False; got 12"),
        (lambda: run(mask=jnp.ones((2, 3), bool)), "mask must have shape"),
        (lambda: run(codes=jnp.zeros((2, 2, 3), int)), "codes must have shape"),
        (lambda: vq.quadratic_attention(q, k, v, codebook, cache=False), "block_length must be"),
        (lambda: vq.quadratic_attention(q, k, v, codebook, rotary_base=9.0), "window must be"),
        (lambda: vq.quadratic_attention(q, k, v, None, codes=0), "codes must not be given"),
        (lambda: vq.reduce_blocks(None, reduction="mean"), "reduction must be one of"),
        (lambda: vq.rotate(q[..., :3], jnp.arange(12)), "even last axis"),
        (lambda: vq.relative_sinusoids(3, 5), "dim must be even"),
        (lambda: vq.xl_bias(q, jnp.zeros((4, 3, 2)), jnp.zeros((4, 4))), "r must be"),
        (lambda: vq.xl_bias(q, jnp.zeros((4, 3, 4)), jnp.zeros((4, 3))), "w must have shape"),
    ]
    for call, words in values:
        with pytest.raises(ValueError, match=words):
            call()
    types = [
        (lambda: run(codes=jnp.zeros((2, 2, 12))), "codes must be integers; got dtype float64"),
        (lambda: run(mask=jnp.ones((2, 12))), "mask must be boolean"),
        (lambda: run(k=k.astype(jnp.float32)), "k must have q's dtype float64"),
        (lambda: run(q=q.astype(int)), "q must be an array of real"),
        (lambda: run(bias=jnp.zeros((4, 4), int)), "bias must be an array of real"),
        (lambda: run(block_length=2.5), "block_length must be an integer"),
    ]
    for call, words in types:
        with pytest.raises(TypeError, match=words):
            call()
