"""What the TPU and the GPU kernels share: one mode against a tile of nodes, in real arithmetic.

`load(k, n)` gives the scalar k of mode n: alpha, beta, four real parts, four imaginary parts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxkit_kernels.cauchy import woodbury

__all__ = ["PARAMETERS", "check_operands", "forward_tile", "mode_cotangents", "sum_cotangents"]

PARAMETERS = 10
Load = Callable[[int, jax.Array], jax.Array]
Planes = list[jax.Array]


def check_operands(alpha: jax.Array, re: jax.Array) -> None:
    """Refuse what the Pallas kernels do not take."""
    if re.shape[1] != 4:
        rank = round(re.shape[1] ** 0.5) - 1
        raise NotImplementedError(f"the kernel takes rank 1; got rank {rank}.")
    if alpha.dtype != jnp.float32:
        raise NotImplementedError(f"the kernel computes in float32; got {alpha.dtype}.")
    if alpha.shape[0] == 0 or alpha.shape[1] == 0:
        raise NotImplementedError(f"the kernel takes no empty array; got shape {alpha.shape}.")


def _bases(load: Load, n: jax.Array, sine: jax.Array, cosine: jax.Array) -> Planes:
    x, shift = cosine * load(0, n), cosine * load(1, n)
    minus, plus = sine - shift, sine + shift
    inv_minus, inv_plus = 1.0 / (x * x + minus * minus), 1.0 / (x * x + plus * plus)
    return [x * inv_minus, minus * inv_minus, x * inv_plus, plus * inv_plus]


def _sums(
    load: Load, modes: int, tied: bool, sine: jax.Array, cosine: jax.Array
) -> tuple[Planes, Planes]:
    def step(n: jax.Array, carry: tuple[Planes, Planes]) -> tuple[Planes, Planes]:
        re, im = carry
        u_minus, f_minus, u_plus, f_plus = _bases(load, n, sine, cosine)
        u_sum, u_diff = u_minus + u_plus, u_minus - u_plus
        f_sum, f_diff = f_minus + f_plus, f_minus - f_plus
        new_re, new_im = [], []
        for q in range(4):
            a = load(2 + q, n)
            if tied and q == 3:  # its imaginary part is zero
                new_re.append(re[q] + a * u_sum)
                new_im.append(im[q] - a * f_sum)
            else:
                b = load(6 + q, n)
                new_re.append(re[q] + a * u_sum + b * f_diff)
                new_im.append(im[q] + b * u_diff - a * f_sum)
        return new_re, new_im

    # Not a constant: Mosaic GPU lays out constants otherwise, and a loop must keep the layout.
    zeros = [0.0 * sine for _ in range(4)]
    return jax.lax.fori_loop(0, modes, step, (zeros, list(zeros)))


def forward_tile(
    load: Load, modes: int, tied: bool, sine: jax.Array, cosine: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(Re G, Im G) on a tile of nodes."""
    return woodbury.correct_rank_one(*_sums(load, modes, tied, sine, cosine), sine, cosine)


def sum_cotangents(
    load: Load,
    modes: int,
    tied: bool,
    sine: jax.Array,
    cosine: jax.Array,
    ct_re: jax.Array,
    ct_im: jax.Array,
) -> tuple[Planes, Planes]:
    """Cotangents of the four sums, which are formed again."""
    re, im = _sums(load, modes, tied, sine, cosine)
    return woodbury.correct_rank_one_vjp(re, im, sine, cosine, ct_re, ct_im)


def mode_cotangents(
    load: Load,
    n: jax.Array,
    tied: bool,
    sine: jax.Array,
    cosine: jax.Array,
    d_re: Planes,
    d_im: Planes,
) -> Planes:
    """The terms, one a node, whose sums are the cotangents of the ten scalars of mode n."""
    u_minus, f_minus, u_plus, f_plus = _bases(load, n, sine, cosine)
    u_sum, u_diff = u_minus + u_plus, u_minus - u_plus
    f_sum, f_diff = f_minus + f_plus, f_minus - f_plus
    bar_re, bar_im = [], []
    zero = jnp.zeros_like(sine)
    ra, rb, ia, ib = zero, zero, zero, zero
    for q in range(4):
        a = load(2 + q, n)
        ra, ia = ra + a * d_re[q], ia + a * d_im[q]
        bar_re.append(d_re[q] * u_sum - d_im[q] * f_sum)
        if not (tied and q == 3):
            b = load(6 + q, n)
            rb, ib = rb + b * d_re[q], ib + b * d_im[q]
        bar_im.append(d_re[q] * f_diff + d_im[q] * u_diff)
    # 1 / (x + i y)^2 = p - i m.
    p_minus, m_minus = u_minus * u_minus - f_minus * f_minus, 2.0 * u_minus * f_minus
    p_plus, m_plus = u_plus * u_plus - f_plus * f_plus, 2.0 * u_plus * f_plus
    e, f, g, h = ra + ib, ra - ib, rb - ia, rb + ia
    at_alpha = p_minus * e + p_plus * f + m_minus * g - m_plus * h
    at_beta = p_minus * g + p_plus * h - m_minus * e + m_plus * f
    return [-cosine * at_alpha, -cosine * at_beta, *bar_re, *bar_im]
