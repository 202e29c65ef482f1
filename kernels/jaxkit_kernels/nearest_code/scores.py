r"""What the fast forms minimise in place of the distance.

$$ \tfrac12 \|x - c_k\|^2 = \tfrac12 \|x\|^2 + (\tfrac12 \|c_k\|^2 - x \cdot c_k), $$

of which the first term is the same for every k. The rest cancels badly where $\|x\|$ is large
beside the distances, so both sides are first taken from a centre of the codebook.
"""

import jax
import jax.numpy as jnp

__all__ = ["centre_and_bias", "least"]


def centre_and_bias(codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    """m [features] and |c_k - m|^2 / 2 [codes]; a score is the latter minus (x - m) . (c_k - m).

    The centre m is the mean, rounded to a power of two near a sixteenth of the codebook's extent.
    That keeps it as good a centre, and makes the subtractions exact where the data have few digits
    (integers, say), so that what ties there still ties.
    """
    mean = jnp.mean(codebook, axis=0)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(codebook - mean[None])))
    unit = jnp.ldexp(jnp.ones((), codebook.dtype), exponent - 4)
    # Where all codes are the same, or overflow, the unit is nothing to round to.
    usable = (unit > 0) & jnp.isfinite(mean / unit)
    centre = jnp.where(usable, jnp.round(mean / unit) * unit, mean)
    return centre, jnp.sum((codebook - centre[None]) ** 2, axis=1) / 2


def least(score: jax.Array, code: jax.Array, none: int) -> jax.Array:
    """The lowest of the codes with the least score, [tokens]; `none` where no score is finite."""
    value = jnp.min(score, axis=1, keepdims=True)
    hit = (score == value) & jnp.isfinite(value)
    return jnp.min(jnp.where(hit, code, none), axis=1)
