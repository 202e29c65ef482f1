"""Attention layers as an RNN of constant state: nothing is kept but the tokens, all is recomputed.

Layer n at position i reads `x^{(n−1)}_j` for j = i, i−1, …, 0, and asks layer n − 1 for each of
them anew. What is alive at any time is one frame per layer, `(q, x, m, l, o)` and a counter,
whatever the length; the price is A_N(p) = C(p+N, N) − 1 key visits for a token (`costs`).

The newest key comes first: it is the layer's own input, from which the query and the residual are
made, so that it is evaluated once.

Source: post 10017 on kexue.fm.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_int, is_traced
from jaxkit._typing import Array, ArrayLike
from jaxkit.attention.streaming import _options, costs
from jaxkit.attention.streaming._forward_only import forward_only
from jaxkit.attention.streaming.state import SoftmaxState, finalize, identity, update

__all__ = ["AttentionModel", "CostWarning", "Counts", "ModelParams", "recompute"]

# Deeper models than this run on the stack machine by default.
MOST_NESTED = 8

_MESSAGE = (
    "The modes 'recompute' and 'grouped' have no reverse-mode derivative: their loops have no "
    "static length, and what a backward pass needs is not kept. Take gradients in mode "
    "'layerwise' (the same function), or use jax.jvp."
)


class CostWarning(UserWarning):
    """A call will visit more keys than its limit."""


class ModelParams(NamedTuple):
    """Parameters of an `AttentionModel`.

    Attributes:
      embed: what `embed` takes; any pytree.
      layers: a layer's parameters, with the layers on the first axis of every leaf.
    """

    embed: Any
    layers: Any


class AttentionModel(NamedTuple):
    """N attention layers as functions of one position: `x_i ← F_n(x_i, attn_n(x_0 … x_i))`.

    No function has batch axes; use `jax.vmap` around whatever runs the model. `position` is an
    int32 scalar, for embeddings or rotations.

    Attributes:
      embed: `(params.embed, token, position) -> x [dim]`.
      query: `(layer, x, position) -> q [heads, key_dim]`.
      key_value: `(layer, x, position) -> (k [groups, key_dim], v [groups, value_dim])`.
      block: `(layer, x, out [heads, value_dim]) -> x [dim]`: projection, residual, MLP.
      num_layers: N.
      scale: of the scores. Default: 1/√key_dim.
      window: every query reads its last so many positions. Default: all.
    """

    embed: Callable[[Any, Array, Array], Array]
    query: Callable[[Any, Array, Array], Array]
    key_value: Callable[[Any, Array, Array], tuple[Array, Array]]
    block: Callable[[Any, Array, Array], Array]
    num_layers: int
    scale: float | None = None
    window: int | None = None


class Counts(NamedTuple):
    """What a run did: keys scored, and blocks evaluated; integers of the default width."""

    visits: Array
    blocks: Array

    def plus(self, visits: ArrayLike, blocks: ArrayLike) -> "Counts":
        """The counts with more of both."""
        dtype = self.visits.dtype
        return Counts(
            self.visits + jnp.asarray(visits, dtype), self.blocks + jnp.asarray(blocks, dtype)
        )

    @classmethod
    def zero(cls) -> "Counts":
        """Nothing done yet."""
        zero = jnp.zeros((), jnp.asarray(0).dtype)
        return cls(zero, zero)


class Shapes(NamedTuple):
    """Shapes and dtypes of one position, found without computing anything."""

    x: jax.ShapeDtypeStruct
    q: jax.ShapeDtypeStruct
    k: jax.ShapeDtypeStruct
    v: jax.ShapeDtypeStruct
    dtype: Any
    scale: float


def layer(layers: Any, index: ArrayLike) -> Any:
    """Parameters of one layer."""
    if isinstance(index, int):
        return jax.tree.map(lambda w: w[index], layers)
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, 0, False), layers)


def check_model(model: AttentionModel, params: ModelParams, tokens: Any) -> Shapes:
    """Check that the model's functions fit one another, and say what they give."""
    check_int("num_layers", model.num_layers, least=1)
    if model.window is not None:
        check_int("window", model.window, least=1)
    for w in jax.tree.leaves(params.layers):
        if jnp.ndim(w) < 1 or w.shape[0] != model.num_layers:
            raise ValueError(
                f"params.layers must have the {model.num_layers} layers on the first axis of "
                f"every array; got shape {jnp.shape(w)}."
            )
    leaves = jax.tree.leaves(tokens)
    if not leaves or any(jnp.ndim(t) < 1 or t.shape[0] < 1 for t in leaves):
        raise ValueError("tokens must have at least one position on the first axis; got none.")
    place = jax.ShapeDtypeStruct((), jnp.int32)
    token = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape[1:], t.dtype), tokens)
    one = jax.eval_shape(lambda w: layer(w, 0), params.layers)
    x = jax.eval_shape(model.embed, params.embed, token, place)
    q = jax.eval_shape(model.query, one, x, place)
    k, v = jax.eval_shape(model.key_value, one, x, place)
    if q.ndim != 2 or k.ndim != 2 or v.ndim != 2 or q.shape[1] != k.shape[1]:
        raise ValueError(
            "query and key_value must give [heads, key_dim], [groups, key_dim] and "
            f"[groups, value_dim]; got {q.shape}, {k.shape} and {v.shape}."
        )
    if k.shape[0] != v.shape[0] or q.shape[0] % k.shape[0]:
        raise ValueError(
            "query must give a multiple of the heads of key_value, which must agree; "
            f"got {q.shape[0]}, {k.shape[0]} and {v.shape[0]} heads."
        )
    out = jax.ShapeDtypeStruct((q.shape[0], v.shape[1]), x.dtype)
    y = jax.eval_shape(model.block, one, x, out)
    if (y.shape, y.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"block must give what it takes, {x.shape} {x.dtype}; got {y.shape} {y.dtype}."
        )
    scale = _options.check_scale(model.scale, q.shape[1])
    return Shapes(x, q, k, v, _options.work_dtype(x, q, k, v), float(scale))


def read_key(shapes: Shapes, state: SoftmaxState, q: Array, k: Array, v: Array) -> SoftmaxState:
    """Update the state [H] of a query [H, dk] with one key [G, dk] and its value [G, dv]."""
    each = q.shape[0] // k.shape[0]
    q = q.astype(shapes.dtype) * jnp.asarray(shapes.scale, shapes.dtype)
    k = jnp.repeat(k.astype(shapes.dtype), each, axis=0)
    v = jnp.repeat(v.astype(shapes.dtype), each, axis=0)
    return update(state, (q * k).sum(-1), v)


def _blank(shapes: Shapes) -> tuple[Array, Array, SoftmaxState]:
    """An empty frame: query, layer input, state."""
    return (
        jnp.zeros(shapes.q.shape, shapes.q.dtype),
        jnp.zeros(shapes.x.shape, shapes.x.dtype),
        identity(shapes.q.shape[:1], shapes.v.shape[1], dtype=shapes.dtype),
    )


def _steps(model: AttentionModel, position: Array) -> Array:
    """How many keys a query at this position reads."""
    return position + 1 if model.window is None else jnp.minimum(position + 1, model.window)


# (position) -> the input of the lowest layer there.
Source = Callable[[Array], Array]


def nested(
    model: AttentionModel,
    shapes: Shapes,
    layers: list[Any],
    source: Source,
    position: Array,
    counts: Counts,
) -> tuple[Array, Counts]:
    """The top layer's output at one position, as loops inside loops, one for each layer."""

    def value(n: int, i: Array, counts: Counts) -> tuple[Array, Counts]:
        if n == 0:
            return source(i), counts
        params = layers[n - 1]

        def visit(t: Array, carry: Any) -> Any:
            q, x, state, counts = carry
            j = i - t
            below, counts = value(n - 1, j, counts)
            # The first key is the layer's own input.
            q, x = jax.lax.cond(
                t == 0, lambda: (model.query(params, below, i), below), lambda: (q, x)
            )
            state = read_key(shapes, state, q, *model.key_value(params, below, j))
            return q, x, state, counts.plus(1, 0)

        carry = (*_blank(shapes), counts)
        _, x, state, counts = jax.lax.fori_loop(0, _steps(model, i), visit, carry)
        out = finalize(state, dtype=shapes.x.dtype).out
        return model.block(params, x, out), counts.plus(0, 1)

    return value(len(layers), position, counts)


# What the stack machine does next.
_LEAF, _CALL, _VISIT, _FINISH = range(4)


class _Machine(NamedTuple):
    """A frame for every layer (index n − 1), the running layer n, and what the one below gave."""

    todo: Array
    n: Array
    value: Array  # [dim]
    i: Array  # [N + 1]: the position that each layer, and the embedding, works at
    t: Array  # [N]: keys read
    q: Array  # [N, H, dk]
    x: Array  # [N, dim]
    state: SoftmaxState  # [N, H]
    counts: Counts


def stack_machine(
    model: AttentionModel,
    shapes: Shapes,
    layers: Any,
    depth: int,
    source: Source,
    position: Array,
    counts: Counts,
) -> tuple[Array, Counts]:
    """The same in a single while loop: the program's size does not depend on the depth."""
    q, x, state = _blank(shapes)

    def spread(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (depth, *leaf.shape))

    def at(frames: Any, n: Array) -> Any:
        return jax.tree.map(lambda f: jax.lax.dynamic_index_in_dim(f, n - 1, 0, False), frames)

    def put(frames: Any, new: Any, n: Array) -> Any:
        return jax.tree.map(
            lambda f, leaf: jax.lax.dynamic_update_index_in_dim(f, leaf, n - 1, 0), frames, new
        )

    def below(s: _Machine, j: Array) -> _Machine:
        """Ask the layer below for position j."""
        n = s.n - 1
        i = jax.lax.dynamic_update_index_in_dim(s.i, j, n, 0)
        todo = jnp.where(n == 0, _LEAF, _CALL).astype(jnp.int32)
        return s._replace(n=n, i=i, todo=todo)

    def leaf(s: _Machine) -> _Machine:
        value = source(s.i[0])
        return s._replace(value=value, n=s.n + 1, todo=jnp.asarray(_VISIT, jnp.int32))

    def call(s: _Machine) -> _Machine:
        s = s._replace(
            t=jax.lax.dynamic_update_index_in_dim(s.t, jnp.zeros((), jnp.int32), s.n - 1, 0),
            state=put(s.state, state, s.n),
        )
        return below(s, s.i[s.n])

    def visit(s: _Machine) -> _Machine:
        params = layer(layers, s.n - 1)
        i, t = s.i[s.n], s.t[s.n - 1]
        q, x = jax.lax.cond(
            t == 0,
            lambda: (model.query(params, s.value, i), s.value),
            lambda: (at(s.q, s.n), at(s.x, s.n)),
        )
        k, v = model.key_value(params, s.value, i - t)
        t = t + 1
        s = s._replace(
            q=put(s.q, q, s.n),
            x=put(s.x, x, s.n),
            state=put(s.state, read_key(shapes, at(s.state, s.n), q, k, v), s.n),
            t=put(s.t, t, s.n),
            counts=s.counts.plus(1, 0),
        )
        done = s._replace(todo=jnp.asarray(_FINISH, jnp.int32))
        more = below(s, i - t)
        return jax.tree.map(lambda a, b: jnp.where(t < _steps(model, i), a, b), more, done)

    def finish(s: _Machine) -> _Machine:
        out = finalize(at(s.state, s.n), dtype=shapes.x.dtype).out
        value = model.block(layer(layers, s.n - 1), at(s.x, s.n), out)
        return s._replace(
            value=value,
            n=s.n + 1,
            todo=jnp.asarray(_VISIT, jnp.int32),
            counts=s.counts.plus(0, 1),
        )

    start = _Machine(
        todo=jnp.asarray(_CALL, jnp.int32),
        n=jnp.asarray(depth, jnp.int32),
        value=x,
        i=jnp.full((depth + 1,), position, jnp.int32),
        t=jnp.zeros((depth,), jnp.int32),
        q=spread(q),
        x=spread(x),
        state=jax.tree.map(spread, state),
        counts=counts,
    )
    branches = (leaf, call, visit, finish)
    end = jax.lax.while_loop(
        lambda s: s.n <= depth, lambda s: jax.lax.switch(s.todo, branches, s), start
    )
    return end.value, end.counts


def warn_cost(visits: int, limit: float | None, what: str) -> None:
    """Warn if a token will visit more keys than the limit."""
    if limit is not None and visits > limit:
        warnings.warn(
            f"{what} will make {visits:,} key visits for one token, more than limit={limit:,}; "
            "the mode 'kv_cache' makes N p of them.",
            CostWarning,
            stacklevel=3,
        )


def check_limit(limit: Any) -> float | None:
    """The limit, a number of visits, or None."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or math.isnan(limit):
        raise TypeError(f"limit must be a number of key visits or None; got {limit!r}.")
    if limit < 0:
        raise ValueError(f"limit must be at least 0; got {limit}.")
    return limit


def pick(implementation: str, depth: int) -> str:
    """`nested` or `stack`."""
    check_choice("implementation", implementation, ("auto", "nested", "stack"))
    if implementation == "auto":
        return "nested" if depth <= MOST_NESTED else "stack"
    return implementation


def recompute(
    model: AttentionModel,
    params: ModelParams,
    tokens: Any,
    position: ArrayLike | None = None,
    *,
    implementation: str = "auto",
    limit: float | None = 1e8,
) -> tuple[Array, Counts]:
    """The model's output at one position in memory that does not depend on it.

    N nested loops with traced bounds, or one while loop over explicit frames. Time grows like
    p^N / N!. No reverse mode; `jax.jvp`, `jax.vmap` and `jax.jit` work.

    Args:
      model: the layers.
      params: their parameters.
      tokens: an array, or a pytree of arrays, with positions on the first axis; later positions
        than the one asked for are not read.
      position: i, an integer, traced or not. Default: the last position. Where a traced one is
        none of the positions, the output is NaN.
      implementation: "nested" (N statically nested loops), "stack" (a program of one size for any
        N), or "auto": nested up to 8 layers.
      limit: warn if more key visits than this are to be expected; None never warns. For a traced
        position the expectation is that of the last one.

    Returns:
      `(x [dim], counts)`: the output of the top layer, and what was done, exactly. Counts beyond
      2^31 wrap unless 64-bit types are on.

    Raises:
      ValueError: the model's functions do not fit one another, `position` is none of the
        positions, or a gradient is taken in reverse mode.

    Example:
      >>> import jax
      >>> from jaxkit.attention.streaming.toy import init_toy, toy_model
      >>> model = toy_model(2)
      >>> params = init_toy(jax.random.key(0), model, vocab=5, dim=8)
      >>> tokens = jax.numpy.arange(5)
      >>> x, counts = recompute(model, params, tokens)
      >>> print(x.shape, counts.visits, counts.blocks)
      (8,) 20 6

    Source: post 10017 on kexue.fm.
    """
    shapes = check_model(model, params, tokens)
    length = jax.tree.leaves(tokens)[0].shape[0]
    known = length
    if position is None:
        position = length - 1
    if not is_traced(position):
        place = check_int("position", position, least=0)
        if place >= length:
            raise ValueError(f"position must be below the {length} positions; got {place}.")
        known = place + 1
    elif jnp.ndim(position) or not jnp.issubdtype(jnp.result_type(position), jnp.integer):
        raise TypeError(f"position must be an integer; got {position}.")
    at = jnp.asarray(position, jnp.int32)
    N = model.num_layers
    implementation = pick(implementation, N)
    expected = costs.windowed_visits(N, known, known if model.window is None else model.window)
    warn_cost(expected, check_limit(limit), f"recompute with {N} layers at p = {known}")

    def source(i: Array) -> Array:
        token = jax.tree.map(lambda t: jax.lax.dynamic_index_in_dim(t, i, 0, False), tokens)
        return model.embed(params.embed, token, i)

    if implementation == "nested":
        layers = [layer(params.layers, n) for n in range(N)]
        x, counts = nested(model, shapes, layers, source, at, Counts.zero())
    else:
        x, counts = stack_machine(model, shapes, params.layers, N, source, at, Counts.zero())
    x = jnp.where((at >= 0) & (at < length), x, jnp.full_like(x, jnp.nan))
    return forward_only(x, _MESSAGE), counts
