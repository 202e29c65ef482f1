r"""Soft codes: every key shared out over the codebook, with exact gradients in linear time.

The one-hot row of a key's code becomes p(y|k) = softmax_y(−‖k − C_y‖²/(2τ)), and

    o_i = Σ_y e^{q_i C_y} Σ_j p(y|k_j) v_j / Σ_y e^{q_i C_y} Σ_j p(y|k_j).

It is e^{q·k} = ∫ e^{q·ω} δ(ω − k) dω with δ replaced by a mixture of Gaussians around the codes, of
one width: the width cancels. τ → 0 gives the hard codes. There are no windows and no biases, and
the state is a `Cache` alone, with counts that are fractions.
"""

import jax
import jax.numpy as jnp

from jaxkit._checks import check_int, check_real
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Bool, DType, Float
from jaxkit.attention.vq._operands import HIGHEST, check_mask, finite_rows, nan_where, sizes
from jaxkit.attention.vq.bidirectional import attend_codes
from jaxkit.attention.vq.block import Cache, masked_softmax, merge, reduce_blocks

__all__ = [
    "soft_assignment",
    "soft_attention",
    "soft_init_state",
    "soft_prefill",
    "soft_step",
]

# Per query, a code with less than this of all tokens is left out: its share would overflow.
_LEAST = {"float32": 1e-30, "float64": 1e-290}


def soft_assignment(
    k: Float[Array, "batch groups length key_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    temperature: float,
) -> Float[Array, "batch groups length codes"]:
    """p(y|k) = softmax_y(−‖k − C_y‖²/(2τ)), in float32 at least.

    Args:
      k: Keys.
      codebook: C.
      temperature: τ > 0.

    Returns:
      Probabilities over codes.

    Raises:
      ValueError: If `temperature` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> codebook = jnp.asarray([[[0.0], [2.0]]])
      >>> k = jnp.asarray([[[[1.0], [0.0]]]])
      >>> [f"{p:.4f}" for p in soft_assignment(k, codebook, temperature=1.0)[0, 0, :, 0]]
      ['0.5000', '0.8808']

    Source: post 9862.
    """
    check_real("temperature", temperature, above=0.0)
    dtype = wide(k.dtype)
    k, codebook = k.astype(dtype), codebook.astype(dtype)
    # About the centre of the codebook, where the square cancels least.
    center = jax.lax.stop_gradient(jnp.mean(codebook, axis=1, keepdims=True))
    k, codebook = k - center[None], codebook - center
    cross = jnp.einsum("bgtd,gsd->bgts", k, codebook, precision=HIGHEST)
    norm = jnp.sum(codebook**2, axis=-1)[None, :, None]
    return jax.nn.softmax((cross - norm / 2) / jnp.asarray(temperature, dtype), axis=-1)


def _shares(p: Array, v: Array) -> Cache:
    """Fractional counts and means over the axis of tokens."""
    counts = jnp.sum(p, axis=-2)
    some = counts > 0
    fraction = p / jnp.where(some, counts, jnp.ones_like(counts))[..., None, :]
    return Cache(jnp.einsum("...ts,...td->...sd", fraction, v, precision=HIGHEST), counts)


def soft_attention(
    q: Float[Array, "batch heads length key_dim"],
    k: Float[Array, "batch groups length key_dim"],
    v: Float[Array, "batch groups length value_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    temperature: float,
    causal: bool = True,
    block_length: int = 128,
    reduction: str = "assoc_scan",
    mask: Bool[Array, "batch length"] | None = None,
    scale: float | None = None,
) -> Float[Array, "batch heads length value_dim"]:
    """Attention over soft codes, exactly, in time linear in the length.

    Causal, o_i = Σ_y softmax_y(q_i C_y + log N_i[y]) μ_i[y] with the counts and means of the tokens
    up to i: those of whole blocks before from a scan, the rest within the block. Gradients to q, k,
    v and C. O(T (S (dk + dv) + L (S + dv))).

    Args:
      q: Queries; head h reads group ⌊h G/H⌋.
      k: Keys.
      v: Values.
      codebook: C, learned by its gradient.
      temperature: τ > 0; small for hard codes.
      causal: False attends to all tokens.
      block_length: L of the causal form; the result does not depend on it.
      reduction: Over blocks; see `reduce_blocks`.
      mask: True where a position counts. A query that sees nothing gives zeros.
      scale: Multiplies q.

    Returns:
      The outputs, in the dtype of `v`.

    Raises:
      TypeError: If dtypes do not fit.
      ValueError: If shapes do not fit or an argument is out of range.

    Example:
      >>> import jax
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1, 10, 4))
      >>> codebook = jax.random.normal(jax.random.key(1), (1, 8, 4))
      >>> a, b = (
      ...     soft_attention(q, k, v, codebook, temperature=0.1, block_length=n) for n in (3, 10)
      ... )
      >>> bool(abs(a - b).max() < 1e-5)
      True

    Source: post 9862.
    """
    size = sizes(q, k, v, codebook)
    if causal:
        state = soft_init_state(
            size.batch, size.groups, size.codes, size.value_dim, dtype=wide(q.dtype)
        )
        return soft_prefill(
            state,
            q,
            k,
            v,
            codebook,
            temperature=temperature,
            block_length=block_length,
            reduction=reduction,
            mask=mask,
            scale=scale,
        )[0]
    q, p, values = _prepared(q, k, v, codebook, temperature, mask, scale)
    return attend_codes(q, codebook.astype(q.dtype), _shares(p, values)).astype(v.dtype)


def _prepared(
    q: Array,
    k: Array,
    v: Array,
    codebook: Array,
    temperature: float,
    mask: Array | None,
    scale: float | None,
) -> tuple[Array, Array, Array]:
    """q scaled, p and v zero in the padding; p and v in float32 at least."""
    if mask is not None:
        check_mask(mask, (k.shape[0], k.shape[2]))
        keep = mask[:, None, :, None]
        k, v = (jnp.where(keep, x, jnp.zeros_like(x)) for x in (k, v))
    p = soft_assignment(k, codebook, temperature=temperature)
    # A token that is not finite spoils the counts of all codes, and so all that comes to see it.
    p, v = (x + nan_where(~finite_rows(k, v), x.dtype)[..., None] for x in (p, v))
    if mask is not None:
        p = jnp.where(keep, p, jnp.zeros_like(p))
    if scale is not None:
        q = q * jnp.asarray(scale, q.dtype)
    return q, p, v.astype(p.dtype)


def soft_init_state(
    batch: int, groups: int, num_codes: int, value_dim: int, *, dtype: DType = jnp.float32
) -> Cache:
    """The state before the first token: S (value_dim + 1) numbers for each group.

    Example:
      >>> soft_init_state(2, 1, 8, 3).means.shape
      (2, 1, 8, 3)
    """
    dtype = wide(dtype)
    return Cache(
        jnp.zeros((batch, groups, num_codes, value_dim), dtype),
        jnp.zeros((batch, groups, num_codes), dtype),
    )


def soft_prefill(
    state: Cache,
    q: Float[Array, "batch heads length key_dim"],
    k: Float[Array, "batch groups length key_dim"],
    v: Float[Array, "batch groups length value_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    temperature: float,
    block_length: int = 128,
    reduction: str = "assoc_scan",
    mask: Bool[Array, "batch length"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "batch heads length value_dim"], Cache]:
    """`soft_attention` from any state, and the exact state after the last token.

    Example:
      >>> import jax.numpy as jnp
      >>> one, codebook = jnp.ones((1, 1, 3, 2)), jnp.zeros((1, 2, 2))
      >>> v = jnp.asarray([3.0, 5.0, 10.0]).reshape(1, 1, 3, 1)
      >>> state = soft_init_state(1, 1, 2, 1)
      >>> out, state = soft_prefill(state, one, one, v, codebook, temperature=1.0)
      >>> out.ravel().tolist(), state.counts.tolist()
      ([3.0, 4.0, 6.0], [[[1.5, 1.5]]])

    Source: post 9862.
    """
    size = sizes(q, k, v, codebook)
    length = min(check_int("block_length", block_length, least=1), size.length)
    out_dtype = v.dtype
    q, p, values = _prepared(q, k, v, codebook, temperature, mask, scale)
    dtype = p.dtype
    blocks = -(-size.length // length)
    split = lambda x: jnp.pad(
        x, [(0, 0), (0, 0), (0, blocks * length - size.length), (0, 0)]
    ).reshape(*x.shape[:2], blocks, length, x.shape[-1])
    q, p, values = split(q.astype(dtype)), split(p), split(values)
    q = q.reshape(size.batch, size.groups, size.share, blocks, length, size.key_dim)

    # The state, then the state and every block: queries of block r find those before it.
    own = _shares(p, values)
    every = reduce_blocks(
        jax.tree.map(
            lambda first, x: jnp.concatenate([first[:, :, None].astype(dtype), x], axis=2),
            state,
            own,
        ),
        reduction=reduction,
    )
    before = jax.tree.map(lambda x: x[:, :, :-1], every)

    # N_i[y], of the tokens up to i.
    seen = before.counts[:, :, :, None] + jnp.cumsum(p, axis=3)
    enough = seen > _LEAST[dtype.name]
    safe = jnp.where(enough, seen, jnp.ones_like(seen))
    scores = jnp.einsum("bgprid,gsd->bgpris", q, codebook.astype(dtype), precision=HIGHEST)
    visible = jnp.broadcast_to(enough[:, :, None], scores.shape)
    weights = masked_softmax(scores + jnp.log(safe)[:, :, None], visible)
    # The weight of one token of code y.
    each = weights / safe[:, :, None]
    past = each * before.counts[:, :, None, :, None]
    out = jnp.einsum("bgpris,bgrsd->bgprid", past, before.means, precision=HIGHEST)
    near = jnp.einsum("bgpris,bgrjs->bgprij", each, p, precision=HIGHEST)
    near = jnp.where(jnp.tril(jnp.ones((length, length), bool))[None, None, None, None], near, 0)
    # What spoils a later token must not meet its weight of zero here.
    values = jnp.where(finite_rows(values)[..., None], values, 0)
    out = out + jnp.einsum("bgprij,bgrjd->bgprid", near, values, precision=HIGHEST)
    out = out.reshape(size.batch, size.heads, blocks * length, size.value_dim)
    last = jax.tree.map(lambda x: x[:, :, -1], every)
    return out[:, :, : size.length].astype(out_dtype), last


def soft_step(
    state: Cache,
    q: Float[Array, "batch heads key_dim"],
    k: Float[Array, "batch groups key_dim"],
    v: Float[Array, "batch groups value_dim"],
    codebook: Float[Array, "groups codes key_dim"],
    *,
    temperature: float,
    mask: Bool[Array, " batch"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "batch heads value_dim"], Cache]:
    """One token: shared out over the cache, then attention over it; S (2 dk + 2 dv) products.

    Example:
      >>> import jax.numpy as jnp
      >>> one, state = jnp.ones((1, 1, 2)), soft_init_state(1, 1, 2, 1)
      >>> for value in (3.0, 5.0):
      ...     out, state = soft_step(
      ...         state, one, one, jnp.full((1, 1, 1), value), jnp.zeros((1, 2, 2)), temperature=1.0
      ...     )
      ...     print(float(out[0, 0, 0]))
      3.0
      4.0

    Source: post 9862.
    """
    sizes(q, k, v, codebook, axes=3)
    one = lambda x: x[:, :, None]
    counted = None if mask is None else mask[:, None]
    q, p, values = _prepared(one(q), one(k), one(v), codebook, temperature, counted, scale)
    new = Cache(jnp.where(p[:, :, 0, :, None] == 0, jnp.zeros_like(values), values), p[:, :, 0])
    state = merge(state, new)
    return attend_codes(q, codebook, state)[:, :, 0].astype(v.dtype), state
