"""Product (multi-head) quantization: every part of a vector has a code of its own."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkit._checks import check_int
from jaxkit._typing import Array, Bool, Float, Key
from jaxkit.quantize._common import check_mask, check_vectors
from jaxkit.quantize._sharding import EVERYWHERE, VECTORS, automatic
from jaxkit.quantize.vq import VQOutput, VQState, vector_quantize

__all__ = ["merge_heads", "product_quantize", "split_heads"]


def split_heads(z: Float[Array, "*batch features"], heads: int) -> Float[Array, "*batch heads dim"]:
    """`[..., heads · dim]` to `[..., heads, dim]`.

    Args:
      z: Vectors.
      heads: Number of equal parts.

    Returns:
      The parts.

    Raises:
      TypeError: If `z` is not real floating-point.
      ValueError: If the features do not divide into `heads`.

    Example:
      >>> import jax.numpy as jnp
      >>> split_heads(jnp.arange(4.0), 2).tolist()
      [[0.0, 1.0], [2.0, 3.0]]
    """
    heads = check_int("heads", heads, least=1)
    features = check_vectors(z)
    if features % heads:
        raise ValueError(f"heads must divide the {features} features of z; got {heads}.")
    return z.reshape(*z.shape[:-1], heads, features // heads)


def merge_heads(z: Float[Array, "*batch heads dim"]) -> Float[Array, "*batch features"]:
    """`[..., heads, dim]` to `[..., heads · dim]`, the inverse of `split_heads`.

    Args:
      z: Parts.

    Returns:
      Vectors.

    Example:
      >>> import jax.numpy as jnp
      >>> merge_heads(jnp.ones((5, 2, 3))).shape
      (5, 6)
    """
    return z.reshape(*z.shape[:-2], z.shape[-2] * z.shape[-1])


@automatic(VQOutput._make((VECTORS, VECTORS, EVERYWHERE, EVERYWHERE)))
def product_quantize(
    states: VQState,
    z: Float[Array, "*batch features"],
    *,
    key: Key | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    **options: Any,
) -> VQOutput:
    """Quantize every part of a vector with its own codebook; K^heads combinations.

    Args:
      states: A `VQState` with a leading axis of heads (`jax.vmap(vq_init)` of codebooks
        [heads, codes, dim]); or without, for one codebook that all heads share.
      z: Vectors of heads · dim features.
      key: As in `vector_quantize`.
      mask: False for vectors to leave out.
      **options: Of `vector_quantize`.

    Returns:
      `VQOutput`: index `[..., heads]`; losses averaged over heads; the new states.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: As `vector_quantize`, or if `z` does not divide into parts of d features.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxkit.quantize import vq_init
      >>> codebooks = jnp.array([[[0.0], [1.0]], [[5.0], [6.0]]])
      >>> out = product_quantize(jax.vmap(vq_init)(codebooks), jnp.array([[0.9, 5.2]]))
      >>> print(out.z_q, out.index)
      [[1. 5.]] [[1 0]]

    Source: Jégou, Douze, Schmid 2011 (product quantization); van den Oord et al. 2017 (arXiv
    1711.00937).
    """
    shared = states.codebook.ndim == 2
    dim = states.codebook.shape[-1]
    features = check_vectors(z)
    heads = features // dim if shared else states.codebook.shape[0]
    if states.codebook.ndim not in (2, 3) or heads * dim != features or heads < 1:
        raise ValueError(
            "z must have heads · dim features for codebooks [heads, codes, dim] (or [codes, dim], "
            f"shared); got shapes {tuple(z.shape)} and {tuple(states.codebook.shape)}."
        )
    check_mask(mask, z.shape[:-1])
    parts = split_heads(z, heads)
    if shared:
        of_parts = None if mask is None else jnp.repeat(mask[..., None], heads, axis=-1)
        out = vector_quantize(states, parts, key=key, mask=of_parts, **options)
        return out._replace(z_q=merge_heads(out.z_q))

    def one(state, part, key):
        return tuple(vector_quantize(state, part, key=key, mask=mask, **options))

    keys = None if key is None else jax.random.split(key, heads)
    axes = (0, -2, None if keys is None else 0)
    out = VQOutput(*jax.vmap(one, in_axes=axes, out_axes=(-2, -1, 0, 0))(states, parts, keys))
    losses = {name: jnp.mean(value) for name, value in out.losses.items()}
    return out._replace(z_q=merge_heads(out.z_q), losses=losses)
