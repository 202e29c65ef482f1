"""The fast pure-JAX form: real arithmetic, a few hundred nodes at a time, sums as matmuls.

For one chunk of nodes the reciprocals 1 / (x + i y) of both members of a pair are formed once, as
four real arrays [heads, modes, chunk] that fit the cache. All numerators then meet them in real
batched matmuls, and the backward pass forms them again rather than keeping them.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit_kernels import _blocks
from jaxkit_kernels.cauchy.nodes import half_angles
from jaxkit_kernels.cauchy.woodbury import correct

__all__ = ["backward", "forward"]

# Elements of one [heads, modes, chunk] array: 1 MiB in float32.
_TARGET = 1 << 18
_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.CauchyXlaBlocks] = {}
_matmul = partial(jnp.matmul, precision="highest")


def _chunks(
    shape: tuple[int, ...], length: int, sizes: _blocks.BlockSizes | None, dtype: jnp.dtype
) -> tuple[jax.Array, int]:
    """(sine, cosine) as [chunks, 2, chunk], and the chunk."""
    nodes = length // 2 + 1

    def heuristic() -> _blocks.CauchyXlaBlocks:
        wanted = max(_TARGET // max(math.prod(shape), 1), 8)
        even = -(-nodes // -(-nodes // wanted))  # equal chunks, least padding
        return _blocks.CauchyXlaBlocks(chunk=-(-even // 8) * 8)

    chunk = _blocks.choose(
        sizes, _blocks.CauchyXlaBlocks, _TABLE, "cpu", (*shape, length), heuristic
    ).chunk
    count = -(-nodes // chunk)
    both = np.stack(half_angles(length, padded=count * chunk)).reshape(2, count, chunk)
    return jnp.asarray(np.moveaxis(both, 0, 1), dtype), chunk


def _bases(alpha: jax.Array, beta: jax.Array, sine: jax.Array, cosine: jax.Array):
    """(u, f) with u - i f = 1 / (x + i y), for y- and for y+, each [heads, modes, chunk]."""
    sine, cosine = sine[None, None], cosine[None, None]
    x, shift = cosine * alpha[..., None], cosine * beta[..., None]
    minus, plus = sine - shift, sine + shift
    inv_minus, inv_plus = 1 / (x * x + minus * minus), 1 / (x * x + plus * plus)
    return x * inv_minus, minus * inv_minus, x * inv_plus, plus * inv_plus


def _sums(re: jax.Array, im: jax.Array, bases) -> tuple[jax.Array, jax.Array]:
    u_minus, f_minus, u_plus, f_plus = bases
    real = _matmul(re, u_minus + u_plus) + _matmul(im, f_minus - f_plus)
    imaginary = _matmul(im, u_minus - u_plus) - _matmul(re, f_minus + f_plus)
    return real, imaginary


def forward(
    alpha: jax.Array,
    beta: jax.Array,
    re: jax.Array,
    im: jax.Array,
    *,
    length: int,
    block_sizes: _blocks.BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`, with O(heads (modes chunk + length)) memory."""
    nodes, _ = _chunks(alpha.shape, length, block_sizes, alpha.dtype)

    def one(node: jax.Array) -> tuple[jax.Array, jax.Array]:
        sine, cosine = node
        return correct(*_sums(re, im, _bases(alpha, beta, sine, cosine)), sine, cosine)

    out_re, out_im = jax.lax.map(one, nodes)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(alpha.shape[0], -1)[:, : length // 2 + 1]

    return join(out_re), join(out_im)


def backward(
    alpha: jax.Array,
    beta: jax.Array,
    re: jax.Array,
    im: jax.Array,
    ct_re: jax.Array,
    ct_im: jax.Array,
    *,
    length: int,
    block_sizes: _blocks.BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cotangents of `forward`'s arguments; the sums are formed again, chunk by chunk in order."""
    nodes, chunk = _chunks(alpha.shape, length, block_sizes, alpha.dtype)
    count = nodes.shape[0]
    extra = ((0, 0), (0, count * chunk - ct_re.shape[1]))

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(jnp.pad(x, extra).reshape(-1, count, chunk), 1, 0)

    re_t, im_t = jnp.swapaxes(re, 1, 2), jnp.swapaxes(im, 1, 2)

    def one(carry, inputs):
        (sine, cosine), g_re, g_im = inputs
        u_minus, f_minus, u_plus, f_plus = bases = _bases(alpha, beta, sine, cosine)
        fix = partial(correct, sine=sine, cosine=cosine)
        _, pull = jax.vjp(fix, *_sums(re, im, bases))
        d_re, d_im = pull((g_re, g_im))
        per_mode = partial(jnp.einsum, "hql,hml->hqm", precision="highest")
        bar_re = per_mode(d_re, u_minus + u_plus) - per_mode(d_im, f_minus + f_plus)
        bar_im = per_mode(d_re, f_minus - f_plus) + per_mode(d_im, u_minus - u_plus)

        # Products of numerators with cotangents, summed over the numerators.
        ra, ib = _matmul(re_t, d_re), _matmul(im_t, d_im)
        rb, ia = _matmul(im_t, d_re), _matmul(re_t, d_im)
        # 1 / (x + i y)^2 = p - i m.
        p_minus, m_minus = u_minus * u_minus - f_minus * f_minus, 2 * u_minus * f_minus
        p_plus, m_plus = u_plus * u_plus - f_plus * f_plus, 2 * u_plus * f_plus
        e, f, g, h = ra + ib, ra - ib, rb - ia, rb + ia
        at_alpha = p_minus * e + p_plus * f + m_minus * g - m_plus * h
        at_beta = p_minus * g + p_plus * h - m_minus * e + m_plus * f
        # A matrix-vector product: XLA's own sum over the last axis is not vectorised on CPU.
        bars = (-_matmul(at_alpha, cosine), -_matmul(at_beta, cosine), bar_re, bar_im)
        return jax.tree.map(jnp.add, carry, bars), None

    start = jnp.zeros_like(alpha), jnp.zeros_like(beta), jnp.zeros_like(re), jnp.zeros_like(im)
    return jax.lax.scan(one, start, (nodes, split(ct_re), split(ct_im)))[0]
