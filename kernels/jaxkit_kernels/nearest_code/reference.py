"""The definition: every squared distance, and the index of the smallest."""

import jax
import jax.numpy as jnp

__all__ = ["forward"]


def forward(
    x: jax.Array, codebook: jax.Array, *, second: bool
) -> tuple[jax.Array, jax.Array | None]:
    """(argmin, argmin of the rest or None) of |x_t - c_k|^2 over k; O(T K) memory.

    The argmin is K where no distance is finite.
    """
    num_codes = codebook.shape[0]
    distance = jnp.sum((x[:, None] - codebook[None]) ** 2, axis=-1)
    code = jnp.arange(num_codes, dtype=jnp.int32)[None]

    def nearest(distance: jax.Array) -> jax.Array:
        least = jnp.min(distance, axis=1, keepdims=True)
        hit = (distance == least) & jnp.isfinite(least)
        return jnp.min(jnp.where(hit, code, num_codes), axis=1)

    first = nearest(distance)
    if not second:
        return first, None
    return first, nearest(jnp.where(code == first[:, None], jnp.inf, distance))
