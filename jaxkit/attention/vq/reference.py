"""The definition: softmax attention over quantised keys, with all T² scores."""

import jax
import jax.numpy as jnp

from jaxkit._checks import check_int
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Bool, Float, Int
from jaxkit.attention.vq._operands import (
    HIGHEST,
    MASKED,
    check_bias,
    check_mask,
    finite_rows,
    nan_where,
    sizes,
)
from jaxkit.attention.vq.biases import rotate
from jaxkit.attention.vq.codes import quantize_keys

__all__ = ["quadratic_attention"]


def quadratic_attention(
    q: Float[Array, "batch heads length key_dim"],
    k: Float[Array, "batch groups length key_dim"],
    v: Float[Array, "batch groups length value_dim"],
    codebook: Float[Array, "groups codes key_dim"] | None,
    *,
    bias: Float[Array, "..."] | None = None,
    window: int | None = None,
    codes: Int[Array, "batch groups length"] | None = None,
    mask: Bool[Array, "batch length"] | None = None,
    scale: float | None = None,
    rotary_base: float | None = None,
    block_length: int | None = None,
    cache: bool = True,
    local: str = "blocks",
    grad_through_cache: bool = True,
) -> Float[Array, "batch heads length value_dim"]:
    r"""o_i = Σ_{j ≤ i} softmax_j(q_i · k̂_j + b(i, i − j)) v_j, with b = 0 beyond the window.

    O(T² (dk + dv)) time and O(T²) memory. Without a codebook k̂ = k: dense attention with the same
    biases. It is what every other form is tested against. A key or a value that is not finite makes
    NaN of the outputs that see it, and of no others.

    Args:
      q: Queries; head h reads group ⌊h G/H⌋. Scaled, and holding u if the score has (q + u) · k̂.
      k: Keys.
      v: Values.
      codebook: C (no gradient), or None for dense attention.
      bias: `[heads, window + 1]` or `[batch, heads, length, window + 1]`, by lag.
      window: W; by default what `bias` says, or `block_length`.
      codes: z, if known; the number of codes marks padding.
      mask: True where a position counts. A query that sees nothing gives zeros.
      scale: Multiplies q.
      rotary_base: Rotate by min(i − j, W) (ReRoPE), with frequencies of this base.
      block_length: L of a block form, whose gradient is then the one given: straight-through where
        ⌊i/L⌋ − ⌊j/L⌋ ≤ 1, none to k beyond. By default it is straight-through everywhere.
      cache: False drops what is older than the blocks ⌊i/L⌋ − 1 and ⌊i/L⌋.
      local: Without the cache: `blocks`, or `window` to drop also the lags beyond W.
      grad_through_cache: False lets no gradient to v pass but in those two blocks.

    Returns:
      The outputs, in the dtype of `q`.

    Raises:
      TypeError: If dtypes do not fit.
      ValueError: If shapes do not fit, or an option lacks the `block_length` that it speaks of.

    Example:
      >>> import jax.numpy as jnp
      >>> one = jnp.ones((1, 1, 3, 2))
      >>> v = jnp.asarray([3.0, 5.0, 10.0]).reshape(1, 1, 3, 1)
      >>> quadratic_attention(one, one, v, jnp.zeros((1, 1, 2))).ravel().tolist()
      [3.0, 4.0, 6.0]

    Source: Lingle 2023 (arXiv 2309.16354); post 9844.
    """
    size = sizes(q, k, v, codebook if codebook is not None else k[0, :, :1])
    window = check_bias(bias, q, window)
    if block_length is not None:
        block_length = check_int("block_length", block_length, least=1)
        window = block_length if window is None else window
    elif not cache or not grad_through_cache:
        raise ValueError("block_length must be given with cache or grad_through_cache off.")
    if mask is not None:
        check_mask(mask, (size.batch, size.length))
    if rotary_base is not None and window is None:
        raise ValueError("window must be given with rotary_base; got None.")
    reach = size.length if window is None else window
    if codebook is None:
        if codes is not None:
            raise ValueError("codes must not be given without a codebook.")
        keys, valid = k, jnp.ones((size.batch, size.length), bool) if mask is None else mask
    else:
        keys, _, valid = quantize_keys(k, codebook, codes=codes, mask=mask)
    # What is not seen, NaN included, must not meet a weight of zero.
    usable = finite_rows(keys, v)
    keep = (usable & valid[:, None])[..., None]
    keys, v = (jnp.where(keep, x, jnp.zeros_like(x)) for x in (keys, v))

    dtype = wide(q.dtype)
    q = q.astype(dtype) if scale is None else q.astype(dtype) * jnp.asarray(scale, dtype)
    grouped = (size.batch, size.groups, size.share, size.length, size.key_dim)
    q = q.reshape(grouped)
    keys, values = keys.astype(dtype), v.astype(dtype)
    position = jnp.arange(size.length)
    lag = position[:, None] - position[None, :]
    if block_length is None:
        recent = jnp.ones_like(lag, bool)
    else:
        block = position // block_length
        recent = block[:, None] - block[None, :] <= 1

    def scores(keys: Array) -> Array:
        far = jnp.einsum("bgptd,bgsd->bgpts", _turned(q, reach, rotary_base), keys)
        if rotary_base is None:
            return far
        turned = [rotate(x, position, base=rotary_base) for x in (q, keys)]
        near = jnp.einsum("bgptd,bgsd->bgpts", *turned, precision=HIGHEST)
        return jnp.where(_whole(lag <= reach), near, far)

    if codebook is None:
        score = scores(keys)
    else:
        score = jnp.where(_whole(recent), scores(keys), scores(jax.lax.stop_gradient(keys)))
    if bias is not None:
        at = jnp.clip(lag, 0, reach)
        if bias.ndim == 2:
            by_lag = jnp.broadcast_to(bias[:, at][None], (size.batch, size.heads, *at.shape))
        else:
            index = jnp.broadcast_to(at[None, None], (size.batch, size.heads, *at.shape))
            by_lag = jnp.take_along_axis(bias, index, axis=-1)
        by_lag = by_lag.astype(dtype).reshape(score.shape)
        score = score + jnp.where(_whole(lag <= reach), by_lag, jnp.zeros((), dtype))

    seen = lag >= 0
    if not cache:
        seen = seen & (recent if local == "blocks" else recent & (lag <= reach))
    visible = _whole(seen) & valid[:, None, None, None, :]
    score = jnp.where(visible, score, jnp.asarray(MASKED, dtype))
    weights = jnp.where(visible, jax.nn.softmax(score, axis=-1), jnp.zeros((), dtype))
    if grad_through_cache:
        out = jnp.einsum("bgpts,bgsd->bgptd", weights, values, precision=HIGHEST)
    else:
        near = jnp.where(_whole(recent), weights, jnp.zeros((), dtype))
        out = jnp.einsum("bgpts,bgsd->bgptd", near, values, precision=HIGHEST) + jnp.einsum(
            "bgpts,bgsd->bgptd",
            weights - near,
            jax.lax.stop_gradient(values),
            precision=HIGHEST,
        )
    spoiled = jnp.any(visible & ~usable[:, :, None, None], axis=-1)
    out = out + nan_where(spoiled, dtype)[..., None]
    return out.reshape(size.batch, size.heads, size.length, size.value_dim).astype(v.dtype)


def _turned(q: Array, window: int, base: float | None) -> Array:
    return q if base is None else rotate(q, jnp.asarray(window), base=base)


def _whole(x: Array) -> Array:
    """[queries, keys] -> broadcastable to the scores."""
    return x[None, None, None]
