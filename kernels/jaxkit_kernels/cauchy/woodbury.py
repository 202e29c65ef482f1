"""The low-rank correction of the generating function, pointwise over nodes, in real arithmetic."""

import jax
import jax.numpy as jnp

__all__ = ["correct", "correct_rank_one", "correct_rank_one_vjp"]

Planes = list[jax.Array]


def correct_rank_one(
    re: Planes, im: Planes, sine: jax.Array, cosine: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """G from the four sums S[cb], S[cp], S[pb], S[pp]; any shape, and Pallas lowers it."""
    half = 0.5 * cosine
    inner_re, inner_im = 1 + half * re[3], half * im[3]
    top_re = re[1] * re[2] - im[1] * im[2]
    top_im = re[1] * im[2] + im[1] * re[2]
    scale = half / (inner_re * inner_re + inner_im * inner_im)
    h_re = 0.5 * (re[0] - scale * (top_re * inner_re + top_im * inner_im))
    h_im = 0.5 * (im[0] - scale * (top_im * inner_re - top_re * inner_im))
    return cosine * h_re - sine * h_im, cosine * h_im + sine * h_re


def correct_rank_one_vjp(
    re: Planes, im: Planes, sine: jax.Array, cosine: jax.Array, ct_re: jax.Array, ct_im: jax.Array
) -> tuple[Planes, Planes]:
    """Cotangents of the four sums, given those of (Re G, Im G)."""
    # With G = (c + is)/2 (S0 - g S1 S2 / (1 + g S3)), the cotangent of S_k is the cotangent of G
    # times the conjugate of dG/dS_k.
    half = 0.5 * cosine
    inner_re, inner_im = 1 + half * re[3], half * im[3]
    norm = 1 / (inner_re * inner_re + inner_im * inner_im)
    inv_re, inv_im = inner_re * norm, -inner_im * norm
    d0_re = 0.5 * (cosine * ct_re + sine * ct_im)
    d0_im = 0.5 * (cosine * ct_im - sine * ct_re)

    def times(a_re, a_im, b_re, b_im):
        return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re

    left = times(re[1], im[1], inv_re, inv_im)  # S1 / (1 + g S3)
    right = times(re[2], im[2], inv_re, inv_im)  # S2 / (1 + g S3)
    both = times(*left, *right)
    scaled_re, scaled_im = -half * d0_re, -half * d0_im
    d1 = times(scaled_re, scaled_im, right[0], -right[1])
    d2 = times(scaled_re, scaled_im, left[0], -left[1])
    d3 = times(-half * scaled_re, -half * scaled_im, both[0], -both[1])
    return [d0_re, d1[0], d2[0], d3[0]], [d0_im, d1[1], d2[1], d3[1]]


def correct(
    re: jax.Array, im: jax.Array, sine: jax.Array, cosine: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """G from all (1 + rank)^2 sums [heads, sums, nodes], for any rank."""
    rank = round(re.shape[1] ** 0.5) - 1
    if rank == 1:
        planes = [[x[:, q] for q in range(4)] for x in (re, im)]
        return correct_rank_one(planes[0], planes[1], sine[None], cosine[None])
    total = jax.lax.complex(re, im)
    half = jax.lax.complex(0.5 * cosine, jnp.zeros_like(cosine))
    cb, cp = total[:, 0], total[:, 1 : 1 + rank]
    pb = jnp.moveaxis(total[:, 1 + rank : 1 + 2 * rank], -1, 1)
    pp = total[:, 1 + 2 * rank :].reshape(total.shape[0], rank, rank, -1)
    core = jnp.eye(rank, dtype=pp.dtype)[None, None] + jnp.moveaxis(
        half[None, None, None] * pp, -1, 1
    )
    solved = jnp.linalg.solve(core, pb[..., None])[..., 0]
    correction = jnp.sum(cp * jnp.moveaxis(solved, 1, -1), axis=1)
    out = jax.lax.complex(cosine, sine)[None] * (cb - half[None] * correction) * 0.5
    return out.real, out.imag
