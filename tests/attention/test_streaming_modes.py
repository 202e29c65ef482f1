"""Layer modes: exact counts, constant memory, equality with the dense model, clear errors."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.attention import streaming
from jaxkit.attention.streaming import AttentionModel, Decoder, ModelParams, costs, recompute

TABLE = {
    1: (1, 2, 3, 4, 5, 6, 7),
    2: (2, 5, 9, 14, 20, 27, 35),
    3: (3, 9, 19, 34, 55, 83, 119),
    4: (4, 14, 34, 69, 125, 209, 329),
}


@functools.cache
def toy(layers, *, window=None, dtype="float64", dim=4, heads=2, groups=1):
    model = streaming.toy_model(layers, window=window)
    shapes = jax.eval_shape(
        lambda key: streaming.init_toy(
            key, model, vocab=11, dim=dim, heads=heads, groups=groups, dtype=dtype
        ),
        jax.random.key(0),
    )
    rng = np.random.default_rng(layers)
    draw = lambda s: jnp.asarray(rng.standard_normal(s.shape) / math.sqrt(dim), s.dtype)
    return model, jax.tree.map(draw, shapes)


def some_tokens(length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 11, length), jnp.int32)


def dense_model(params, tokens, *, layers, window=None):
    """The toy model written out in NumPy float64, all positions and the whole matrix at once."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    norm = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    x = w.embed[np.asarray(tokens)]
    L = len(x)
    i, j = np.arange(L)[:, None], np.arange(L)[None]
    seen = (j <= i) & (j > i - (L if window is None else window))
    for n in range(layers):
        p = {name: leaf[n] for name, leaf in w.layers.items()}
        q = np.einsum("td,dhk->thk", norm(x), p["query"])
        k, v = (np.einsum("td,dgk->tgk", norm(x), p[name]) for name in ("key", "value"))
        each = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, each, 1), np.repeat(v, each, 1)
        s = np.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])
        s = np.where(seen, s, -np.inf)
        a = np.exp(s - s.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shk,hkd->td", a, v, p["out"])
        x = x + gelu(norm(x) @ p["up"]) @ p["down"]
    return x


# Costs.


def test_key_visits_of_the_card():
    for n, row in TABLE.items():
        assert tuple(costs.key_visits(n, p) for p in range(1, 8)) == row
    assert [costs.key_visits(n, 1024) for n in (1, 2, 3, 4)] == [
        1024,
        525_824,
        180_007_424,
        46_261_908_224,
    ]
    # The recursion itself.
    for n in range(1, 5):
        for p in range(1, 8):
            below = (costs.key_visits(n - 1, j) for j in range(1, p + 1))
            assert costs.key_visits(n, p) == sum(1 + cost for cost in below)
    assert costs.key_visits(0, 9) == 0


def test_totals_blocks_and_groups_of_the_card():
    assert [costs.total_visits(n, 8) for n in (1, 2, 3, 4)] == [36, 156, 486, 1278]
    for n in (1, 2, 3):
        assert costs.total_visits(n, 9) == sum(costs.key_visits(n, p) for p in range(1, 10))
    # L^{N+1} / (N+1)! asymptotically.
    assert costs.total_visits(2, 10**6) / (10**18 / 6) == pytest.approx(1, abs=1e-4)
    blocks = [costs.block_evaluations(3, p) for p in range(1, 6)]
    assert blocks == [3, 6, 10, 15, 21] == [math.comb(p + 2, 2) for p in range(1, 6)]
    assert costs.mode_visits("grouped", 4, 64, group=2) == 4_288
    assert costs.mode_visits("recompute", 4, 64) == 814_384
    assert costs.mode_visits("kv_cache", 4, 64) == 256
    for p in (1, 5, 64):
        assert costs.mode_visits("grouped", 4, p, group=4) == costs.mode_visits("recompute", 4, p)
        same = costs.mode_visits("input_cache", 4, p)
        assert costs.mode_visits("grouped", 4, p, group=1) == same


def test_state_sizes():
    assert costs.post_state_size(8192, 80) == 1_310_720
    sizes = {"dim": 8, "groups": 2, "key_dim": 4, "heads": 4, "value_dim": 3}
    for p in (10, 1000):
        assert costs.kept_numbers("kv_cache", 3, p, **sizes) == 3 * p * 2 * (4 + 3)
        assert costs.kept_numbers("input_cache", 3, p, **sizes) == 3 * p * 8
        assert costs.kept_numbers("layerwise", 3, p, **sizes) == p * 8
        assert costs.kept_numbers("grouped", 4, p, group=2, **sizes) == 2 * p * 8
        want = 3 * (4 * 4 + 4 * 3 + 8 + 2 * 4)
        assert costs.kept_numbers("recompute", 3, p, **sizes) == want


@pytest.mark.parametrize("window", [1, 2, 3, 7, 50])
def test_windowed_visits_by_brute_force(window):
    @functools.cache
    def brute(n, p):
        if n == 0:
            return 0
        return sum(1 + brute(n - 1, j) for j in range(max(1, p - window + 1), p + 1))

    for n in range(4):
        for p in (0, 1, 2, 5, 9, 30):
            assert costs.windowed_visits(n, p, window) == brute(n, p)
    # O(wⁿ), not O(pⁿ).
    assert costs.windowed_visits(3, 10**9, 4) == 4 + 16 + 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costs.key_visits(-1, 3), "layers must be at least 0; got -1"),
        (lambda: costs.key_visits(2, -3), "visible must be at least 0"),
        (lambda: costs.block_evaluations(2, 0), "visible must be at least 1"),
        (lambda: costs.mode_visits("cache", 2, 3), "mode must be one of 'kv_cache', .*'input_c"),
        (lambda: costs.mode_visits("grouped", 4, 3), "group must be given"),
        (lambda: costs.mode_visits("grouped", 4, 3, group=3), "group must divide the 4 layers"),
        (lambda: costs.mode_visits("grouped", 4, 3, group=8), "group must divide the 4 layers"),
        (lambda: costs.mode_visits("recompute", 4, 3, group=2), "group must come with mode"),
        (lambda: costs.kept_numbers("kvcache", 1, 1, dim=1, groups=1, key_dim=1), "'kv_cache'"),
        (lambda: costs.windowed_visits(1, 1, 0), "window must be at least 1"),
    ],
)
def test_cost_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Recomputation.


@functools.cache
def run_recompute(layers, length, implementation, window=None):
    """Compiled once: all positions of the same program."""
    model, params = toy(layers, window=window)
    run = lambda tokens, i: recompute(
        model, params, tokens, i, implementation=implementation, limit=None
    )
    return jax.jit(run).lower(some_tokens(length), jnp.int32(0)).compile()


@pytest.mark.parametrize("implementation", ["nested", "stack"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_visits_are_exactly_the_cards(layers, implementation):
    run, tokens = run_recompute(layers, 7, implementation), some_tokens(7)
    _, params = toy(layers)
    want = dense_model(params, tokens, layers=layers)
    total = 0
    for i in range(7):
        x, counts = run(tokens, jnp.int32(i))
        assert counts.visits == TABLE[layers][i] == math.comb(i + 1 + layers, layers) - 1
        assert counts.blocks == costs.block_evaluations(layers, i + 1)
        np.testing.assert_allclose(x, want[i], rtol=0, atol=1e-12)
        total += int(counts.visits)
    assert total == costs.total_visits(layers, 7)


@pytest.mark.parametrize("layers", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_recompute_is_the_dense_model_at_256(layers):
    run, tokens = run_recompute(layers, 256, "nested"), some_tokens(256)
    want = dense_model(toy(layers)[1], tokens, layers=layers)
    for i in (15, 63, 255):
        x, counts = run(tokens, jnp.int32(i))
        np.testing.assert_allclose(x, want[i], rtol=0, atol=1e-12)
        assert counts.visits == costs.key_visits(layers, i + 1)


@pytest.mark.parametrize("implementation", ["nested", "stack"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_temporary_memory_does_not_depend_on_the_length(layers, implementation):
    temps = {
        run_recompute(layers, L, implementation).memory_analysis().temp_size_in_bytes
        for L in (16, 64, 256)
    }
    assert len(temps) == 1
    assert 0 < temps.pop() < 20_000


def decode_temp(mode, length, group=None):
    model, params = toy(2)
    decoder = Decoder(model, mode, group=group)
    state = jax.eval_shape(lambda: decoder.init_state(params, some_tokens(1)[0], length))
    step = jax.jit(decoder.step, donate_argnums=1)
    plan = step.lower(params, state, some_tokens(1)[0]).compile().memory_analysis()
    return plan.temp_size_in_bytes + plan.argument_size_in_bytes


def test_kv_cache_memory_grows_linearly():
    sizes = [decode_temp("kv_cache", L) for L in (1024, 2048, 4096)]
    growth = np.diff(sizes)
    assert growth[1] == pytest.approx(2 * growth[0], rel=0.05)
    assert growth[0] >= 1024 * costs.kept_numbers("kv_cache", 2, 1, dim=4, groups=1, key_dim=2) * 8


@pytest.mark.parametrize("implementation", ["nested", "stack"])
def test_a_window_bounds_the_visits(implementation):
    run, tokens = run_recompute(2, 12, implementation, window=3), some_tokens(12)
    want = dense_model(toy(2, window=3)[1], tokens, layers=2, window=3)
    for i in (0, 2, 3, 4, 11):
        x, counts = run(tokens, jnp.int32(i))
        np.testing.assert_allclose(x, want[i], rtol=0, atol=1e-12)
        assert counts.visits == costs.windowed_visits(2, i + 1, 3)
    assert counts.visits == 3 + 9


def test_program_size_does_not_explode_with_depth():
    def equations(layers, implementation):
        model, params = toy(layers)
        run = lambda t: recompute(model, params, t, implementation=implementation, limit=None)[0]
        return str(jax.make_jaxpr(run)(np.zeros(4, np.int32))).count(" = ")

    nested = [equations(n, "nested") for n in (2, 4, 6)]
    assert nested[2] - nested[1] == nested[1] - nested[0]  # linear, not 2^N
    stack = [equations(n, "stack") for n in (2, 12)]
    assert stack[0] == stack[1]


def test_deep_models_take_the_stack_machine():
    model, params = toy(9)
    jaxpr = str(jax.make_jaxpr(lambda t: recompute(model, params, t)[0])(some_tokens(3)))
    assert jaxpr.count("while[") == 1
    x, counts = jax.jit(lambda t: recompute(model, params, t))(some_tokens(3))
    np.testing.assert_allclose(
        x, dense_model(params, some_tokens(3), layers=9)[2], rtol=0, atol=1e-12
    )
    assert counts.visits == costs.key_visits(9, 3)


@pytest.mark.parametrize("implementation", ["nested", "stack"])
def test_recompute_under_vmap_and_jvp(implementation):
    model, params = toy(2)
    tokens = jnp.stack([some_tokens(6, seed) for seed in range(3)])
    run = lambda t, i: recompute(model, params, t, i, implementation=implementation)[0]
    places = jnp.asarray([5, 0, 3])
    got = jax.jit(jax.vmap(run))(tokens, places)
    for b in range(3):
        want = dense_model(params, tokens[b], layers=2)[int(places[b])]
        np.testing.assert_allclose(got[b], want, rtol=0, atol=1e-12)

    # Forward mode against a difference quotient.
    def value(scale):
        scaled = params._replace(layers=jax.tree.map(lambda w: w * scale, params.layers))
        return recompute(model, scaled, tokens[0], implementation=implementation)[0]

    _, slope = jax.jit(lambda s: jax.jvp(value, (s,), (jnp.ones(()),)))(jnp.ones(()))
    value = jax.jit(value)
    want = (value(1 + 1e-5) - value(1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope, want, rtol=1e-6, atol=1e-9)


def test_positions_and_tokens_that_there_are_not_show_as_nan():
    model, params = toy(2)
    run = jax.jit(lambda t, i: recompute(model, params, t, i)[0])
    for i in (-1, 7):
        assert np.isnan(run(some_tokens(7), jnp.int32(i))).all()
    for token in (-1, 11):
        assert np.isnan(run(some_tokens(7).at[2].set(token), jnp.int32(3))).all()
        assert np.isfinite(run(some_tokens(7).at[4].set(token), jnp.int32(3))).all()


@pytest.mark.parametrize("mode", ["recompute", "grouped"])
@pytest.mark.parametrize("how", [jax.grad, lambda f: jax.jit(jax.grad(f))])
def test_reverse_mode_says_what_to_do(mode, how):
    model, params = toy(2)
    decoder = Decoder(model, mode, group=1 if mode == "grouped" else None)

    def loss(params):
        return decoder.run(params, some_tokens(3))[0].sum()

    with pytest.raises(ValueError, match=r"no reverse-mode derivative.*'layerwise'"):
        how(loss)(params)
    if mode == "recompute":
        with pytest.raises(ValueError, match="no reverse-mode derivative"):
            how(lambda p: recompute(model, p, some_tokens(3))[0].sum())(params)


def test_cost_warning():
    model, params = toy(4)
    with pytest.warns(streaming.CostWarning, match="p = 64 will make 814,384 key visits.*limit=1"):
        jax.eval_shape(lambda t: recompute(model, params, t, limit=1e5), some_tokens(64))
    # A known position is judged by itself, a traced one by the last.
    jax.eval_shape(lambda t: recompute(model, params, t, 3, limit=1e5), some_tokens(64))
    with pytest.warns(streaming.CostWarning):
        jax.eval_shape(
            lambda t, i: recompute(model, params, t, i, limit=1e5), some_tokens(64), jnp.int32(3)
        )
    jax.eval_shape(lambda t: recompute(model, params, t, limit=None), some_tokens(1024))
    decoder = Decoder(model, "grouped", group=2, limit=4000)
    with pytest.warns(streaming.CostWarning, match="4,288"):
        jax.eval_shape(lambda t: decoder.run(params, t), some_tokens(64))


# All modes.

MODES = [
    ("kv_cache", None),
    ("input_cache", None),
    ("layerwise", None),
    ("grouped", 1),
    ("grouped", 2),
    ("grouped", 4),
    ("recompute", None),
]


@pytest.mark.parametrize(("mode", "group"), MODES)
@pytest.mark.parametrize("window", [None, 3])
def test_all_modes_are_the_dense_model(mode, group, window):
    model, params = toy(4, window=window)
    tokens = some_tokens(6)
    decoder = Decoder(model, mode, group=group)
    xs, state = jax.jit(decoder.run)(params, tokens)
    want = dense_model(params, tokens, layers=4, window=window)
    np.testing.assert_allclose(xs, want, rtol=0, atol=1e-12)
    visits = sum(costs.mode_visits(mode, 4, p, group=group, window=window) for p in range(1, 7))
    assert state.counts.visits == visits
    assert state.position == 6
    # What is kept is what the card says, in buffers of the capacity.
    kept = sum(x.size for x in jax.tree.leaves(state.cache))
    sizes = {"dim": 4, "groups": 1, "key_dim": 2}
    if mode in ("recompute", "layerwise") or group == 4:
        assert kept == 0
        np.testing.assert_array_equal(state.tokens, tokens)
    else:
        assert kept == costs.kept_numbers(mode, 4, 6, group=group, **sizes)
        assert state.tokens == ()


def test_layerwise_is_the_dense_model_and_trains():
    model, params = toy(3, heads=4, groups=2, dim=8)
    tokens = some_tokens(20)

    def loss(f, params):
        x, kept = f(params)
        return jnp.sin(x).sum(), (x, kept)

    def tiled(params):
        return streaming.layerwise(model, params, tokens, block_q=8, block_k=8, keep_inputs=True)

    # The gradient is also that of the cached decoding, whose loop has a static length.
    cached = lambda params: Decoder(model).run(params, tokens)
    (a, (x, inputs)), (b, _) = (
        jax.jit(jax.grad(functools.partial(loss, f), has_aux=True))(params) for f in (tiled, cached)
    )
    np.testing.assert_allclose(x, dense_model(params, tokens, layers=3), rtol=0, atol=1e-12)
    np.testing.assert_allclose(inputs[0], params.embed[tokens], rtol=0, atol=0)
    np.testing.assert_allclose(inputs[2], dense_model(params, tokens, layers=2), atol=1e-12)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-11), a, b)


def test_prefill_and_go_on_step_by_step():
    model, params = toy(2)
    tokens = some_tokens(6)
    want = dense_model(params, tokens, layers=2)
    for mode, group in (("kv_cache", None), ("grouped", 1), ("recompute", None)):
        decoder = Decoder(model, mode, group=group)
        state = decoder.init_state(params, 0, 6)
        _, state = jax.jit(decoder.run)(params, tokens[:4], state)
        step = jax.jit(decoder.step)
        for i in (4, 5):
            x, state = step(params, state, tokens[i])
            np.testing.assert_allclose(x, want[i], rtol=0, atol=1e-12)
        # There is no room for a seventh position, and no older one is overwritten silently.
        x, _ = step(params, state, tokens[0])
        assert np.isnan(x).all()


def test_modes_under_vmap():
    model, params = toy(2)
    tokens = jnp.stack([some_tokens(4, seed) for seed in range(3)])
    for mode in ("kv_cache", "recompute"):
        run = jax.jit(jax.vmap(lambda t, m=mode: Decoder(model, m).run(params, t)[0]))
        got = run(tokens)
        for b in range(3):
            want = dense_model(params, tokens[b], layers=2)
            np.testing.assert_allclose(got[b], want, rtol=0, atol=1e-12)


@pytest.mark.x32
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_dtypes(dtype):
    model, params = toy(2, dtype=dtype, dim=16)
    tokens = some_tokens(8)
    want = dense_model(params, tokens, layers=2)
    for mode in ("kv_cache", "recompute", "layerwise"):
        xs, _ = jax.jit(Decoder(model, mode).run)(params, tokens)
        assert xs.dtype == jnp.dtype(dtype)
        limit = 1e-5 if dtype == "float32" else 0.2
        np.testing.assert_allclose(np.asarray(xs, np.float64), want, rtol=0, atol=limit)


def test_any_layer_function_and_any_tokens():
    """Rotary positions, real-valued inputs in a pytree, a linear block of another shape."""

    def rotate(x, position):
        angle = position.astype(x.dtype) * 0.3
        c, s = jnp.cos(angle), jnp.sin(angle)
        return jnp.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], -1)

    model = AttentionModel(
        embed=lambda w, token, i: token["x"] * w + token["y"],
        query=lambda w, x, i: rotate((w["q"] @ x).reshape(3, 2), i),
        key_value=lambda w, x, i: (rotate((w["k"] @ x).reshape(1, 2), i), x[None]),
        block=lambda w, x, out: jnp.tanh(x + w["o"] @ out.reshape(-1)),
        num_layers=2,
        scale=1.0,
    )
    keys = jax.random.split(jax.random.key(0), 5)
    layers = {
        "q": jax.random.normal(keys[0], (2, 6, 5)),
        "k": jax.random.normal(keys[1], (2, 2, 5)),
        "o": jax.random.normal(keys[2], (2, 5, 15)),
    }
    params = ModelParams(jnp.asarray(0.5), layers)
    tokens = {"x": jax.random.normal(keys[3], (5, 5)), "y": jax.random.normal(keys[4], (5, 5))}
    runs = {
        mode: jax.jit(Decoder(model, mode).run)(params, tokens)[0]
        for mode in ("kv_cache", "layerwise", "recompute")
    }
    for xs in runs.values():
        np.testing.assert_allclose(xs, runs["kv_cache"], rtol=0, atol=1e-12)
    # The first position sees itself alone.
    x = tokens["x"][0] * 0.5 + tokens["y"][0]
    for n in range(2):
        x = jnp.tanh(x + layers["o"][n] @ jnp.tile(x, 3))
    np.testing.assert_allclose(runs["recompute"][0], x, rtol=0, atol=1e-12)


def broken(**change):
    model, params = toy(2)
    return model._replace(**change), params


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, p: Decoder(m, "cache"), ValueError, "mode must be one of"),
        (lambda m, p: Decoder(m, "recomputed"), ValueError, "Did you mean 'recompute'"),
        (lambda m, p: Decoder(m, "grouped"), ValueError, "group must be given"),
        (lambda m, p: Decoder(m, "grouped", group=3), ValueError, "group must divide the 2 layers"),
        (lambda m, p: Decoder(m, "grouped", group=0), ValueError, "group must be at least 1"),
        (lambda m, p: Decoder(m, "kv_cache", group=1), ValueError, "group must come with"),
        (lambda m, p: Decoder(m, implementation="loop"), ValueError, "implementation must be"),
        (lambda m, p: Decoder(m, limit="many"), TypeError, "limit must be a number"),
        (lambda m, p: Decoder(m, limit=-1), ValueError, "limit must be at least 0"),
        (lambda m, p: Decoder(m).run(p, jnp.zeros(0, int)), ValueError, "at least one position"),
        (lambda m, p: Decoder(m).init_state(p, 0, 0), ValueError, "capacity must be at least 1"),
        (
            lambda m, p: Decoder(m, "recompute").step(p, Decoder(m).init_state(p, 0, 4), 0),
            ValueError,
            "init_state of a decoder of mode 'recompute'",
        ),
        (lambda m, p: recompute(m, p, some_tokens(3), 3), ValueError, "position must be below"),
        (lambda m, p: recompute(m, p, some_tokens(3), -1), ValueError, "position must be at least"),
        (lambda m, p: recompute(m, p, some_tokens(3), 1.5), TypeError, "position must be an int"),
        (
            lambda m, p: jax.eval_shape(lambda i: recompute(m, p, some_tokens(3), i), 1.0),
            TypeError,
            "position must be an integer",
        ),
        (
            lambda m, p: recompute(m._replace(num_layers=3), p, some_tokens(3)),
            ValueError,
            "params.layers must have the 3 layers",
        ),
        (lambda m, p: streaming.toy_model(0), ValueError, "num_layers must be at least 1"),
        (
            lambda m, p: recompute(m._replace(window=0), p, some_tokens(3)),
            ValueError,
            "window must be at least 1",
        ),
        (
            lambda m, p: recompute(m._replace(block=lambda w, x, o: o), p, some_tokens(3)),
            ValueError,
            r"block must give what it takes, (4,) float64; got (2, 2)",
        ),
        (
            lambda m, p: recompute(
                m._replace(key_value=lambda w, x, i: (x[None], x[None])), p, some_tokens(3)
            ),
            ValueError,
            "query and key_value must give [heads, key_dim]",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(*toy(2))


# Page turning.


def test_page_turning_an_rnn_oldest_first_is_the_rnn():
    weights = jax.random.normal(jax.random.key(0), (4, 4)) / 2
    xs = jax.random.normal(jax.random.key(1), (7, 4))

    def step(h, x):
        h = jnp.tanh(weights @ h + x)
        return h, h[:2]

    run = streaming.page_turning(step, order="oldest-first")
    want = jax.lax.scan(step, jnp.zeros(4), xs)[1]
    np.testing.assert_allclose(jax.jit(run)(jnp.zeros(4), xs), want, rtol=0, atol=1e-14)
    # A window forgets by construction.
    run = streaming.page_turning(step, order="oldest-first", window=3)
    got = run(jnp.zeros(4), xs)
    np.testing.assert_allclose(got[:3], want[:3], rtol=0, atol=1e-14)
    short = jax.lax.scan(step, jnp.zeros(4), xs[3:6])[1]
    np.testing.assert_allclose(got[5], short[-1], rtol=0, atol=1e-14)


def attention_as_rnn(dim):
    """The post's reading: the first step meets the token itself and makes the query of it."""

    def step(state, token):
        q, first, softmax = state
        q = jnp.where(first, token["q"], q)
        softmax = streaming.update(softmax, q @ token["k"], token["v"])
        return (q, jnp.zeros((), bool), softmax), streaming.finalize(softmax).out

    blank = streaming.identity((), dim, dtype=jnp.float64)
    return step, (jnp.zeros(3), jnp.ones((), bool), blank)


@pytest.mark.parametrize("differentiable", [False, True])
def test_page_turning_with_a_softmax_state_is_attention(differentiable):
    keys = jax.random.split(jax.random.key(2), 3)
    xs = {name: jax.random.normal(k, (6, 3)) for name, k in zip("qkv", keys, strict=True)}
    step, init = attention_as_rnn(3)
    run = streaming.page_turning(step, differentiable=differentiable)

    def attention(xs):
        q, k, v = (xs[name][:, None] for name in "qkv")
        return streaming.blockwise_attention(q, k, v, causal=True, scale=1.0).out[:, 0]

    got = jax.jit(run)(init, xs)
    np.testing.assert_allclose(got, attention(xs), rtol=0, atol=1e-12)
    loss = lambda f, xs: jnp.sin(f(xs)).sum()
    if differentiable:
        a, b = (
            jax.jit(jax.grad(functools.partial(loss, f)))(xs)
            for f in (functools.partial(run, init), attention)
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), a, b)
    else:
        with pytest.raises(ValueError, match="page_turning has no reverse-mode derivative"):
            jax.grad(lambda xs: loss(functools.partial(run, init), xs))(xs)


def test_page_turning_errors():
    step = lambda s, x: (s, x)
    with pytest.raises(ValueError, match="order must be one of"):
        streaming.page_turning(step, order="newest")
    with pytest.raises(ValueError, match="window must be at least 1"):
        streaming.page_turning(step, window=0)
    with pytest.raises(ValueError, match="positions on the first axis; got none"):
        streaming.page_turning(step)(0, ())
    with pytest.raises(ValueError, match="xs must have at least one position"):
        streaming.page_turning(step)(0, jnp.zeros(0))
    with pytest.raises(ValueError, match=r"one length on all first axes; got \[2, 3\]"):
        streaming.page_turning(step)(0, (jnp.zeros(2), jnp.zeros(3)))
