"""Attention over quantised keys: the quadratic, block and decoding forms are one function."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.attention import vq

F64 = np.float64
# The card's first check.
CODEBOOK = np.array([[0.8, 0.2], [-0.5, 0.7], [-0.6, -0.6], [0.4, -0.9]])
TABLE = np.array([[0.5, 0.3, 0.1, -0.2]])


def card():
    t, c = np.arange(12)[:, None], np.arange(2)[None, :]
    q = 2 * np.sin(0.7 * t + 1.3 * c)
    k = np.sin(0.9 * t + 2.1 * c + 0.5)
    v = np.sin(0.4 * t + 0.8 * c + 1)
    q, k, v = (jnp.asarray(x)[None, None] for x in (q, k, v))
    return q, k, v, jnp.asarray(CODEBOOK)[None]


def operands(seed=0, batch=2, heads=4, groups=2, length=12, dk=4, dv=3, codes=5, dtype=F64):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return (
        draw(batch, heads, length, dk),
        draw(batch, groups, length, dk),
        draw(batch, groups, length, dv),
        draw(groups, codes, dk),
    )


def biases(q, window, kind, seed=1):
    rng = np.random.default_rng(seed)
    if kind == "none":
        return None
    shape = (q.shape[1], window + 1) if kind == "table" else (*q.shape[:-1], window + 1)
    return jnp.asarray(rng.standard_normal(shape), q.dtype)


def by_hand(q, k, v, codebook, bias=None, window=0, valid=None, rotary_base=None):
    """NumPy, in loops: the definition once more, with nothing in common with the package."""
    q, k, v, codebook = (np.asarray(x, F64) for x in (q, k, v, codebook))
    batch, heads, length, dk = q.shape
    groups = k.shape[1]
    out = np.zeros((batch, heads, length, v.shape[-1]))
    valid = np.ones((batch, length), bool) if valid is None else np.asarray(valid)

    def turn(x, angle):
        freq = rotary_base ** (-np.arange(0, dk, 2) / dk)
        z = (x[: dk // 2] + 1j * x[dk // 2 :]) * np.exp(1j * angle * freq)
        return np.concatenate([z.real, z.imag])

    for b, h in itertools.product(range(batch), range(heads)):
        g = h * groups // heads
        codes = np.argmin(((k[b, g][:, None] - codebook[g]) ** 2).sum(-1), axis=1)
        khat = codebook[g][codes]
        for i in range(length):
            scores = np.full(length, -np.inf)
            for j in range(i + 1):
                if not valid[b, j]:
                    continue
                lag = i - j
                query = q[b, h, i] if rotary_base is None else turn(q[b, h, i], min(lag, window))
                scores[j] = query @ khat[j]
                if bias is not None and lag <= window:
                    row = np.asarray(bias)
                    scores[j] += row[h, lag] if row.ndim == 2 else row[b, h, i, lag]
            if np.isfinite(scores).any():
                w = np.exp(scores - scores.max())
                out[b, h, i] = w / w.sum() @ v[b, g]
    return out


def decoded(q, k, v, codebook, *, window, bias=None, mask=None, **options):
    state = vq.init_state(
        q.shape[0],
        k.shape[1],
        codebook.shape[1],
        v.shape[-1],
        window=window,
        dtype=v.dtype,
        **{n: options[n] for n in ("cache", "local", "block_length") if n in options},
    )
    time = lambda x: jnp.moveaxis(x, 2, 0)
    rows = None if bias is None or bias.ndim == 2 else time(bias)

    def body(state, at):
        row = bias if rows is None else at["bias"]
        out, state = vq.step(
            state, at["q"], at["k"], at["v"], codebook, bias=row, mask=at.get("mask"), **options
        )
        return state, out

    xs = {"q": time(q), "k": time(k), "v": time(v)}
    if rows is not None:
        xs["bias"] = rows
    if mask is not None:
        xs["mask"] = mask.T
    state, out = jax.lax.scan(body, state, xs)
    return jnp.moveaxis(out, 0, 2), state


def test_card_digits():
    q, k, v, codebook = card()
    bias = jnp.asarray(TABLE)
    quantised = vq.quantize_keys(k, codebook)
    assert quantised.codes.ravel().tolist() == [0, 0, 3, 3, 2, 1, 1, 0, 0, 3, 3, 2]
    error = float(jnp.mean(jnp.sum((quantised.keys - k) ** 2, axis=-1)))
    np.testing.assert_allclose(error, 0.227234666552, atol=1e-10)
    stepped, state = decoded(q, k, v, codebook, window=3, bias=bias)
    outs = {
        "quadratic": vq.quadratic_attention(q, k, v, codebook, bias=bias),
        "decode": stepped,
    } | {
        name: vq.vq_attention(q, k, v, codebook, block_length=3, bias=bias, reduction=name)
        for name in vq.REDUCTIONS
    }
    for name, out in outs.items():
        out = np.asarray(out[0, 0])
        tight = {"atol": 1e-10, "rtol": 0, "err_msg": name}
        np.testing.assert_allclose(out[5], [0.708699325004, 0.071936607814], **tight)
        np.testing.assert_allclose(out[11], [0.071034608593, -0.067006505278], **tight)
        np.testing.assert_allclose(out.sum(), 7.701162282441, **tight)
    blocks = vq.summarize(
        quantised.codes.reshape(1, 1, 4, 3), v.reshape(1, 1, 4, 3, 2), num_codes=4
    )
    for name in vq.REDUCTIONS:
        # The queries of the last block find all tokens of the blocks 0 and 1.
        cache = vq.reduce_blocks(blocks, reduction=name)
        assert cache.counts[0, 0, 1].tolist() == [2, 1, 1, 2]
        expected = [
            [0.913460357398, 0.891172017349],
            [0.141120008060, -0.611857890943],
            [0.515501371821, -0.255541102027],
            [0.891172017349, 0.328310689941],
        ]
        np.testing.assert_allclose(cache.means[0, 0, 1], expected, atol=1e-10, rtol=0)
    assert state.cache.counts[0, 0].tolist() == [3, 2, 1, 2]
    exact = vq.quadratic_attention(q, k, v, None, bias=bias)
    np.testing.assert_allclose(
        exact[0, 0, 11], [0.063253158344, -0.082231702143], atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("kind", ["none", "table", "rows"])
@pytest.mark.parametrize(
    "heads", [(1, 1), (4, 4), (4, 1), (4, 2)], ids=["shga", "mha", "mqa", "gqa"]
)
def test_the_three_forms_and_numpy_agree(heads, kind):
    q, k, v, codebook = operands(heads=heads[0], groups=heads[1], length=11)
    bias = biases(q, 3, kind)
    quadratic = vq.quadratic_attention(q, k, v, codebook, bias=bias, window=3)
    np.testing.assert_allclose(quadratic, by_hand(q, k, v, codebook, bias, 3), atol=1e-12)
    for reduction in vq.REDUCTIONS:
        block = vq.vq_attention(
            q, k, v, codebook, bias=bias, window=3, block_length=3, reduction=reduction
        )
        np.testing.assert_allclose(block, quadratic, atol=1e-12, err_msg=reduction)
    stepped, state = decoded(q, k, v, codebook, window=3, bias=bias)
    np.testing.assert_allclose(stepped, quadratic, atol=1e-12)
    assert int(state.cache.counts.sum()) == 2 * heads[1] * (11 - 4)
    assert state.cache.counts.dtype == jnp.int32
