"""Softmax attention over vector-quantised keys in block form: the public functions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jaxkit_kernels import _blocks, _dispatch, _sharding
from jaxkit_kernels.vq_attention import reference, xla
from jaxkit_kernels.vq_attention.reference import MASKED

__all__ = ["vq_attention", "vq_attention_decode"]

_BLOCKS = (
    _blocks.VqAttentionXlaBlocks,
    _blocks.VqAttentionTpuBlocks,
    _blocks.VqAttentionGpuBlocks,
)
_PACKAGE = "jaxkit_kernels.vq_attention"


def _forward_table(static: tuple[Any, ...]) -> dict[str, Any]:
    length, window, _, block_sizes, interpret = static
    sizes = {"block_length": length, "window": window}
    options = {**sizes, "block_sizes": block_sizes}
    kernel = {**options, "interpret": interpret}
    return {
        "xla": partial(xla.forward, **options),
        "pallas_tpu": _dispatch.lazy(f"{_PACKAGE}.pallas_tpu", "forward", **kernel),
        "pallas_gpu": _dispatch.lazy(f"{_PACKAGE}.pallas_gpu", "forward", **kernel),
        "reference": partial(reference.forward, **sizes),
    }


def _backward_table(static: tuple[Any, ...]) -> dict[str, Any]:
    length, window, _, block_sizes, interpret = static
    options = {"block_length": length, "window": window, "block_sizes": block_sizes}
    kernel = {**options, "interpret": interpret}
    return {
        "xla": partial(xla.backward, **options),
        "pallas_tpu": _dispatch.lazy(f"{_PACKAGE}.pallas_tpu", "backward", **kernel),
        "pallas_gpu": _dispatch.lazy(f"{_PACKAGE}.pallas_gpu", "backward", **kernel),
    }


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, codebook, means, log_counts, bias, valid):
    return _attend_fwd(static, q, k, v, codebook, means, log_counts, bias, valid)[0]


def _attend_fwd(static, *operands):
    table = _forward_table(static)
    out, lse = _dispatch.dispatch("vq_attention", static[2], table, *operands)
    return out, (*operands, out, lse)


def _attend_bwd(static, residuals, cotangent):
    q, k, v, means, bias = _dispatch.dispatch(
        "the gradient of vq_attention", static[2], _backward_table(static), *residuals, cotangent
    )
    # The codebook, the counts and the mask take no gradient.
    return q, k, v, None, means, None, bias, None


_attend.defvjp(_attend_fwd, _attend_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(static, *operands):
    implementation, interpret = static
    table = {
        "xla": xla.decode,
        "pallas_tpu": _dispatch.lazy(f"{_PACKAGE}.pallas_tpu", "decode", interpret=interpret),
        "pallas_gpu": _dispatch.lazy(f"{_PACKAGE}.pallas_gpu", "decode", interpret=interpret),
    }
    return _dispatch.dispatch("vq_attention_decode", implementation, table, *operands)


def _decode_fwd(static, *operands):
    return _decode(static, *operands), operands


def _decode_bwd(static, operands, cotangent):
    q, keys, values, codebook, means, log_counts, bias, visible = operands

    def function(q, keys, values, means, bias):
        return xla.decode(q, keys, values, codebook, means, log_counts, bias, visible)

    _, pull = jax.vjp(function, q, keys, values, means, bias)
    q, keys, values, means, bias = pull(cotangent)
    return q, keys, values, None, means, None, bias, None


_decode.defvjp(_decode_fwd, _decode_bwd)


def _int(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")
    return value


def _floating(name: str, value: Any, dtype: Any = None) -> None:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be a real floating-point array; got {value.dtype}.")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must have q's dtype {dtype}; got {value.dtype}.")


def _shape(name: str, value: Any, shape: tuple[int, ...], axes: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must be [{axes}] = {shape}; got shape {value.shape}.")


def _rank(name: str, value: Any, axes: str) -> None:
    if value.ndim != len(axes.split()):
        raise ValueError(f"{name} must be [{axes.replace(' ', ', ')}]; got shape {value.shape}.")


def _check_cache(q, codebook, means, counts, groups: int, lead: tuple[int, ...], dv: int) -> None:
    """Codebook [groups, codes, dk], means [*lead, codes, dv], counts [*lead, codes]."""
    _floating("codebook", codebook)
    _floating("means", means)
    if not (
        jnp.issubdtype(counts.dtype, jnp.integer) or jnp.issubdtype(counts.dtype, jnp.floating)
    ):
        raise TypeError(f"counts must be integer or floating-point; got {counts.dtype}.")
    if jnp.issubdtype(counts.dtype, jnp.floating) and counts.dtype.itemsize < 4:
        stall = int(2 / jnp.finfo(counts.dtype).eps)
        raise TypeError(
            f"counts must be int32 or float32, since {counts.dtype} stops counting at {stall}; "
            f"got {counts.dtype}."
        )
    _rank("codebook", codebook, "groups codes dk")
    codes = codebook.shape[1]
    if codes < 1:
        raise ValueError(f"codebook must hold at least one code; got shape {codebook.shape}.")
    _shape("codebook", codebook, (groups, codes, q.shape[-1]), "groups, codes, dk")
    names = "batch, groups, blocks" if len(lead) == 3 else "batch, groups"
    _shape("means", means, (*lead, codes, dv), f"{names}, codes, dv")
    _shape("counts", counts, (*lead, codes), f"{names}, codes")


def _check_heads(heads: int, groups: int) -> None:
    if groups < 1 or heads % groups:
        raise ValueError(
            f"q must have a multiple of k's {groups} groups as heads; got {heads} heads."
        )


def _check_bias(bias: Any, heads: int, lead: tuple[int, ...], lags: int) -> None:
    if bias is None:
        return
    _floating("bias", bias)
    if bias.shape not in ((heads, lags), (*lead, lags)):
        raise ValueError(
            f"bias must be None, [heads, window + 1] = {(heads, lags)} or one row a query, "
            f"{(*lead, lags)}; got shape {bias.shape}."
        )


def _finite(x: jax.Array) -> jax.Array:
    """Whether all of a row is."""
    return jnp.all(jnp.isfinite(x), axis=-1)


def _kept(keep: jax.Array, *rows: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.where(keep[..., None], x, jnp.zeros_like(x)) for x in rows)


def _usable(codebook, means, counts):
    """Codebook and means without what cannot be multiplied by 0, and whether that was seen.

    The means of codes that stand for nothing are not seen; those that are seen stay as they are.
    """
    known, some = _finite(codebook), counts > 0
    (codebook,), (means,) = _kept(known, codebook), _kept(some, means)
    known = known if means.ndim == 4 else known[:, None]
    lost = jnp.any((some & ~known[None]) | ~_finite(means), axis=-1)
    return codebook, means, jax.lax.stop_gradient(lost)


def _with_nan(out: jax.Array, spoiled: jax.Array) -> jax.Array:
    """NaN where `spoiled` [batch, groups, ...]; added, so that gradients show it too."""
    nan = jnp.where(spoiled, jnp.full((), jnp.nan, out.dtype), jnp.zeros((), out.dtype))
    return out + jnp.repeat(nan, out.shape[1] // nan.shape[1], axis=1)[..., None]


def _log_counts(counts: jax.Array, dtype: Any) -> jax.Array:
    compute = _dispatch.compute_dtype(dtype)
    counts = jax.lax.stop_gradient(counts).astype(compute)
    some = counts > 0
    return jnp.where(
        some, jnp.log(jnp.where(some, counts, jnp.ones_like(counts))), jnp.full((), MASKED, compute)
    )


def vq_attention(
    q: Float[Array, "batch heads time dk"],
    k: Float[Array, "batch groups time dk"],
    v: Float[Array, "batch groups time dv"],
    codebook: Float[Array, "groups codes dk"],
    means: Float[Array, "batch groups blocks codes dv"],
    counts: Num[Array, "batch groups blocks codes"],
    bias: Float[Array, "heads lags"] | Float[Array, "batch heads time lags"] | None = None,
    *,
    block_length: int,
    valid: Bool[Array, "batch time"] | None = None,
    window: int | None = None,
    implementation: _dispatch.Implementation = "auto",
    block_sizes: _blocks.BlockSizes | None = None,
    interpret: bool = False,
) -> Float[Array, "batch heads time dv"]:
    r"""Causal attention over recent keys one by one and over older keys by their codes.

    With blocks of L queries, query i of block r sees the keys j <= i of the blocks r - 1 and r,
    with a bias by lag, and everything older through the S codes C, each standing for N keys whose
    values have the mean $\mu$:

    $$ s_{ij} = q_i \cdot \hat k_j + b(i, i - j) \, [i - j \le W], \qquad
       c_{is} = q_i \cdot C_s + \log N_{rs}, $$
    $$ o_i = \frac{\sum_j e^{s_{ij}} v_j + \sum_s e^{c_{is}} \mu_{rs}}
                  {\sum_j e^{s_{ij}} + \sum_s e^{c_{is}}}. $$

    No scale is applied: q comes scaled, with any query offset u already added.

    Time is O(time (2 L + S) (dk + dv)) a head. The time x (2 L + S) scores are never held: the
    pure-JAX form holds those of one chunk of blocks, the Pallas kernels one tile. All forms but
    `reference` have their own reverse-mode rule (no forward mode), which keeps the output and one
    log-sum-exp a row and forms the scores again. Gradients flow to q, k, v, means and bias; none
    to the codebook and the counts.

    Args:
        q: queries [batch, heads, time, dk], time = blocks * L.
        k: quantised keys [batch, groups, time, dk]: C[z] in value, straight-through in gradient.
            Query head h reads group h // (heads / groups).
        v: values [batch, groups, time, dv].
        codebook: C, [groups, codes, dk]; rounded to the dtype of k.
        means: mean value of each code over the blocks up to r - 2, [batch, groups, blocks, codes,
            dv].
        counts: N, integer or (soft codes) floating-point, [batch, groups, blocks, codes]. A code
            with N = 0 is not seen.
        bias: None, a table [heads, W + 1] by lag, or [batch, heads, time, W + 1].
        block_length: L, static.
        valid: [batch, time], False at padding keys, which nobody sees and whose k and v are never
            read. A query that sees nothing at all gives 0. What sees a key, a value or a mean that
            is not finite gives NaN, and nothing else does.
        window: W <= L, the largest lag with a bias; L by default.
        implementation: see `jaxkit_kernels`.
        block_sizes: a `VqAttentionXlaBlocks`, `VqAttentionTpuBlocks` or `VqAttentionGpuBlocks`.
        interpret: run the Pallas kernels in interpret mode, on any platform.

    Returns:
        [batch, heads, time, dv] in the dtype of q. Half-precision input is accumulated in float32.

    Raises:
        ValueError: for a wrong shape, heads no multiple of groups, `block_length` < 1 or no
            divisor of the time, `window` outside [0, L], or an unknown `implementation`.
        TypeError: for a wrong dtype or type.
        NotImplementedError: if the implementation named does not take these arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> q = k = jnp.ones((1, 1, 4, 2))
        >>> v = jnp.arange(4.0).reshape(1, 1, 4, 1)
        >>> means = jnp.zeros((1, 1, 4, 1, 1)).at[0, 0, 3].set(0.5)  # of the values 0 and 1
        >>> counts = jnp.array([[[[0], [0], [1], [2]]]])
        >>> out = vq_attention(q, k, v, jnp.ones((1, 1, 2)), means, counts, block_length=1)
        >>> [f"{o:.2f}" for o in out[0, 0, :, 0]]  # equal scores: the running mean of v
        ['0.00', '0.50', '1.00', '1.50']

    Source: Lingle, "Transformer-VQ: Linear-Time Transformers via Vector Quantization" (2023),
    arXiv 2309.16354; kexue.fm post 9844.
    """
    _dispatch.check_implementation(implementation)
    length = _int("block_length", block_length, 1)
    window = length if window is None else _int("window", window, 0)
    if window > length:
        raise ValueError(f"window must be at most block_length = {length}; got {window}.")
    if block_sizes is not None and not isinstance(block_sizes, _BLOCKS):
        names = ", ".join(kind.__name__ for kind in _BLOCKS)
        raise TypeError(f"block_sizes must be one of {names}; got {type(block_sizes).__name__}.")
    _floating("q", q)
    _floating("k", k, q.dtype)
    _floating("v", v, q.dtype)
    _rank("q", q, "batch heads time dk")
    _rank("k", k, "batch groups time dk")
    _rank("v", v, "batch groups time dv")
    batch, heads, time, width = q.shape
    groups, dv = k.shape[1], v.shape[3]
    _shape("k", k, (batch, groups, time, width), "batch, groups, time, dk")
    _shape("v", v, (batch, groups, time, dv), "batch, groups, time, dv")
    _check_heads(heads, groups)
    if time % length:
        raise ValueError(
            f"q must have a multiple of block_length = {length} as time; got {time}. Pad it, and "
            f"mark the padding as not valid."
        )
    _check_cache(q, codebook, means, counts, groups, (batch, groups, time // length), dv)
    _check_bias(bias, heads, (batch, heads, time), window + 1)
    if valid is not None:
        if valid.dtype != jnp.bool_:
            raise TypeError(f"valid must be boolean; got {valid.dtype}.")
        _shape("valid", valid, (batch, time), "batch, time")
    if 0 in (batch, heads, time):
        return jnp.zeros((batch, heads, time, dv), q.dtype)

    # Whatever stands in the padding or in the future, NaN included, must not meet a weight of 0.
    codebook, means, lost = _usable(jax.lax.stop_gradient(codebook), means, counts)
    usable = _finite(k) & _finite(v)
    k, v = _kept(usable if valid is None else usable & valid[:, None], k, v)
    spoiled = ~usable if valid is None else ~usable & valid[:, None]
    spoiled = spoiled.reshape(batch, groups, -1, length)
    before = jnp.pad(jnp.any(spoiled, axis=-1)[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    so_far = jax.lax.cummax(spoiled.astype(jnp.int32), axis=3) > 0
    spoiled = (so_far | (before | lost)[..., None]).reshape(batch, groups, time)

    operands = _sharding.together(
        q, k, v, codebook.astype(k.dtype), means, _log_counts(counts, q.dtype), bias, valid
    )
    if implementation == "reference":
        out = reference.forward(*operands, block_length=length, window=window)[0]
    else:
        out = _attend((length, window, implementation, block_sizes, interpret), *operands)
    return _with_nan(out, spoiled)


def vq_attention_decode(
    q: Float[Array, "batch heads dk"],
    keys: Float[Array, "batch groups lags dk"],
    values: Float[Array, "batch groups lags dv"],
    visible: Bool[Array, "batch lags"],
    codebook: Float[Array, "groups codes dk"],
    means: Float[Array, "batch groups codes dv"],
    counts: Num[Array, "batch groups codes"],
    bias: Float[Array, "heads lags"] | Float[Array, "batch heads lags"] | None = None,
    *,
    implementation: _dispatch.Implementation = "auto",
    interpret: bool = False,
) -> Float[Array, "batch heads dv"]:
    r"""One step of decoding: the newest query over the lags 0..W and over the codes.

    $$ o = \frac{\sum_{l=0}^W e^{q \cdot \hat k_l + b(l)} v_l + \sum_s N_s e^{q \cdot C_s} \mu_s}
                {\sum_{l=0}^W e^{q \cdot \hat k_l + b(l)} + \sum_s N_s e^{q \cdot C_s}}. $$

    Codes, window and cache are read once, in one launch of the Pallas kernels. Reverse mode goes
    through the pure-JAX form, whatever the implementation.

    Args:
        q: the query [batch, heads, dk], scaled as in `vq_attention`.
        keys: quantised keys [batch, groups, W + 1, dk], ordered by lag, the query's own first.
        values: [batch, groups, W + 1, dv].
        visible: [batch, W + 1], False where the window is not filled yet or holds padding.
        codebook: C, [groups, codes, dk]; rounded to the dtype of the keys.
        means: mean values of the tokens older than W, [batch, groups, codes, dv].
        counts: their numbers N, [batch, groups, codes].
        bias: None, a table [heads, W + 1] by lag, or [batch, heads, W + 1].
        implementation: see `jaxkit_kernels`.
        interpret: run the Pallas kernels in interpret mode, on any platform.

    Returns:
        [batch, heads, dv] in the dtype of q; 0 for a query that sees nothing.

    Raises:
        ValueError: for a wrong shape or an unknown `implementation`.
        TypeError: for a wrong dtype.
        NotImplementedError: if the implementation named does not take these arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> out = vq_attention_decode(
        ...     jnp.ones((1, 1, 2)),
        ...     jnp.ones((1, 1, 1, 2)),
        ...     jnp.full((1, 1, 1, 1), 3.0),
        ...     jnp.ones((1, 1), bool),
        ...     jnp.ones((1, 1, 2)),
        ...     jnp.ones((1, 1, 1, 1)),
        ...     jnp.full((1, 1, 1), 3),
        ... )
        >>> round(float(out[0, 0, 0]), 4)  # equal scores: the mean of 3 and three times 1
        1.5

    Source: Lingle, "Transformer-VQ: Linear-Time Transformers via Vector Quantization" (2023),
    arXiv 2309.16354; kexue.fm post 9844.
    """
    _dispatch.check_implementation(implementation)
    _floating("q", q)
    _floating("keys", keys, q.dtype)
    _floating("values", values, q.dtype)
    _rank("q", q, "batch heads dk")
    _rank("keys", keys, "batch groups lags dk")
    _rank("values", values, "batch groups lags dv")
    batch, heads, width = q.shape
    groups, lags, dv = keys.shape[1], keys.shape[2], values.shape[3]
    _shape("keys", keys, (batch, groups, lags, width), "batch, groups, lags, dk")
    _shape("values", values, (batch, groups, lags, dv), "batch, groups, lags, dv")
    _check_heads(heads, groups)
    if lags < 1:
        raise ValueError(f"keys must hold at least the query's own; got shape {keys.shape}.")
    if visible.dtype != jnp.bool_:
        raise TypeError(f"visible must be boolean; got {visible.dtype}.")
    _shape("visible", visible, (batch, lags), "batch, lags")
    _check_cache(q, codebook, means, counts, groups, (batch, groups), dv)
    _check_bias(bias, heads, (batch, heads), lags)
    if 0 in (batch, heads):
        return jnp.zeros((batch, heads, dv), q.dtype)
    codebook, means, lost = _usable(jax.lax.stop_gradient(codebook), means, counts)
    usable = _finite(keys) & _finite(values)
    keys, values = _kept(usable & visible[:, None], keys, values)
    spoiled = jnp.any(visible[:, None] & ~usable, axis=-1) | lost
    log_counts = _log_counts(counts, q.dtype)
    operands = _sharding.together(
        q, keys, values, codebook.astype(keys.dtype), means, log_counts, bias, visible
    )
    if implementation == "reference":
        out = reference.decode(*operands)
    else:
        out = _decode((implementation, interpret), *operands)
    return _with_nan(out, spoiled)
