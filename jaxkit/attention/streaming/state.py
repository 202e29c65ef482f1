"""Softmax accumulators: the state of attention read as a recurrence over keys.

For one query, what has been read so far is summed up in `(m, l, o)`: the largest score m,
`l = Σ_j e^{s_j − m}` and `o = Σ_j e^{s_j − m} v_j`. States of disjoint sets of keys merge, in any
order and any tree; the result `(out, lse) = (o / l, m + log l)` merges the same way. Everything
that reads keys in pieces is made of this: tiles, chunks, split decoding, rings of devices.

Sources: Milakov, Gimelshein 2018 (arXiv 1805.02867); Rabe, Staats 2021 (2112.05682); post 10017.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_floating, check_int
from jaxkit._typing import Array, DType, Float
from jaxkit.attention.streaming._options import work_dtype

__all__ = [
    "Attended",
    "SoftmaxState",
    "finalize",
    "from_scores",
    "identity",
    "merge",
    "merge_all",
    "merge_normalized",
    "merge_normalized_all",
    "sink",
    "unfinalize",
    "update",
]


class SoftmaxState(NamedTuple):
    """What a query has read so far; any leading axes, such as `[batch, length, heads]`.

    Attributes:
      m: largest score, −∞ if nothing was read.
      l: Σ e^{s − m}.
      o: Σ e^{s − m} v, with one more axis than m and l.
    """

    m: Float[Array, "*lead"]
    l: Float[Array, "*lead"]
    o: Float[Array, "*lead dim"]


class Attended(NamedTuple):
    """A finished (or partial) result: weighted mean of the values, and log Σ e^s.

    Attributes:
      out: o / l; 0 where no key was visible.
      lse: m + log l; −∞ where no key was visible.
    """

    out: Float[Array, "*lead dim"]
    lse: Float[Array, "*lead"]


def _finite(m: Array) -> Array:
    """The shift to subtract from scores: m, or 0 where nothing is visible (−∞ − −∞ is NaN).

    Any shift gives the same result, so it takes part in no derivative.
    """
    m = jax.lax.stop_gradient(m)
    return jnp.where(jnp.isneginf(m), jnp.zeros_like(m), m)


def _across(weight: Array, o: Array) -> Array:
    return weight[..., None] * o


def identity(shape: tuple[int, ...], dim: int, *, dtype: DType = jnp.float32) -> SoftmaxState:
    """The state that has read nothing: `(−∞, 0, 0)`.

    Args:
      shape: leading axes, one state for each place.
      dim: size of a value.
      dtype: of the accumulators. Below float32 the sums stall (l stops at 256 in bfloat16):
        such a state is only good for showing that.

    Returns:
      The identity of `merge`.

    Raises:
      TypeError: `dtype` is not of real floating-point numbers.
      ValueError: `dim` is below 1.

    Example:
      >>> state = identity((2,), 3)
      >>> print(state.m, state.l, state.o.shape)
      [-inf -inf] [0. 0.] (2, 3)
    """
    dim = check_int("dim", dim, least=1)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be of real floating-point numbers; got {dtype}.")
    low, zero = jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype)
    return SoftmaxState(low, zero, jnp.zeros((*shape, dim), dtype))


def update(
    state: SoftmaxState, score: Float[Array, "*lead"], value: Float[Array, "*lead dim"]
) -> SoftmaxState:
    """Read one key: `m' = max(m, s)`, `(l, o) ← e^{m−m'} (l, o) + e^{s−m'} (1, v)`.

    Args:
      state: what was read before; its dtype is that of the sums.
      score: s, −∞ for a key that is not visible.
      value: v, of the shape of `state.o`.

    Returns:
      The state with this key.

    Raises:
      ValueError: shapes differ from those of the state.

    Example:
      >>> import jax.numpy as jnp
      >>> state = identity((), 1)
      >>> for s, v in ((1000.0, 1.0), (999.0, 0.0)):
      ...     state = update(state, jnp.asarray(s), jnp.asarray([v]))
      >>> print(f"{state.m} {state.l:.4f} {state.o}")
      1000.0 1.3679 [1.]
    """
    if score.shape != state.m.shape or value.shape != state.o.shape:
        raise ValueError(
            f"score and value must have shapes {state.m.shape} and {state.o.shape}; "
            f"got {score.shape} and {value.shape}."
        )
    score, value = score.astype(state.m.dtype), value.astype(state.o.dtype)
    return merge(state, SoftmaxState(score, jnp.ones_like(score), value))


def from_scores(
    scores: Float[Array, "*lead keys"],
    values: Float[Array, "*lead keys dim"],
    *,
    dtype: DType | None = None,
) -> SoftmaxState:
    """The state of a whole tile of keys, read at once.

    Args:
      scores: −∞ for keys that are not visible.
      values: their values; leading axes of 1 broadcast.
      dtype: of the state. Default: float32, or float64 if an argument is.

    Returns:
      The state, without the axis of keys.

    Raises:
      ValueError: `values` does not have the ranks and the number of keys of `scores`.

    Example:
      >>> import jax.numpy as jnp
      >>> state = from_scores(jnp.asarray([1000.0, 999.0]), jnp.asarray([[1.0], [0.0]]))
      >>> print(f"{finalize(state).out[0]:.4f} {state.l:.4f}")
      0.7311 1.3679
    """
    if values.ndim != scores.ndim + 1 or values.shape[-2] != scores.shape[-1]:
        raise ValueError(
            f"values must be [..., keys, dim] with the axes of scores, {tuple(scores.shape)}; "
            f"got shape {tuple(values.shape)}."
        )
    if dtype is None:
        dtype = work_dtype(scores, values)
    scores, values = scores.astype(dtype), values.astype(dtype)
    m = jax.lax.stop_gradient(jnp.max(scores, axis=-1, initial=-jnp.inf))
    p = jnp.exp(scores - _finite(m)[..., None])
    return SoftmaxState(m, p.sum(-1), jnp.matmul(p[..., None, :], values)[..., 0, :])


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """The state that has read what either has: associative, commutative, differentiable.

    `m = max(m_1, m_2)`, `l = e^{m_1−m} l_1 + e^{m_2−m} l_2`, and the same for o.

    Args:
      a: one state.
      b: another, of disjoint keys; leading axes of 1 broadcast.

    Returns:
      Their union. Merging with `identity` changes nothing; two identities give an identity.

    Raises:
      ValueError: the states are of different shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> one = SoftmaxState(jnp.asarray(1.0), jnp.asarray(1.0), jnp.asarray([5.0]))
      >>> both = merge(one, identity((), 1))
      >>> print(both.m, both.l, both.o)
      1.0 1.0 [5.]
    """
    try:
        jnp.broadcast_shapes(a.m.shape, b.m.shape)
        fits = a.o.shape[-1] == b.o.shape[-1]
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"b must have the shapes of a, m {a.m.shape} and o {a.o.shape}; "
            f"got {b.m.shape} and {b.o.shape}."
        )
    # Gradients flow through m_1 and m_2 (a sink is learned there), never through the maximum.
    m = jax.lax.stop_gradient(jnp.maximum(a.m, b.m))
    shift = _finite(m)
    first, second = jnp.exp(a.m - shift), jnp.exp(b.m - shift)
    return SoftmaxState(m, first * a.l + second * b.l, _across(first, a.o) + _across(second, b.o))


def merge_all(states: SoftmaxState, *, axis: int = 0) -> SoftmaxState:
    """Merge the states along an axis, all at once.

    Args:
      states: stacked states.
      axis: the axis to merge, counted in `m` (in `o` it is the same axis of the leading ones).

    Returns:
      One state, without the axis.

    Raises:
      ValueError: `axis` is not an axis of `m`.

    Example:
      >>> import jax.numpy as jnp
      >>> states = SoftmaxState(jnp.zeros(4), jnp.ones(4), jnp.arange(4.0)[:, None])
      >>> print(finalize(merge_all(states)).out)
      [1.5]
    """
    axis = _lead_axis(axis, states.m.ndim)
    m = jax.lax.stop_gradient(jnp.max(states.m, axis=axis))
    weight = jnp.exp(states.m - jnp.expand_dims(_finite(m), axis))
    return SoftmaxState(m, (weight * states.l).sum(axis), _across(weight, states.o).sum(axis))


def _lead_axis(axis: int, ndim: int) -> int:
    axis = check_int("axis", axis)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis must be from {-ndim} to {ndim - 1}; got {axis}.")
    return axis % ndim


def finalize(state: SoftmaxState, *, dtype: DType | None = None) -> Attended:
    """The result of a state: `out = o / l`, `lse = m + log l`; 0 and −∞ where l = 0.

    Args:
      state: the state.
      dtype: of `out`. Default: that of the state. `lse` keeps the state's dtype.

    Returns:
      `(out, lse)`. Its gradient at places that have read nothing is 0.

    Example:
      >>> out, lse = finalize(identity((), 2))
      >>> print(out, lse)
      [0. 0.] -inf
    """
    empty = (state.l == 0) | jnp.isneginf(state.m)
    l = jnp.where(empty, jnp.ones_like(state.l), state.l)
    lse = jnp.where(empty, -jnp.inf, _finite_part(state.m) + jnp.log(l))
    out = jnp.where(empty[..., None], jnp.zeros_like(state.o), state.o / l[..., None])
    return Attended(out if dtype is None else out.astype(dtype), lse)


def _finite_part(m: Array) -> Array:
    """m with its gradient, and 0 for −∞, so that no −∞ meets a cotangent."""
    return jnp.where(jnp.isneginf(m), jnp.zeros_like(m), m)


def unfinalize(partial: Attended) -> SoftmaxState:
    """A state with this result: `(lse, 1, out)`, so that partial results merge as states do.

    Where lse is −∞ nothing was read, whatever `out` holds: the state is `(−∞, 0, 0)`.

    Args:
      partial: `(out, lse)`; `out` may have a narrower dtype than `lse`.

    Returns:
      The state, in the dtype of `lse`.

    Example:
      >>> import jax.numpy as jnp
      >>> state = unfinalize(Attended(jnp.asarray([2.0]), jnp.asarray(7.0)))
      >>> print(state.m, state.l, state.o)
      7.0 1.0 [2.]
    """
    check_floating("partial.lse", partial.lse)
    check_floating("partial.out", partial.out)
    if partial.out.shape[:-1] != partial.lse.shape:
        raise ValueError(
            f"partial.out must be [*lead, dim] for lse of shape {tuple(partial.lse.shape)}; "
            f"got shape {tuple(partial.out.shape)}."
        )
    dtype = work_dtype(partial.lse, partial.out)
    lse, out = partial.lse.astype(dtype), partial.out.astype(dtype)
    empty = jnp.isneginf(lse)
    return SoftmaxState(
        lse, (~empty).astype(dtype), jnp.where(empty[..., None], jnp.zeros_like(out), out)
    )


def merge_normalized(a: Attended, b: Attended) -> Attended:
    """Merge two results: `lse = logaddexp(lse_1, lse_2)`, `out = Σ e^{lse_i − lse} out_i`.

    Differentiable in all four: whatever made the two needs a backward pass that takes the
    cotangent of lse too, as `blockwise_attention` has.

    Args:
      a: attention over some keys.
      b: attention of the same queries over other keys.

    Returns:
      Attention over both; `out` in the dtype of `a.out`.

    Raises:
      ValueError: the results are of different shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> a = Attended(jnp.asarray([1.0]), jnp.asarray(1000.0))
      >>> b = Attended(jnp.asarray([0.0]), jnp.asarray(999.0))
      >>> print(f"{merge_normalized(a, b).out[0]:.4f}")
      0.7311
    """
    return finalize(merge(unfinalize(a), unfinalize(b)), dtype=a.out.dtype)


def merge_normalized_all(partials: Attended, *, axis: int = 0) -> Attended:
    """Merge the results along an axis, all at once.

    Args:
      partials: stacked results.
      axis: the axis to merge, counted in `lse`.

    Returns:
      One result, without the axis; `out` in the dtype of `partials.out`.

    Raises:
      ValueError: `axis` is not an axis of `lse`.

    Example:
      >>> import jax.numpy as jnp
      >>> partials = Attended(jnp.arange(4.0)[:, None], jnp.zeros(4))
      >>> merged = merge_normalized_all(partials)
      >>> print(f"{merged.out} {merged.lse:.4f}")
      [1.5] 1.3863
    """
    return finalize(merge_all(unfinalize(partials), axis=axis), dtype=partials.out.dtype)


def sink(logit: Float[Array, "*lead"], dim: int) -> SoftmaxState:
    """The state of an attention sink, an extra key of score b and value 0: `(b, 1, 0)`.

    Args:
      logit: b, learned or not; its gradient flows through `merge`.
      dim: size of a value.

    Returns:
      The state to merge with.

    Example:
      >>> import jax.numpy as jnp
      >>> read = update(identity((), 1), jnp.asarray(0.0), jnp.asarray([2.0]))
      >>> print(finalize(merge(read, sink(jnp.asarray(0.0), 1))).out)
      [1.]
    """
    check_floating("logit", logit)
    dim = check_int("dim", dim, least=1)
    return SoftmaxState(logit, jnp.ones_like(logit), jnp.zeros((*logit.shape, dim), logit.dtype))
