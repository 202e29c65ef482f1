"""One model, five ways to decode it: what is kept between tokens, and what is computed again.

| mode          | kept after p tokens          | key visits for the next token  |
|---------------|------------------------------|--------------------------------|
| `kv_cache`    | k, v of all layers           | N p                            |
| `input_cache` | the inputs of all layers     | N p, keys are made again       |
| `layerwise`   | tokens; one layer at a time  | N p (p+1) / 2                  |
| `grouped`     | the input of every c-th layer| (N/c) (C(p+c, c) − 1)          |
| `recompute`   | tokens                       | C(p+N, N) − 1                  |

All compute the same function: memory is bought with time, and no information is lost.

Source: post 10017 on kexue.fm; Rabe, Staats 2021 (arXiv 2112.05682).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_int
from jaxkit._typing import Array
from jaxkit.attention.streaming import costs
from jaxkit.attention.streaming._forward_only import forward_only
from jaxkit.attention.streaming.block import blockwise_attention
from jaxkit.attention.streaming.decode import split_decode
from jaxkit.attention.streaming.recompute import (
    _MESSAGE,
    AttentionModel,
    Counts,
    ModelParams,
    Shapes,
    check_limit,
    check_model,
    layer,
    nested,
    pick,
    stack_machine,
    warn_cost,
)

__all__ = ["DecodeState", "Decoder", "layerwise"]


class DecodeState(NamedTuple):
    """Everything that is kept between two tokens.

    Attributes:
      tokens: the tokens so far, in a buffer `[capacity, ...]`; of modes that read them again.
      cache: what the mode keeps of the layers, in buffers of that length.
      position: the next position, int32.
      counts: key visits and block evaluations so far.
    """

    tokens: Any
    cache: Any
    position: Array
    counts: Counts


def layerwise(
    model: AttentionModel,
    params: ModelParams,
    tokens: Any,
    *,
    block_q: int = 128,
    block_k: int = 256,
    keep_inputs: bool = False,
) -> Any:
    """All positions at once, layer by layer: O(L d) memory for any N, O(N L²) time.

    The form to train with: it is differentiable, and `blockwise_attention` holds no matrix of
    scores.

    Args:
      model: the layers.
      params: their parameters.
      tokens: an array, or a pytree of arrays, with positions on the first axis.
      block_q: queries in a tile.
      block_k: keys in a tile.
      keep_inputs: also return the inputs of all layers `[layers, length, dim]`.

    Returns:
      Outputs of the top layer `[length, dim]`; with `keep_inputs` a pair.

    Raises:
      ValueError: the model's functions do not fit one another, or a tile is not positive.

    Example:
      >>> import jax
      >>> from jaxkit.attention.streaming.toy import init_toy, toy_model
      >>> model = toy_model(2)
      >>> params = init_toy(jax.random.key(0), model, vocab=5, dim=8)
      >>> layerwise(model, params, jax.numpy.arange(5)).shape
      (5, 8)
    """
    shapes = check_model(model, params, tokens)
    length = jax.tree.leaves(tokens)[0].shape[0]
    places = jnp.arange(length, dtype=jnp.int32)
    x = jax.vmap(lambda t, i: model.embed(params.embed, t, i))(tokens, places)

    def step(x: Array, one: Any) -> tuple[Array, Array | None]:
        q = jax.vmap(lambda x, i: model.query(one, x, i))(x, places)
        k, v = jax.vmap(lambda x, i: model.key_value(one, x, i))(x, places)
        out = blockwise_attention(
            q,
            k,
            v,
            causal=True,
            window=model.window,
            scale=shapes.scale,
            block_q=block_q,
            block_k=block_k,
            out_dtype=shapes.x.dtype,
        ).out
        return jax.vmap(lambda x, o: model.block(one, x, o))(x, out), x if keep_inputs else None

    x, inputs = jax.lax.scan(step, x, params.layers)
    return (x, inputs) if keep_inputs else x


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Token-by-token decoding of a model in one of the modes.

    Args:
      model: the layers.
      mode: `kv_cache`, `input_cache`, `layerwise`, `grouped` or `recompute`; see the module.
      group: c, layers whose inner activations are recomputed together; of `grouped` only.
      implementation: of the recomputing modes: "nested", "stack" or "auto" (by depth).
      limit: warn if a token may cost more key visits than this; None never warns.
      splits: pieces in which `kv_cache` and `input_cache` read their keys.

    Raises:
      ValueError: unknown mode; c is missing, out of range, or does not divide N.

    Example:
      >>> import jax
      >>> from jaxkit.attention.streaming.toy import init_toy, toy_model
      >>> model = toy_model(2)
      >>> params = init_toy(jax.random.key(0), model, vocab=5, dim=8)
      >>> tokens = jax.numpy.arange(5)
      >>> for mode in ("kv_cache", "recompute"):
      ...     xs, state = Decoder(model, mode).run(params, tokens)
      ...     print(mode, xs.shape, state.counts.visits)
      kv_cache (5, 8) 30
      recompute (5, 8) 50

    Source: post 10017 on kexue.fm.
    """

    model: AttentionModel
    mode: str = "kv_cache"
    group: int | None = None
    implementation: str = "auto"
    limit: float | None = 1e8
    splits: int = 1

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, costs.MODES)
        layers = check_int("num_layers", self.model.num_layers, least=1)
        check_int("splits", self.splits, least=1)
        check_limit(self.limit)
        pick(self.implementation, layers)
        # Checks mode against group.
        costs.mode_visits(self.mode, layers, 1, group=self.group)

    @property
    def depth(self) -> int:
        """Layers that are recomputed together."""
        return self.model.num_layers if self.group is None else self.group

    @property
    def keeps_tokens(self) -> bool:
        """Whether a step reads the tokens before it again, and keeps nothing else."""
        return self.mode in ("layerwise", "recompute") or self.group == self.model.num_layers

    def init_state(self, params: ModelParams, token: Any, capacity: int) -> DecodeState:
        """The state before the first token.

        Args:
          params: parameters.
          token: one token, or its `ShapeDtypeStruct`: its shape and dtype matter, not its value.
          capacity: positions there is room for.

        Returns:
          The state, all buffers zero.
        """
        capacity = check_int("capacity", capacity, least=1)
        one = jax.eval_shape(lambda t: t, token)
        buffer = jax.tree.map(lambda t: jax.ShapeDtypeStruct((capacity, *t.shape), t.dtype), one)
        shapes = check_model(self.model, params, buffer)
        N = self.model.num_layers
        cache: Any = ()
        if self.mode == "kv_cache":
            cache = tuple(jnp.zeros((N, capacity, *s.shape), s.dtype) for s in (shapes.k, shapes.v))
        elif self.mode in ("input_cache", "grouped") and not self.keeps_tokens:
            kept = N if self.mode == "input_cache" else N // self.depth
            cache = jnp.zeros((kept, capacity, *shapes.x.shape), shapes.x.dtype)
        tokens = jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), buffer)
        position = jnp.zeros((), jnp.int32)
        return DecodeState(tokens if self.keeps_tokens else (), cache, position, Counts.zero())

    def step(
        self, params: ModelParams, state: DecodeState, token: Any
    ) -> tuple[Array, DecodeState]:
        """The top layer's output at the next position.

        Args:
          params: parameters.
          state: what was kept.
          token: the token at `state.position`. Beyond the capacity the output is NaN.

        Returns:
          `(x [dim], state)`.

        Raises:
          ValueError: the state is not of this mode, or, in recomputing modes, a gradient is taken
            in reverse mode.
        """
        buffers = jax.tree.leaves((state.tokens, state.cache))
        kept = 0 if self.keeps_tokens else 2 if self.mode == "kv_cache" else 1
        if not buffers or len(jax.tree.leaves(state.cache)) != kept:
            raise ValueError(
                f"state must be made by init_state of a decoder of mode {self.mode!r}."
            )
        i = state.position
        tokens = (
            jax.tree.map(lambda b, t: _write(b, jnp.asarray(t, b.dtype), i), state.tokens, token)
            if self.keeps_tokens
            else ()
        )
        one = jax.tree.map(lambda t: jnp.asarray(t)[None], token)
        shapes = check_model(self.model, params, one)
        run = {
            "kv_cache": self._kv_cache,
            "input_cache": self._input_cache,
            "layerwise": self._layerwise,
            "grouped": self._grouped,
            "recompute": self._grouped,
        }[self.mode]
        x, cache, counts = run(params, shapes, tokens, state, token)
        capacity = buffers[0].shape[0 if self.keeps_tokens else 1]
        x = jnp.where(i < capacity, x, jnp.full_like(x, jnp.nan))
        return x, DecodeState(tokens, cache, i + 1, counts)

    def run(
        self, params: ModelParams, tokens: Any, state: DecodeState | None = None
    ) -> tuple[Array, DecodeState]:
        """All positions, one after another.

        Args:
          params: parameters.
          tokens: with positions on the first axis.
          state: to go on from. Default: an empty one with room for these tokens.

        Returns:
          `(xs [length, dim], state)`.
        """
        leaves = jax.tree.leaves(tokens)
        if not leaves or any(jnp.ndim(t) < 1 or t.shape[0] < 1 for t in leaves):
            raise ValueError("tokens must have at least one position on the first axis; got none.")
        if state is None:
            token = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape[1:], t.dtype), tokens)
            state = self.init_state(params, token, leaves[0].shape[0])

        def step(state: Any, token: Any) -> tuple[Any, Array]:
            x, state = self.step(params, state, token)
            return state, x

        last, xs = jax.lax.scan(step, state, tokens)
        return xs, last

    def _seen(self, i: Array) -> Array:
        """Keys that a query at position i reads."""
        window = self.model.window
        return i + 1 if window is None else jnp.minimum(i + 1, window)

    def _attend(self, shapes: Shapes, q: Array, k: Array, v: Array, i: Array) -> Array:
        return split_decode(
            q,
            k,
            v,
            splits=min(self.splits, k.shape[0]),
            kv_length=i + 1,
            window=self.model.window,
            scale=shapes.scale,
            out_dtype=shapes.x.dtype,
        ).out

    def _kv_cache(
        self, params: ModelParams, shapes: Shapes, tokens: Any, state: DecodeState, token: Any
    ) -> tuple[Array, Any, Counts]:
        model, i = self.model, state.position
        x = model.embed(params.embed, token, i)

        def one(x: Array, part: Any) -> tuple[Array, Any]:
            weights, k_cache, v_cache = part
            k, v = model.key_value(weights, x, i)
            k_cache, v_cache = _write(k_cache, k, i), _write(v_cache, v, i)
            out = self._attend(shapes, model.query(weights, x, i), k_cache, v_cache, i)
            return model.block(weights, x, out), (k_cache, v_cache)

        x, cache = jax.lax.scan(one, x, (params.layers, *state.cache))
        N = model.num_layers
        return x, cache, state.counts.plus(N * self._seen(i), N)

    def _input_cache(
        self, params: ModelParams, shapes: Shapes, tokens: Any, state: DecodeState, token: Any
    ) -> tuple[Array, Any, Counts]:
        model, i = self.model, state.position
        x = model.embed(params.embed, token, i)
        places = jnp.arange(state.cache.shape[1], dtype=jnp.int32)

        def one(x: Array, part: Any) -> tuple[Array, Any]:
            weights, inputs = part
            inputs = _write(inputs, x, i)
            k, v = jax.vmap(lambda x, j: model.key_value(weights, x, j))(inputs, places)
            out = self._attend(shapes, model.query(weights, x, i), k, v, i)
            return model.block(weights, x, out), inputs

        x, cache = jax.lax.scan(one, x, (params.layers, state.cache))
        N = model.num_layers
        return x, cache, state.counts.plus(N * self._seen(i), N)

    def _layerwise(
        self, params: ModelParams, shapes: Shapes, tokens: Any, state: DecodeState, token: Any
    ) -> tuple[Array, Any, Counts]:
        i, N = state.position, self.model.num_layers
        # Positions behind the newest token are in the buffer, but no earlier one sees them.
        x = layerwise(self.model, params, tokens)
        x = jax.lax.dynamic_index_in_dim(x, i, 0, False)
        # min(j, w) keys for each position j = 1 … p.
        w = self._seen(i)
        visits = w * (w + 1) // 2 + (i + 1 - w) * w
        return x, (), state.counts.plus(N * visits, N * (i + 1))

    def _grouped(
        self, params: ModelParams, shapes: Shapes, tokens: Any, state: DecodeState, token: Any
    ) -> tuple[Array, Any, Counts]:
        model, i, N, depth = self.model, state.position, self.model.num_layers, self.depth
        capacity = jax.tree.leaves((tokens, state.cache))[0].shape[0 if self.keeps_tokens else 1]
        window = capacity if model.window is None else model.window
        expected = N // depth * costs.windowed_visits(depth, capacity, window)
        warn_cost(expected, self.limit, f"mode {self.mode!r} with {N} layers at p = {capacity}")
        how = pick(self.implementation, depth)

        def top(base: Any, source: Any, counts: Counts) -> tuple[Array, Counts]:
            if how == "nested":
                layers = [layer(params.layers, base + n) for n in range(depth)]
                return nested(model, shapes, layers, source, i, counts)
            cut = lambda w: jax.lax.dynamic_slice_in_dim(w, base, depth, 0)
            layers = jax.tree.map(cut, params.layers)
            return stack_machine(model, shapes, layers, depth, source, i, counts)

        if self.keeps_tokens:

            def embed(j: Array) -> Array:
                at = jax.tree.map(lambda t: jax.lax.dynamic_index_in_dim(t, j, 0, False), tokens)
                return model.embed(params.embed, at, j)

            x, counts = top(0, embed, state.counts)
            return forward_only(x, _MESSAGE), (), counts

        def group(g: Array, carry: Any) -> Any:
            x, cache, counts = carry
            at = (g, i, *(jnp.zeros((), jnp.int32) for _ in x.shape))
            cache = jax.lax.dynamic_update_slice(cache, x[None, None], at)

            def kept(j: Array) -> Array:
                start = (g, j, *(jnp.zeros((), jnp.int32) for _ in x.shape))
                return jax.lax.dynamic_slice(cache, start, (1, 1, *x.shape))[0, 0]

            x, counts = top(g * depth, kept, counts)
            return x, cache, counts

        start = (model.embed(params.embed, token, i), state.cache, state.counts)
        x, cache, counts = jax.lax.fori_loop(jnp.int32(0), jnp.int32(N // depth), group, start)
        return forward_only(x, _MESSAGE), cache, counts


def _write(buffer: Array, row: Array, i: Array) -> Array:
    """The buffer with one row replaced."""
    return jax.lax.dynamic_update_index_in_dim(buffer, row.astype(buffer.dtype), i, 0)
