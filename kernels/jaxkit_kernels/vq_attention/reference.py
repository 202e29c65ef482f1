"""The definition of VQ attention in block form, dense scores and all, differentiated by JAX."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["MASKED", "decode", "forward"]

# The score of what a query does not see. Finite, since (-inf) - (-inf) is not a number.
MASKED = -1e30


def _softmax(scores: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Weights and log-sum-exp over the last axis; a row that is all masked has weights zero.

    Its log-sum-exp is -MASKED, so that exp(score - lse) is zero as well.
    """
    visible = scores > MASKED / 2
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # The inner `where` keeps the gradient finite in rows that see nothing.
    gap = jnp.where(visible, scores - peak, jnp.zeros((), dtype))
    weights = jnp.where(visible, jnp.exp(gap), jnp.zeros((), dtype))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    safe = jnp.where(some, total, jnp.ones((), dtype))
    lse = jnp.where(some, peak + jnp.log(safe), jnp.full((), -MASKED, dtype))
    return weights / safe, lse[..., 0]


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    codebook: jax.Array,
    means: jax.Array,
    log_counts: jax.Array,
    bias: jax.Array | None,
    valid: jax.Array | None,
    *,
    block_length: int,
    window: int,
) -> tuple[jax.Array, jax.Array]:
    """Attention over the blocks r - 1 and r, and over the codes.

    Args:
        q: [batch, heads, time, dk].
        k: [batch, groups, time, dk], quantised.
        v: [batch, groups, time, dv].
        codebook: [groups, codes, dk].
        means: [batch, groups, blocks, codes, dv].
        log_counts: [batch, groups, blocks, codes], `MASKED` for an empty code.
        bias: None, [heads, window + 1] or [batch, heads, time, window + 1].
        valid: None or bool [batch, time].
        block_length: L.
        window: W <= L.

    Returns:
        The output [batch, heads, time, dv] in the dtype of q, and the log-sum-exp
        [batch, heads, time].
    """
    batch, heads, time, width = q.shape
    groups, length = k.shape[1], block_length
    blocks, share = time // length, heads // groups
    dtype = log_counts.dtype

    def windows(x: jax.Array) -> jax.Array:
        """[batch, groups, time, ...] -> [batch, groups, blocks, 2 L, ...]."""
        x = x.reshape(*x.shape[:2], blocks, length, *x.shape[3:])
        before = jnp.concatenate([jnp.zeros_like(x[:, :, :1]), x[:, :, :-1]], axis=2)
        return jnp.concatenate([before, x], axis=3)

    if valid is None:
        valid = jnp.ones((batch, time), bool)
    queries = q.astype(dtype).reshape(batch, groups, share, blocks, length, width)
    keys, values = windows(k.astype(dtype)), windows(v.astype(dtype))
    recent = jnp.einsum("bgprid,bgrjd->bgprij", queries, keys, precision="highest")
    cached = jnp.einsum("bgprid,gsd->bgpris", queries, codebook.astype(dtype), precision="highest")

    lag = length + jnp.arange(length)[:, None] - jnp.arange(2 * length)[None, :]
    if bias is not None:
        at = jnp.clip(lag, 0, window)
        if bias.ndim == 2:
            by_lag = bias.astype(dtype)[:, at][None, :, None]
        else:
            rows = bias.astype(dtype).reshape(batch, heads, blocks, length, window + 1)
            by_lag = jnp.take_along_axis(rows, at[None, None, None], axis=-1)
        by_lag = jnp.where((lag <= window)[None, None, None], by_lag, jnp.zeros((), dtype))
        recent = recent + jnp.broadcast_to(
            by_lag, (batch, heads, blocks, length, 2 * length)
        ).reshape(recent.shape)
    seen = windows(valid[:, None])[:, :, None, :, None] & (lag >= 0)[None, None, None, None]
    recent = jnp.where(seen, recent, jnp.full((), MASKED, dtype))
    # log N = MASKED for an empty code, which absorbs any score.
    cached = cached + log_counts[:, :, None, :, None]
    weights, lse = _softmax(jnp.concatenate([recent, cached], axis=-1), dtype)
    both = jnp.concatenate([values, means.astype(dtype)], axis=3)
    out = jnp.einsum("bgprij,bgrjd->bgprid", weights, both, precision="highest")
    return out.reshape(batch, heads, time, -1).astype(q.dtype), lse.reshape(batch, heads, time)


def decode(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    codebook: jax.Array,
    means: jax.Array,
    log_counts: jax.Array,
    bias: jax.Array | None,
    visible: jax.Array,
) -> jax.Array:
    """One query a head over the lags 0..W and the codes.

    Args:
        q: [batch, heads, dk].
        keys: [batch, groups, window + 1, dk], by lag.
        values: [batch, groups, window + 1, dv].
        codebook: [groups, codes, dk].
        means: [batch, groups, codes, dv].
        log_counts: [batch, groups, codes].
        bias: None, [heads, window + 1] or [batch, heads, window + 1].
        visible: bool [batch, window + 1].

    Returns:
        [batch, heads, dv] in the dtype of q.
    """
    batch, heads, width = q.shape
    groups, lags = keys.shape[1], keys.shape[2]
    dtype = log_counts.dtype
    queries = q.astype(dtype).reshape(batch, groups, heads // groups, width)
    recent = jnp.einsum("bgpd,bgjd->bgpj", queries, keys.astype(dtype), precision="highest")
    cached = jnp.einsum("bgpd,gsd->bgps", queries, codebook.astype(dtype), precision="highest")
    if bias is not None:
        full = jnp.broadcast_to(bias if bias.ndim == 3 else bias[None], (batch, heads, lags))
        recent = recent + full.astype(dtype).reshape(recent.shape)
    recent = jnp.where(visible[:, None, None], recent, jnp.full((), MASKED, dtype))
    cached = cached + log_counts[:, :, None]
    weights, _ = _softmax(jnp.concatenate([recent, cached], axis=-1), dtype)
    both = jnp.concatenate([values, means], axis=2).astype(dtype)
    out = jnp.einsum("bgpj,bgjd->bgpd", weights, both, precision="highest")
    return out.reshape(batch, heads, -1).astype(q.dtype)
