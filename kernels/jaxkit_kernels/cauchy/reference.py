"""The definition of the generating function, in complex arithmetic and differentiated by JAX."""

import jax
import jax.numpy as jnp

from jaxkit_kernels.cauchy.nodes import half_angles

__all__ = ["forward"]


def forward(
    alpha: jax.Array, beta: jax.Array, re: jax.Array, im: jax.Array, *, length: int
) -> tuple[jax.Array, jax.Array]:
    """G at the nodes of the upper half circle; numerators as `api.stack_numerators` orders them.

    Args:
        alpha: [heads, modes], positive.
        beta: [heads, modes].
        re: [heads, (1 + rank)^2, modes].
        im: like `re`.
        length: L.

    Returns:
        (Re G, Im G), each [heads, length // 2 + 1].
    """
    sine, cosine = (jnp.asarray(x, alpha.dtype) for x in half_angles(length))
    root = jax.lax.complex(-alpha, beta)[..., None]
    numerator = jax.lax.complex(re, im)
    i_sine = jax.lax.complex(jnp.zeros_like(sine), sine)[None, None]
    scale = jax.lax.complex(cosine, jnp.zeros_like(cosine))[None, None]
    # 1 / (i s - c eps Lambda / 2) for one member of each pair and for the other.
    first, second = 1 / (i_sine - scale * root), 1 / (i_sine - scale * root.conj())
    total = jnp.einsum("hqm,hml->hql", numerator, first, precision="highest")
    total = total + jnp.einsum("hqm,hml->hql", numerator.conj(), second, precision="highest")

    rank = round(re.shape[1] ** 0.5) - 1
    cb, cp = total[:, 0], total[:, 1 : 1 + rank]
    pb = total[:, 1 + rank : 1 + 2 * rank]
    pp = total[:, 1 + 2 * rank :].reshape(total.shape[0], rank, rank, -1)
    half = scale / 2
    core = jnp.eye(rank, dtype=pp.dtype)[None, None] + jnp.moveaxis(half[None] * pp, -1, 1)
    solved = jnp.linalg.solve(core, jnp.moveaxis(pb, -1, 1)[..., None])[..., 0]
    correction = jnp.einsum("hrl,hlr->hl", cp, solved, precision="highest")
    out = jax.lax.complex(cosine, sine)[None] / 2 * (cb - half[0] * correction)
    return out.real, out.imag
