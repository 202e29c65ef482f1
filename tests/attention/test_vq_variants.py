"""Soft codes, the encoder's form, and what a layer costs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.attention import vq
from tests.attention.vq_cases import by_hand, card, jit, operands


def soft_by_hand(q, k, v, codebook, temperature, causal, valid=None):
    """The double sum of the definition, T × T × S."""
    q, k, v, codebook = (np.asarray(x, np.float64) for x in (q, k, v, codebook))
    q, share = q, q.shape[1] // k.shape[1]
    logits = -((k[:, :, :, None] - codebook[None, :, None]) ** 2).sum(-1) / (2 * temperature)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = np.repeat(p / p.sum(-1, keepdims=True), share, axis=1)
    v, codebook = np.repeat(v, share, axis=1), np.repeat(codebook, share, axis=0)
    e = np.exp(np.einsum("bhtd,hsd->bhts", q, codebook))
    weight = np.einsum("bhis,bhjs->bhij", e, p)
    if causal:
        weight = weight * np.tril(np.ones(weight.shape[-2:]))
    if valid is not None:
        weight = weight * np.asarray(valid)[:, None, None]
    total = weight.sum(-1, keepdims=True)
    return np.where(total > 0, weight @ v / np.where(total > 0, total, 1), 0)


@pytest.mark.parametrize("reduction", ["assoc_scan", "sum"])
def test_soft_attention_is_its_double_sum(reduction):
    q, k, v, codebook = operands(length=11)
    mask = jnp.asarray(np.random.default_rng(5).random((2, 11)) < 0.7).at[1, 0].set(False)

    @jit
    def run(q, k, v):
        call = partial(vq.soft_attention, q, k, v, codebook, temperature=0.3)
        outs = [call(mask=mask, block_length=n, reduction=reduction) for n in (1, 4, 32)]
        return outs, call(causal=False, mask=mask), call(scale=0.5)

    blocks, encoder, scaled = run(q, k, v)
    expected = soft_by_hand(q, k, v, codebook, 0.3, True, mask)
    for out in blocks:
        np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(
        encoder, soft_by_hand(q, k, v, codebook, 0.3, False, mask), atol=1e-12
    )
    np.testing.assert_allclose(scaled, soft_by_hand(q / 2, k, v, codebook, 0.3, True), atol=1e-12)


def test_soft_stream_continues_at_any_cut():
    q, k, v, codebook = operands(length=9)
    soft = {"temperature": 0.4}

    @jit
    def run(q, k, v):
        state = vq.soft_init_state(2, 2, 5, 3, dtype=v.dtype)
        part = lambda a, b: [x[:, :, a:b] for x in (q, k, v)]
        first, state = vq.soft_prefill(state, *part(0, 4), codebook, block_length=3, **soft)
        one, state = vq.soft_step(state, *(x[:, :, 4] for x in (q, k, v)), codebook, **soft)
        rest, state = vq.soft_prefill(state, *part(5, 9), codebook, block_length=3, **soft)
        return jnp.concatenate([first, one[:, :, None], rest], axis=2), state

    out, state = run(q, k, v)
    np.testing.assert_allclose(out, soft_by_hand(q, k, v, codebook, 0.4, True), atol=1e-12)
    np.testing.assert_allclose(state.counts.sum(-1), 9, atol=1e-12)


def test_what_is_not_finite_shows_in_what_sees_it_and_nowhere_else():
    q, k, v, codebook = operands(batch=1, length=9)
    q, k, v = (jnp.tile(x, (3, 1, 1, 1)) for x in (q, k, v))
    k = k.at[1, 0, 4, 1].set(jnp.nan)
    v = v.at[2, 0, 4, 2].set(jnp.inf)

    @jit
    def run(q, k, v):
        soft = {"temperature": 0.4}
        outs = {
            name: vq.soft_attention(q, k, v, codebook, block_length=3, reduction=name, **soft)
            for name in ("assoc_scan", "matmul")
        }
        each = lambda state, x: vq.soft_step(state, *x, codebook, **soft)[::-1]
        tokens = tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v))
        _, stepped = jax.lax.scan(each, vq.soft_init_state(3, 2, 5, 3, dtype=v.dtype), tokens)
        outs["step"] = jnp.moveaxis(stepped, 0, 2)
        return outs, vq.bidirectional_attention(q, k, v, codebook)

    outs, encoder = run(q, k, v)
    outs["encoder"] = encoder
    close = partial(np.testing.assert_allclose, atol=1e-12)
    for name, out in outs.items():
        first = 0 if name == "encoder" else 4
        same = jnp.broadcast_to(out[:1], (2, *out.shape[1:]))
        assert bool(jnp.isfinite(out[0]).all())
        close(out[1:, 2:], same[:, 2:], err_msg=name)
        close(out[1:, :2, :first], same[:, :2, :first], err_msg=name)
        assert bool(jnp.isnan(out[1:, :2, first:]).all()), name


def test_soft_gradients_are_exact_and_reach_keys_and_codes():
    q, k, v, codebook = operands(batch=1, heads=2, groups=1, length=8)

    @jit
    def grads(*args):
        def direct(q, k, v, codebook):
            square = jnp.sum((k[:, :, :, None] - codebook[None, :, None]) ** 2, axis=-1)
            p = jax.nn.softmax(-square / 0.6, axis=-1)[:, 0]
            e = jnp.exp(jnp.einsum("bhtd,sd->bhts", q, codebook[0]))
            weight = jnp.einsum("bhis,bjs->bhij", e, p) * jnp.tril(jnp.ones((8, 8)))[None, None]
            return weight / weight.sum(-1, keepdims=True) @ v

        def own(q, k, v, codebook):
            return vq.soft_attention(q, k, v, codebook, temperature=0.3, block_length=3)

        loss = lambda f: lambda *args: jnp.sum(jnp.sin(3 * f(*args)))
        return [jax.grad(loss(f), argnums=(0, 1, 2, 3))(*args) for f in (own, direct)]

    for name, grad, want in zip("qkvC", *grads(q, k, v, codebook), strict=True):
        np.testing.assert_allclose(grad, want, atol=1e-12, err_msg=name)
        assert float(jnp.abs(grad).max()) > 1e-3


def test_soft_codes_become_hard_ones():
    q, k, v, codebook = card()
    hard = by_hand(q, k, v, codebook)
    run = jit(vq.soft_attention, static_argnames="temperature")
    deviation = [
        float(jnp.abs(run(q, k, v, codebook, temperature=t) - hard).max())
        for t in (1.0, 1e-1, 1e-2, 1e-3)
    ]
    assert deviation == sorted(deviation, reverse=True)
    assert deviation[0] > 1e-2
    assert deviation[-1] < 2e-5


@pytest.mark.x32
def test_soft_codes_that_nothing_reaches_do_no_harm():
    """Shares that underflow, and a preferred code with almost no tokens."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    k, v = draw(1, 1, 40, 4), draw(1, 1, 40, 3)
    codebook = jnp.concatenate([draw(1, 6, 4), jnp.full((1, 1, 4), 30.0)], axis=1)
    q = 5 * draw(1, 1, 40, 4) + 3

    def run(q, k, v, codebook):
        out = vq.soft_attention(q, k, v, codebook, temperature=0.01, block_length=8)
        return jnp.sum(out**2), out

    both = jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3), has_aux=True))
    (_, out), grads = both(q, k, v, codebook)
    assert float(jnp.abs(out).max()) <= float(jnp.abs(v).max()) * (1 + 1e-5)
    for grad in grads:
        assert bool(jnp.isfinite(grad).all())


def test_bidirectional_is_attention_to_all_codewords():
    q, k, v, codebook = operands(length=9)
    mask = jnp.asarray(np.random.default_rng(5).random((2, 9)) < 0.7)
    mask = mask.at[1].set(False)

    @jit
    def run(q, k, v):
        out = partial(vq.bidirectional_attention, codebook=codebook)
        loss = lambda q, k, v: jnp.sum(out(q, k, v) ** 2)
        return out(q, k, v), out(q, k, v, mask=mask), jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    whole, masked, grads = run(q, k, v)
    keys = np.repeat(np.asarray(vq.quantize_keys(k, codebook).keys), 2, axis=1)
    values = np.repeat(np.asarray(v), 2, axis=1)
    for out, seen in ((whole, np.ones((2, 9))), (masked, np.asarray(mask))):
        weight = np.exp(np.einsum("bhid,bhjd->bhij", q, keys)) * seen[:, None, None]
        total = weight.sum(-1, keepdims=True)
        expected = np.where(total > 0, weight @ values / np.where(total > 0, total, 1), 0)
        np.testing.assert_allclose(out, expected, atol=1e-12)
    assert float(jnp.abs(grads[0]).min()) > 0
    assert not grads[1].any()
    assert float(jnp.abs(grads[2]).min()) > 0
    # Every order of the tokens gives the same.
    order = np.random.default_rng(1).permutation(9)
    moved = vq.bidirectional_attention(q, k[:, :, order], v[:, :, order], codebook)
    np.testing.assert_allclose(moved, whole, atol=1e-12)


def test_costs_of_the_card():
    sizes = {"dim": 768, "key_dim": 128, "value_dim": 1536, "num_codes": 512, "block_length": 512}
    at = {
        length: vq.attention_costs(length=length, **sizes) for length in (2048, 8192, 32768, 131072)
    }
    costs = at[8192]
    assert costs.projections == 3_735_552
    assert costs.attention == 2_555_904
    assert costs.codes + costs.bias + costs.reduction == 983_040
    assert costs.dense_attention + costs.dense_bias == 14_680_064
    ratios = {length: c.dense_layer / c.layer for length, c in at.items()}
    for length, ratio, digits in (
        (2048, 1.02, 2),
        (8192, 2.53, 2),
        (32768, 8.59, 2),
        (131072, 32.8, 1),
    ):
        assert round(ratios[length], digits) == ratio
    assert costs.state_bytes == 6_295_552
    assert at[131072].kv_bytes == 872_415_232
    heads = vq.attention_costs(**sizes | {"value_dim": 128}, length=8192, heads=6, groups=6)
    assert heads.attention == 6 * 1536 * 256
    assert heads.projections - 6 * 128 * 768 == 768 * 6 * 128 * 4  # gated; without: 3
    with pytest.raises(ValueError, match="heads must be a multiple of groups = 4"):
        vq.attention_costs(**sizes, length=8, heads=6, groups=4)
    with pytest.raises(ValueError, match="length must be at least 1"):
        vq.attention_costs(**sizes, length=0)


def test_errors_name_the_argument():
    q, k, v, codebook = operands()
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        vq.soft_attention(q, k, v, codebook, temperature=0.0)
    with pytest.raises(ValueError, match="block_length must be at least 1"):
        vq.soft_attention(q, k, v, codebook, temperature=1.0, block_length=0)
    with pytest.raises(ValueError, match="reduction must be one of"):
        vq.soft_attention(q, k, v, codebook, temperature=1.0, reduction="mean")
    with pytest.raises(TypeError, match="mask must be boolean"):
        vq.bidirectional_attention(q, k, v, codebook, mask=jnp.ones((2, 12)))
    with pytest.raises(ValueError, match="k must have q's key_dim"):
        vq.bidirectional_attention(q[..., :2], k, v, codebook)
