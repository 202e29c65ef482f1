"""Decoding: a state of fixed size, one token at a time or many at once, and back.

The state holds the last W + 1 tokens in a ring (position p in slot p mod (W + 1)) and all older
ones as a count and a mean for each code. Nothing of it grows with the position.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxkit_kernels as kernels

from jaxkit._checks import check_choice, check_int
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Bool, DType, Float, Int
from jaxkit.attention.vq._operands import check_bias, check_mask, sizes
from jaxkit.attention.vq.biases import rotate
from jaxkit.attention.vq.block import LOCALS, Cache, attend, merge, resolve_window, summarize
from jaxkit.attention.vq.codes import lookup, quantize_keys

__all__ = ["VQState", "absorb", "init_state", "prefill", "step"]


class VQState(NamedTuple):
    """What decoding carries from token to token.

    Attributes:
      codes: z of the last tokens, int32 `[batch, groups, slots]`, a ring; the number of codes S
        marks padding and slots not yet filled, S + 1 a key that was not finite.
      values: Their v, `[batch, groups, slots, value_dim]`.
      cache: All older tokens.
      position: How many tokens there have been, int32.
    """

    codes: Array
    values: Array
    cache: Cache
    position: Array


def _slots(window: int, block_length: int | None, cache: bool, local: str) -> int:
    check_choice("local", local, LOCALS)
    if cache or local == "window":
        return window + 1
    if block_length is None:
        raise ValueError("block_length must be given for cache=False with local='blocks'.")
    return 2 * check_int("block_length", block_length, least=1)


def init_state(
    batch: int,
    groups: int,
    num_codes: int,
    value_dim: int,
    *,
    window: int,
    block_length: int | None = None,
    cache: bool = True,
    local: str = "blocks",
    dtype: DType = jnp.float32,
) -> VQState:
    """The state before the first token: (S + W) (value_dim + 1) numbers for each group.

    Args:
      batch: B.
      groups: G.
      num_codes: S.
      value_dim: dv.
      window: W.
      block_length: L; needed for `cache=False` with `local="blocks"` alone.
      cache: As in `vq_attention`.
      local: As in `vq_attention`.
      dtype: Of the values.

    Returns:
      The empty state.

    Raises:
      ValueError: If a size is out of range or `block_length` is missing.

    Example:
      >>> state = init_state(1, 1, 512, 1536, window=512)
      >>> state.values.shape, state.cache.means.shape
      ((1, 1, 513, 1536), (1, 1, 512, 1536))
    """
    for name, value in (("batch", batch), ("window", window)):
        check_int(name, value, least=0)
    for name, value in (("groups", groups), ("num_codes", num_codes), ("value_dim", value_dim)):
        check_int(name, value, least=1)
    slots = _slots(window, block_length, cache, local)
    return VQState(
        jnp.full((batch, groups, slots), num_codes, jnp.int32),
        jnp.zeros((batch, groups, slots, value_dim), dtype),
        Cache(
            jnp.zeros((batch, groups, num_codes, value_dim), wide(dtype)),
            jnp.zeros((batch, groups, num_codes), jnp.int32),
        ),
        jnp.zeros((), jnp.int32),
    )


def absorb(cache: Cache, codes: Int[Array, "*batch"], v: Float[Array, "*batch value_dim"]) -> Cache:
    """One more token for each row: N_z ← N_z + 1, μ_z ← μ_z + (v − μ_z)/N_z; O(value_dim).

    Args:
      cache: Of `[*batch, codes, …]`.
      codes: z; the sentinel S changes nothing, S + 1 spoils every code, as in `summarize`.
      v: Values.

    Returns:
      The cache.

    Example:
      >>> import jax.numpy as jnp
      >>> cache = Cache(jnp.asarray([[1.0], [0.0]]), jnp.asarray([1, 0]))
      >>> absorb(cache, jnp.asarray(0), jnp.asarray([4.0])).means.ravel().tolist()
      [2.5, 0.0]
    """
    dtype = cache.means.dtype

    def one(means: Array, counts: Array, code: Array, v: Array) -> Cache:
        lost = code > len(counts)
        counts = counts.at[code].add(1, mode="drop") + lost.astype(counts.dtype)
        count = counts.at[code].get(mode="fill", fill_value=1).astype(dtype)
        old = means.at[code].get(mode="fill", fill_value=0)
        # One mean that is not a number is enough, and need not touch the others.
        change = jnp.where(lost, jnp.full((), jnp.nan, dtype), (v - old) / count)
        means = means.at[jnp.where(lost, 0, code)].add(change, mode="drop")
        return Cache(means, counts)

    for _ in range(codes.ndim):
        one = jax.vmap(one)
    return one(cache.means, cache.counts, codes, v.astype(dtype))


def step(
    state: VQState,
    q: Float[Array, "batch heads key_dim"],
    k: Float[Array, "batch groups key_dim"],
    v: Float[Array, "batch groups value_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    bias: Float[Array, "..."] | None = None,
    codes: Int[Array, "batch groups"] | None = None,
    mask: Bool[Array, " batch"] | None = None,
    scale: float | None = None,
    rotary_base: float | None = None,
    cache: bool = True,
    local: str = "blocks",
    block_length: int | None = None,
    implementation: Any = "auto",
) -> tuple[Float[Array, "batch heads value_dim"], VQState]:
    """One token: the older of two leaves the window for the cache, then attention over both.

    (S + W) (dk + dv) products, however many tokens there have been. Gradients reach the k of this
    token alone: of earlier ones the state holds codes.

    Args:
      state: From `init_state`, `step` or `prefill`.
      q: Query of this token.
      k: Its key.
      v: Its value.
      codebook: C, the same for all tokens.
      bias: `[heads, window + 1]` or `[batch, heads, window + 1]`.
      codes: z, if known; the number of codes marks padding.
      mask: True where the token counts; where not, it takes a position and is seen by none.
      scale: Multiplies q.
      rotary_base: As in `vq_attention`.
      cache: As in `vq_attention`, the same for all tokens.
      local: As in `vq_attention`.
      block_length: L; needed for `cache=False` with `local="blocks"` alone.
      implementation: Of the kernel; see `jaxkit_kernels.vq_attention_decode`.

    Returns:
      `(out, state)`.

    Raises:
      TypeError: If dtypes do not fit.
      ValueError: If shapes do not fit each other or the state.

    Example:
      >>> import jax.numpy as jnp
      >>> state = init_state(1, 1, 2, 1, window=1)
      >>> one, codebook = jnp.ones((1, 1, 2)), jnp.asarray([[[1.0, 1.0], [0.0, 0.0]]])
      >>> for value in (3.0, 5.0, 10.0):
      ...     out, state = step(state, one, one, jnp.full((1, 1, 1), value), codebook)
      ...     print(round(float(out[0, 0, 0]), 4))
      3.0
      4.0
      6.0

    Source: Lingle 2023 (arXiv 2309.16354); post 9844.
    """
    size = sizes(q, k, v, codebook, axes=3)
    slots = _check_state(state, size, cache, local, block_length)
    lags = slots if cache or local == "window" else None
    window = check_bias(bias, q, lags - 1 if lags else None)
    if mask is not None:
        check_mask(mask, (size.batch,))
    if scale is not None:
        q = q * jnp.asarray(scale, q.dtype)
    codebook = jax.lax.stop_gradient(codebook).astype(q.dtype)
    new = quantize_keys(
        k[:, :, None],
        codebook,
        codes=None if codes is None else codes[..., None],
        mask=None if mask is None else mask[:, None],
    )

    slot = state.position % slots
    take = lambda ring: jax.lax.dynamic_index_in_dim(ring, slot, axis=2, keepdims=False)
    put = lambda ring, x: jax.lax.dynamic_update_slice_in_dim(ring, x, slot, axis=2)
    old = state.cache
    if cache:
        old = absorb(old, take(state.codes), take(state.values))
    ring = put(state.codes, new.codes)
    values = put(state.values, v[:, :, None])
    after = VQState(ring, values, old, state.position + 1)

    # The window is attended to in the order of its slots: the bias moves, not the values.
    lag = (state.position - jnp.arange(slots, dtype=jnp.int32)) % slots
    keys = put(lookup(codebook, ring), new.keys)
    visible = put(jnp.any(ring != size.codes, axis=1)[:, None], new.valid[:, None])[:, 0]
    if lags is None:
        assert block_length is not None
        visible = visible & (lag <= state.position % block_length + block_length)[None]
    if bias is not None:
        assert window is not None
        bias = jnp.where(
            (lag <= window).reshape((1,) * (bias.ndim - 1) + (-1,)),
            jnp.take(bias, jnp.minimum(lag, window), axis=-1),
            jnp.zeros((), bias.dtype),
        )
    if not cache:
        codebook = codebook[:, :1]
        seen = Cache(old.means[:, :, :1], jnp.zeros_like(old.counts[:, :, :1]))
    else:
        seen = old
    if rotary_base is not None:
        reach = slots - 1 if lags else (window if bias is not None else block_length)
        q, keys, codebook = _rotated(q, keys, codebook, lag, reach, rotary_base)
    out = kernels.vq_attention_decode(
        q, keys, values, visible, codebook, *seen, bias, implementation=implementation
    )
    return out, after


def _rotated(
    q: Array, keys: Array, codebook: Array, lag: Array, window: Any, base: float
) -> tuple[Array, Array, Array]:
    """Two products in one: keys up to the lag W, turned back, meet q; all else meets R_W q."""
    near = (lag <= window)[None, None, :, None]
    zero = jnp.zeros_like(keys)
    queries = jnp.concatenate([q, rotate(q, jnp.asarray(window), base=base)], axis=-1)
    return (
        queries,
        jnp.concatenate(
            [jnp.where(near, rotate(keys, -lag, base=base), zero), jnp.where(near, zero, keys)], -1
        ),
        jnp.concatenate([jnp.zeros_like(codebook), codebook], axis=-1),
    )


def _check_state(
    state: VQState, size: Any, cache: bool, local: str, block_length: int | None
) -> int:
    slots = state.codes.shape[-1]
    if not cache and local == "blocks":
        wanted = _slots(0, block_length, cache, local)
    else:
        check_choice("local", local, LOCALS)
        wanted = slots
    shape = (size.batch, size.groups, wanted)
    means = (size.batch, size.groups, size.codes, size.value_dim)
    for name, value, expected in (
        ("codes", state.codes, shape),
        ("values", state.values, (*shape, size.value_dim)),
        ("cache.means", state.cache.means, means),
        ("cache.counts", state.cache.counts, means[:-1]),
    ):
        if value.shape != expected:
            raise ValueError(f"state.{name} must have shape {expected}; got {value.shape}.")
    return slots


def prefill(
    state: VQState,
    q: Float[Array, "batch heads length key_dim"],
    k: Float[Array, "batch groups length key_dim"],
    v: Float[Array, "batch groups length value_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    block_length: int,
    bias: Float[Array, "..."] | None = None,
    codes: Int[Array, "batch groups length"] | None = None,
    mask: Bool[Array, "batch length"] | None = None,
    scale: float | None = None,
    rotary_base: float | None = None,
    reduction: str = "assoc_scan",
    cache: bool = True,
    local: str = "blocks",
    implementation: Any = "auto",
) -> tuple[Float[Array, "batch heads length value_dim"], VQState]:
    """Many tokens at once from any state, and the exact state after them.

    Any cut of a sequence into calls of `prefill` and `step` gives the outputs of `vq_attention` on
    the whole. The window of the state stands before the first block as a block of its own.

    Args:
      state: From `init_state`, `step` or `prefill`.
      q: Queries of these tokens.
      k: Their keys.
      v: Their values.
      codebook: C, the same for all tokens.
      block_length: L, at least the window of the state.
      bias: As in `vq_attention`.
      codes: z, if known.
      mask: True where a token counts.
      scale: Multiplies q.
      rotary_base: As in `vq_attention`.
      reduction: As in `vq_attention`.
      cache: As in `vq_attention`, the same for all tokens.
      local: As in `vq_attention`.
      implementation: Of the kernel; see `jaxkit_kernels.vq_attention`.

    Returns:
      `(out, state)`.

    Raises:
      TypeError: If dtypes do not fit.
      ValueError: If shapes do not fit each other or the state, or the window is longer than L.

    Example:
      >>> import jax.numpy as jnp
      >>> one, codebook = jnp.ones((1, 1, 5, 2)), jnp.zeros((1, 2, 2))
      >>> v = jnp.arange(5.0).reshape(1, 1, 5, 1)
      >>> out, state = prefill(
      ...     init_state(1, 1, 2, 1, window=1), one, one, v, codebook, block_length=2
      ... )
      >>> out.ravel().tolist(), state.cache.counts.tolist(), int(state.position)
      ([0.0, 0.5, 1.0, 1.5, 2.0], [[[3, 0]]], 5)

    Source: Lingle 2023 (arXiv 2309.16354); post 9844.
    """
    size = sizes(q, k, v, codebook)
    block_length = check_int("block_length", block_length, least=1)
    slots = _check_state(state, size, cache, local, block_length)
    aligned = not cache and local == "blocks"
    window = resolve_window(bias, q, None if aligned else slots - 1, block_length)
    if mask is not None:
        check_mask(mask, (size.batch, size.length))
    if scale is not None:
        q = q * jnp.asarray(scale, q.dtype)
    codebook = jax.lax.stop_gradient(codebook).astype(q.dtype)
    new = quantize_keys(k, codebook, codes=codes, mask=mask)

    # Oldest first.
    unroll = lambda ring: jnp.roll(ring, -(state.position % slots), axis=2)
    ring_codes, ring_values = unroll(state.codes), unroll(state.values)
    all_codes = jnp.concatenate([ring_codes, new.codes], axis=2)
    all_values = jnp.concatenate([ring_values, v], axis=2)

    start = state.cache
    if aligned:
        drop = 0
        offset: Any = state.position % block_length
        total = block_length - 1 + slots + size.length
        front, back = 0, total + -total % block_length - slots - size.length
    else:
        # The oldest is out of the reach of every new token.
        if cache:
            start = absorb(start, ring_codes[:, :, 0], ring_values[:, :, 0])
        drop, offset = 1, 0
        front, back = -window % block_length, 0
    before = front + slots - drop
    ring_keys = lookup(codebook, ring_codes)
    ring_valid = jnp.any(ring_codes != size.codes, axis=1)

    def place(x: Array, axis: int = 2, fill: int = 0) -> Array:
        """Room before and after; where blocks are aligned, the tokens move to their places."""
        x = jax.lax.slice_in_dim(x, drop, x.shape[axis], axis=axis)
        widths = [(front, back) if at == axis else (0, 0) for at in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.roll(x, offset, axis=axis) if aligned else x

    def no_queries(x: Array) -> Array:
        shape = (*x.shape[:2], slots, x.shape[3])
        return jnp.concatenate([jnp.zeros(shape, x.dtype), x], axis=2)

    out = attend(
        place(no_queries(q)),
        place(jnp.concatenate([ring_keys, new.keys], axis=2)),
        place(all_codes, fill=size.codes),
        place(all_values),
        place(jnp.concatenate([ring_valid, new.valid], axis=1), axis=1),
        codebook,
        bias if bias is None or bias.ndim == 2 else place(no_queries(bias)),
        start=start,
        block_length=block_length,
        window=window,
        rotary_base=rotary_base,
        reduction=reduction,
        cache=cache,
        local=local,
        grad_through_cache=True,
        implementation=implementation,
    )
    out = jax.lax.dynamic_slice_in_dim(out, before + offset, size.length, axis=2)

    old = state.cache
    if cache:
        left = summarize(
            all_codes[:, :, : size.length], all_values[:, :, : size.length], size.codes
        )
        old = merge(old, left)
    position = state.position + size.length
    roll = lambda x: jnp.roll(x[:, :, size.length :], position % slots, axis=2)
    return out, VQState(roll(all_codes), roll(all_values), old, position)
