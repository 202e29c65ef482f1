"""The definition, in complex arithmetic and differentiated by JAX."""

import jax
import jax.numpy as jnp

__all__ = ["forward"]


def forward(
    alpha: jax.Array, beta: jax.Array, v_re: jax.Array, v_im: jax.Array, *, length: int
) -> jax.Array:
    """K_l = 2 Re sum_n v_n exp((-alpha_n + i beta_n) l), [heads, length], O(heads modes length)."""
    position = jnp.arange(length, dtype=alpha.dtype)[None, None]
    exponent = jax.lax.complex(-alpha[..., None] * position, beta[..., None] * position)
    terms = jax.lax.complex(v_re, v_im)[..., None] * jnp.exp(exponent)
    return 2 * jnp.sum(terms.real, axis=1)
