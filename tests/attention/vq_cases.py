"""Operands, and the definition once more in NumPy loops, for the tests of jaxkit.attention.vq."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit.attention import vq

# The first check of the card.
CODEBOOK = np.array([[0.8, 0.2], [-0.5, 0.7], [-0.6, -0.6], [0.4, -0.9]])
TABLE = np.array([[0.5, 0.3, 0.1, -0.2]])
# Compiling takes most of the time of these tests, and half of that is for speed that small operands
# have no use for.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# Tests call the pure-JAX kernel by name: `auto` traces those of every platform.
XLA = {"implementation": "xla"}


def card():
    t, c = np.arange(12)[:, None], np.arange(2)[None, :]
    q = 2 * np.sin(0.7 * t + 1.3 * c)
    k = np.sin(0.9 * t + 2.1 * c + 0.5)
    v = np.sin(0.4 * t + 0.8 * c + 1)
    q, k, v = (jnp.asarray(x)[None, None] for x in (q, k, v))
    return q, k, v, jnp.asarray(CODEBOOK)[None]


def operands(seed=0, batch=2, heads=4, groups=2, length=12, dk=4, dv=3, codes=5, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return (
        draw(batch, heads, length, dk),
        draw(batch, groups, length, dk),
        draw(batch, groups, length, dv),
        draw(groups, codes, dk),
    )


def biases(q, window, kind, seed=1):
    if kind == "none":
        return None
    shape = (q.shape[1], window + 1) if kind == "table" else (*q.shape[:-1], window + 1)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), q.dtype)


def by_hand(q, k, v, codebook, bias=None, window=0, valid=None, rotary_base=None):
    """In loops, with nothing in common with the package."""
    q, k, v, codebook = (np.asarray(x, np.float64) for x in (q, k, v, codebook))
    batch, heads, length, dk = q.shape
    groups = k.shape[1]
    out = np.zeros((batch, heads, length, v.shape[-1]))
    valid = np.ones((batch, length), bool) if valid is None else np.asarray(valid)

    def turn(x, lag):
        freq = rotary_base ** (-np.arange(0, dk, 2) / dk)
        z = (x[: dk // 2] + 1j * x[dk // 2 :]) * np.exp(1j * lag * freq)
        return np.concatenate([z.real, z.imag])

    for b, h in itertools.product(range(batch), range(heads)):
        g = h * groups // heads
        codes = np.argmin(((k[b, g][:, None] - codebook[g]) ** 2).sum(-1), axis=1)
        for i in range(length):
            scores = np.full(length, -np.inf)
            for j in range(i + 1):
                if not valid[b, j]:
                    continue
                lag = i - j
                query = q[b, h, i] if rotary_base is None else turn(q[b, h, i], min(lag, window))
                scores[j] = query @ codebook[g, codes[j]]
                if bias is not None and lag <= window:
                    row = np.asarray(bias)
                    scores[j] += row[h, lag] if row.ndim == 2 else row[b, h, i, lag]
            if np.isfinite(scores).any():
                weights = np.exp(scores - scores.max())
                out[b, h, i] = weights / weights.sum() @ np.where(valid[b][:, None], v[b, g], 0)
    return out


def decoded(q, k, v, codebook, *, window, bias=None, mask=None, **options):
    """Every token by `step`, and the last state."""
    state = vq.init_state(
        q.shape[0],
        k.shape[1],
        codebook.shape[1],
        v.shape[-1],
        window=window,
        dtype=v.dtype,
        **{name: options[name] for name in ("cache", "local", "block_length") if name in options},
    )
    time = lambda x: jnp.moveaxis(x, 2, 0)
    xs = {"q": time(q), "k": time(k), "v": time(v)}
    if bias is not None and bias.ndim == 4:
        xs["bias"] = time(bias)
    if mask is not None:
        xs["mask"] = mask.T

    def body(state, at):
        row = at.get("bias", bias)
        out, state = vq.step(
            state, at["q"], at["k"], at["v"], codebook, bias=row, mask=at.get("mask"), **options
        )
        return state, out

    state, out = jax.lax.scan(body, state, xs)
    return jnp.moveaxis(out, 0, 2), state


def in_pieces(q, k, v, codebook, pieces, *, window, bias=None, mask=None, **options):
    """`prefill` piece by piece (a piece of one token by `step`), and the last state."""
    state = vq.init_state(
        q.shape[0],
        k.shape[1],
        codebook.shape[1],
        v.shape[-1],
        window=window,
        dtype=v.dtype,
        **{name: options[name] for name in ("cache", "local", "block_length") if name in options},
    )
    outs, start = [], 0
    for count in pieces:
        part = slice(start, start + count)
        row = bias if bias is None or bias.ndim == 2 else bias[:, :, part]
        counted = None if mask is None else mask[:, part]
        tokens = (q[:, :, part], k[:, :, part], v[:, :, part])
        if count == 1:
            out, state = vq.step(
                state,
                *(x[:, :, 0] for x in tokens),
                codebook,
                bias=row if row is None or row.ndim == 2 else row[:, :, 0],
                mask=None if counted is None else counted[:, 0],
                **options,
            )
            outs.append(out[:, :, None])
        else:
            out, state = vq.prefill(state, *tokens, codebook, bias=row, mask=counted, **options)
            outs.append(out)
        start += count
    return jnp.concatenate(outs, axis=2), state
