r"""The two-level pure-JAX form: $l = q T + j$ turns the sum into a real matmul."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit_kernels import _blocks
from jaxkit_kernels.vandermonde import phase

__all__ = ["backward", "forward"]

_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.VandermondeXlaBlocks] = {}
_einsum = partial(jnp.einsum, precision="highest")


def _block(shape: tuple[int, ...], length: int, sizes: _blocks.BlockSizes | None) -> int:
    def heuristic() -> _blocks.VandermondeXlaBlocks:
        root = 1 << (max(length - 1, 1).bit_length() // 2)  # near sqrt(L): fewest exponentials
        return _blocks.VandermondeXlaBlocks(block=min(root, 1 << 12))

    chosen = _blocks.choose(
        sizes, _blocks.VandermondeXlaBlocks, _TABLE, "cpu", (*shape, length), heuristic
    )
    return chosen.block


def powers(alpha: jax.Array, beta: jax.Array, position: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(re, im) of exp((-alpha + i beta) position), [heads, modes, positions]."""
    high, middle, low = phase.split_turns(beta)
    turns = high[..., None], middle[..., None], low[..., None]
    index = jnp.asarray(position, jnp.int32)[None, None]
    angle = phase.TURN * phase.fraction(index, turns)
    size = jnp.exp(-alpha[..., None] * jnp.asarray(position, alpha.dtype)[None, None])
    return size * jnp.cos(angle), size * jnp.sin(angle)


def forward(
    alpha: jax.Array,
    beta: jax.Array,
    v_re: jax.Array,
    v_im: jax.Array,
    *,
    length: int,
    block_sizes: _blocks.BlockSizes | None = None,
) -> jax.Array:
    """As `reference.forward`, with O(heads (modes (L/T + T) + L)) memory."""
    block = _block(alpha.shape, length, block_sizes)
    count = -(-length // block)
    in_re, in_im = powers(alpha, beta, np.arange(block))
    at_re, at_im = powers(alpha, beta, np.arange(count) * block)
    a, b = 2 * v_re[..., None], 2 * v_im[..., None]
    out = _einsum("hmq,hmj->hqj", a * at_re - b * at_im, in_re)
    out = out - _einsum("hmq,hmj->hqj", a * at_im + b * at_re, in_im)
    return out.reshape(alpha.shape[0], count * block)[:, :length]


def from_moments(v_re, v_im, moments):
    """Cotangents from sum_l g_l e^{l eps Lambda} and sum_l l g_l e^{l eps Lambda}."""
    zero_re, zero_im, one_re, one_im = moments
    bar_alpha = -2 * (v_re * one_re - v_im * one_im)
    bar_beta = -2 * (v_re * one_im + v_im * one_re)
    return bar_alpha, bar_beta, 2 * zero_re, -2 * zero_im


def backward(
    alpha: jax.Array,
    beta: jax.Array,
    v_re: jax.Array,
    v_im: jax.Array,
    cotangent: jax.Array,
    *,
    length: int,
    block_sizes: _blocks.BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cotangents of `forward`'s arrays, by the transposed two-level form."""
    block = _block(alpha.shape, length, block_sizes)
    count = -(-length // block)
    start = np.arange(count) * block
    in_re, in_im = powers(alpha, beta, np.arange(block))
    at_re, at_im = powers(alpha, beta, start)
    g = jnp.pad(cotangent, ((0, 0), (0, count * block - length))).reshape(-1, count, block)
    offset = jnp.asarray(start, alpha.dtype)[None, None]
    outer = partial(_einsum, "hmq,hqj->hmj")
    y_re, y_im = outer(at_re, g), outer(at_im, g)
    within = jnp.arange(block, dtype=alpha.dtype)[None, None]
    z_re = outer(offset * at_re, g) + within * y_re
    z_im = outer(offset * at_im, g) + within * y_im
    inner = partial(_einsum, "hmj,hmj->hm")
    moments = (
        inner(y_re, in_re) - inner(y_im, in_im),
        inner(y_re, in_im) + inner(y_im, in_re),
        inner(z_re, in_re) - inner(z_im, in_im),
        inner(z_re, in_im) + inner(z_im, in_re),
    )
    return from_moments(v_re, v_im, moments)
