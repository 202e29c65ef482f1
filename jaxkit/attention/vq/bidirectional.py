"""Attention of every token to all tokens, in linear time: softmax over codes."""

import jax
import jax.numpy as jnp

from jaxkit._dtypes import wide
from jaxkit._typing import Array, Bool, Float, Int
from jaxkit.attention.vq._operands import HIGHEST, check_mask, finite_rows, nan_where, sizes
from jaxkit.attention.vq.block import Cache, masked_softmax, summarize
from jaxkit.attention.vq.codes import quantize_keys

__all__ = ["attend_codes", "bidirectional_attention"]


def bidirectional_attention(
    q: Float[Array, "batch heads length key_dim"],
    k: Float[Array, "batch groups length key_dim"],
    v: Float[Array, "batch groups length value_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    codes: Int[Array, "batch groups length"] | None = None,
    mask: Bool[Array, "batch length"] | None = None,
    scale: float | None = None,
) -> Float[Array, "batch heads length value_dim"]:
    """o = softmax_s(q Cᵀ + log N) μ with N and μ over all tokens: an encoder's attention.

    Equal to Σ_j softmax_j(q · k̂_j) v_j over all j, in O(T S (dk + dv)). The gradient goes to q and
    v; none to k (it enters by its code alone) or C.

    Args:
      q: Queries; head h reads group ⌊h G/H⌋. Any number of them.
      k: Keys.
      v: Values.
      codebook: C.
      codes: z, if known; the number of codes marks padding.
      mask: True where a key counts. If none does, the outputs are zeros.
      scale: Multiplies q.

    Returns:
      The outputs, in the dtype of `v`.

    Raises:
      TypeError: If dtypes do not fit.
      ValueError: If shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> one = jnp.ones((1, 1, 3, 2))
      >>> v = jnp.asarray([3.0, 5.0, 10.0]).reshape(1, 1, 3, 1)
      >>> bidirectional_attention(one, one, v, jnp.zeros((1, 4, 2))).ravel().tolist()
      [6.0, 6.0, 6.0]

    Source: Lingle 2023 (arXiv 2309.16354); post 9844.
    """
    size = sizes(q, k, v, codebook)
    if mask is not None:
        check_mask(mask, (size.batch, size.length))
    if scale is not None:
        q = q * jnp.asarray(scale, q.dtype)
    codebook = jax.lax.stop_gradient(codebook).astype(q.dtype)
    _, codes, valid = quantize_keys(k, codebook, codes=codes, mask=mask)
    v = jnp.where(valid[:, None, :, None], v, jnp.zeros_like(v))
    return attend_codes(q, codebook, summarize(codes, v, size.codes)).astype(v.dtype)


def attend_codes(
    q: Float[Array, "batch heads length key_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    cache: Cache,
) -> Float[Array, "batch heads length value_dim"]:
    """Attention over codes alone: keys C, values μ, bias log N. In float32 at least."""
    batch, heads, length, width = q.shape
    groups, dtype = codebook.shape[0], wide(q.dtype)
    q = q.astype(dtype).reshape(batch, groups, heads // groups, length, width)
    some = cache.counts > 0
    log_counts = jnp.log(jnp.where(some, cache.counts, jnp.ones_like(cache.counts)).astype(dtype))
    scores = jnp.einsum("bgptd,gsd->bgpts", q, codebook.astype(dtype), precision=HIGHEST)
    scores = scores + log_counts[:, :, None, None]
    weights = masked_softmax(scores, jnp.broadcast_to(some[:, :, None, None], scores.shape))
    means = cache.means.astype(dtype)
    out = jnp.einsum("bgpts,bgsd->bgptd", weights, means, precision=HIGHEST)
    spoiled = ~jnp.all(finite_rows(means), axis=-1)
    out = out + nan_where(spoiled, dtype)[:, :, None, None, None]
    return out.reshape(batch, heads, length, -1)
