"""A sequence model over state-space (or recurrent) layers: classification and generation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit._typing import Array, Bool, DType, Float, Int, Key
from jaxkit.ssm.layers import S4, S5, Recurrent

__all__ = ["ModelState", "SequenceBlock", "SequenceModel"]

MIXERS = ("s4", "s5", "lstm", "gru")
POOLINGS = ("mean", "last", "none")
ENCODERS = ("dense", "embedding")
NORMS = ("pre", "post")


class ModelState(NamedTuple):
    """State of a `SequenceModel` between steps.

    Attributes:
      layers: One state for each block.
      total: Sum of the features that count for the pool, `[*batch, heads]`; for `last` the latest.
      seen: How many counted, `[*batch]`.
    """

    layers: tuple[Any, ...]
    total: Array
    seen: Array


def _mixer(kind: str, heads: int, state_size: int, options: dict[str, Any]) -> Any:
    if kind == "s4":
        return S4(heads, state_size, **options)
    if kind == "s5":
        return S5(heads, state_size, **options)
    return Recurrent(heads, cell=kind, dtype=options["dtype"], rngs=options["rngs"])


class SequenceBlock(nnx.Module):
    """norm → mixer → GELU → dropout → Dense 2H → GLU → dropout → residual.

    With `norm="post"` the norm follows the residual sum instead.

    Args:
      mixer: A layer with the protocol of `jaxkit.ssm.layers`.
      heads: Width H.
      norm: `pre` or `post`.
      dropout: Rate in [0, 1).
      dtype: float32 or float64.
      rngs: Random keys.

    Raises:
      ValueError: If `norm` is unknown or `dropout` out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxkit.ssm.layers import S4
      >>> rngs = nnx.Rngs(0)
      >>> block = SequenceBlock(S4(4, 8, l_max=16, rngs=rngs), 4, rngs=rngs)
      >>> print(block(jnp.ones((2, 16, 4))).shape)
      (2, 16, 4)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396, app. D); post 10162.
    """

    def __init__(
        self,
        mixer: Any,
        heads: int,
        *,
        norm: str = "pre",
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("norm", norm, NORMS)
        check_real("dropout", dropout, least=0.0)
        if dropout >= 1:
            raise ValueError(f"dropout must be less than 1; got {dropout}.")
        self.mixer = mixer
        self.prenorm = norm == "pre"
        self.norm = nnx.LayerNorm(heads, param_dtype=dtype, rngs=rngs)
        self.dense = nnx.Linear(heads, 2 * heads, param_dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def _drop(self, x: Array, key: Key | None) -> Array:
        return x if key is None else self.dropout(x, deterministic=False, rngs=key)

    def _after(self, x: Array, mixed: Array, key: Key | None = None) -> Array:
        first, second = (None, None) if key is None else jax.random.split(key)
        hidden = self.dense(self._drop(jax.nn.gelu(mixed), first))
        x = x + self._drop(jax.nn.glu(hidden, axis=-1), second)
        return x if self.prenorm else self._norm(x)

    def _norm(self, x: Array) -> Array:
        # flax names float32 as the least type of the statistics, an implicit promotion of float64.
        with jax.numpy_dtype_promotion("standard"):
            return self.norm(x)

    def _before(self, x: Array) -> Array:
        return self._norm(x) if self.prenorm else x

    def __call__(
        self,
        x: Float[Array, "*batch length heads"],
        *,
        mask: Bool[Array, "*batch length"] | None = None,
        rate: Any = 1.0,
        key: Key | None = None,
    ) -> Float[Array, "*batch length heads"]:
        """Apply the block to a sequence; dropout is on where a `key` is given."""
        mixed = self._before(x)
        if mask is not None and self.mixer.bidirectional:
            # A causal layer cannot see the padding on the right; this one can.
            mixed = jnp.where(mask[..., None], mixed, jnp.zeros_like(mixed))
        return self._after(x, self.mixer(mixed, rate=rate), key)

    def step(self, state: Any, x: Array, *, system: Any = None) -> tuple[Array, Any]:
        """One step, without dropout."""
        mixed, state = self.mixer.step(state, self._before(x), system=system)
        return self._after(x, mixed), state

    def prefill(self, state: Any, x: Array, *, system: Any = None) -> tuple[Array, Any]:
        """Many steps at once, without dropout."""
        mixed, state = self.mixer.prefill(state, self._before(x), system=system)
        return self._after(x, mixed), state


class SequenceModel(nnx.Module):
    """Encoder, blocks, pooling and read-out, for classification or for autoregression.

    As a sequence map it convolves (`__call__`); as a stream it steps (`init_state`, `step`,
    `prefill`), pooling by a running mean, with the same result. Every weight is an `nnx.Param`, so
    `nnx.split` and `nnx.merge` make it a function of parameters that vmaps over seeds.

    Args:
      features_in: Input channels, or for `embedding` the number of tokens.
      features_out: Classes, or tokens.
      heads: Width H.
      layers: Number of blocks.
      state_size: N of the state-space layers.
      mixer: `s4`, `s5`, `lstm` or `gru`.
      kernel: Of `s4`: `dplr`, `diag` or `rtf`.
      init: Of `s4`; see `jaxkit.ssm.layers.S4`.
      l_max: The longest sequence (dplr, rtf, softmax).
      encoder: `dense` for `[*batch, length, features_in]`, `embedding` for tokens
        `[*batch, length]`.
      pooling: `mean` (masked), `last` (the last position that the mask keeps) or `none` (an
        output for every position).
      norm: `pre` or `post`.
      dropout: Rate; drawn only where a `key` is given.
      bidirectional: Let `s4` or `s5` read the future; no step mode then.
      dtype: float32 or float64.
      rngs: Random keys.
      **options: Further options of the mixing layer (`dt_min`, `dt_max`, `frozen`, …); a recurrent
        cell takes none and ignores `kernel`, `init`, `state_size` and `l_max`.

    Raises:
      ValueError: If a name is unknown or a size out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = SequenceModel(1, 10, heads=4, state_size=8, l_max=16, rngs=nnx.Rngs(0))
      >>> print(model(jnp.ones((2, 16, 1))).shape)
      (2, 10)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396, app. D); post 10162.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        heads: int = 32,
        layers: int = 2,
        state_size: int = 32,
        mixer: str = "s4",
        kernel: str = "dplr",
        init: Any = None,
        l_max: int | None = None,
        encoder: str = "dense",
        pooling: str = "mean",
        norm: str = "pre",
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_choice("mixer", mixer, MIXERS)
        check_choice("encoder", encoder, ENCODERS)
        check_choice("pooling", pooling, POOLINGS)
        self.features_in = check_int("features_in", features_in, least=1)
        self.features_out = check_int("features_out", features_out, least=1)
        self.heads = check_int("heads", heads, least=1)
        check_int("layers", layers, least=1)
        self.pooling = pooling
        self.embeds = encoder == "embedding"
        self.dtype = jnp.dtype(dtype)
        common = {**options, "dtype": dtype, "rngs": rngs}
        if mixer == "s4":
            common |= {
                "kernel": kernel,
                "init": init,
                "l_max": l_max,
                "bidirectional": bidirectional,
            }
        elif mixer == "s5":
            common |= {"bidirectional": bidirectional}
        elif bidirectional or options:
            given = "bidirectional" if bidirectional else sorted(options)[0]
            raise ValueError(f"{given} must not be given for mixer {mixer!r}.")
        if self.embeds:
            self.encoder: Any = nnx.Embed(features_in, heads, param_dtype=dtype, rngs=rngs)
        else:
            self.encoder = nnx.Linear(features_in, heads, param_dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            SequenceBlock(
                _mixer(mixer, heads, state_size, common),
                heads,
                norm=norm,
                dropout=dropout,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(layers)
        )
        self.decoder = nnx.Linear(heads, features_out, param_dtype=dtype, rngs=rngs)

    def _encode(self, x: Array, *, axes: int) -> Array:
        if self.embeds:
            if not jnp.issubdtype(x.dtype, jnp.integer):
                raise TypeError(f"x must be integer tokens; got dtype {x.dtype}.")
        else:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise TypeError(f"x must be real floating-point numbers; got dtype {x.dtype}.")
            axes += 1
            if x.ndim < axes or x.shape[-1] != self.features_in:
                raise ValueError(
                    f"x must have features_in = {self.features_in} channels last and at least "
                    f"{axes} axes; got shape {tuple(x.shape)}."
                )
        if x.ndim < axes:
            raise ValueError(f"x must have at least {axes} axes; got shape {tuple(x.shape)}.")
        return self.encoder(x)

    def __call__(
        self,
        x: Array,
        *,
        mask: Bool[Array, "*batch length"] | None = None,
        rate: Any = 1.0,
        key: Key | None = None,
    ) -> Array:
        """Logits `[*batch, features_out]`, or `[*batch, length, features_out]` without pooling.

        Args:
          x: `[*batch, length, features_in]`, or tokens `[*batch, length]`.
          mask: True where a position counts. A sequence of which nothing counts gives the logits
            of zero features.
          rate: Sampling rate ratio: 2 for the same signals with half as many samples.
          key: Random key of dropout; without one there is no dropout.

        Returns:
          Logits.

        Raises:
          TypeError: If `x` has the wrong kind of numbers.
          ValueError: If shapes do not fit.
        """
        hidden = self._encode(x, axes=1)
        if mask is not None and mask.shape != hidden.shape[:-1]:
            raise ValueError(f"mask must have shape {hidden.shape[:-1]}; got {mask.shape}.")
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        for block, block_key in zip(self.blocks, keys, strict=True):
            hidden = block(hidden, mask=mask, rate=rate, key=block_key)
        if self.pooling == "none":
            return self.decoder(hidden)
        return self.decoder(self._pool(hidden, mask))

    def _pool(self, hidden: Array, mask: Array | None) -> Array:
        total, count = self._gather(hidden, mask)
        return self._pooled(total, count)

    def _gather(self, hidden: Array, mask: Array | None) -> tuple[Array, Array]:
        """Sum (or last) of the features that count, and how many count, over the length."""
        if mask is None:
            mask = jnp.ones(hidden.shape[:-1], bool)
        weight = mask.astype(hidden.dtype)
        count = jnp.sum(weight, axis=-1)
        if self.pooling == "last":
            position = jnp.arange(hidden.shape[-2])
            last = jnp.max(jnp.where(mask, position.reshape((1,) * (mask.ndim - 1) + (-1,)), 0), -1)
            total = jnp.take_along_axis(hidden, last[..., None, None], axis=-2)[..., 0, :]
            return jnp.where(count[..., None] > 0, total, jnp.zeros_like(total)), count
        return jnp.sum(hidden * weight[..., None], axis=-2), count

    def _pooled(self, total: Array, count: Array) -> Array:
        if self.pooling == "last":
            return total
        return total / jnp.maximum(count, jnp.ones_like(count))[..., None]

    def discretize(self, *, rate: Any = 1.0) -> tuple[Any, ...]:
        """The recurrences of all blocks, derived once for many steps.

        Raises:
          ValueError: If the model is bidirectional.
        """
        return tuple(block.mixer.discretize(rate=rate) for block in self.blocks)

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> ModelState:
        """The state before the first step.

        Raises:
          ValueError: If the model is bidirectional.
        """
        return ModelState(
            tuple(block.mixer.init_state(batch_shape) for block in self.blocks),
            jnp.zeros((*batch_shape, self.heads), self.dtype),
            jnp.zeros(batch_shape, self.dtype),
        )

    def step(
        self,
        state: ModelState,
        x: Array,
        *,
        mask: Bool[Array, "*batch"] | None = None,
        systems: tuple[Any, ...] | None = None,
    ) -> tuple[Array, ModelState]:
        """One position: logits of what has been seen so far, and the state after it.

        With pooling the last logits are those of `__call__` on the whole sequence.

        Args:
          state: From `init_state`, `step` or `prefill`.
          x: `[*batch, features_in]`, or tokens `[*batch]`.
          mask: True where this position counts for the pool.
          systems: From `discretize`; derived anew if not given.

        Returns:
          `(logits [*batch, features_out], state)`.

        Raises:
          TypeError: If `x` has the wrong kind of numbers.
          ValueError: If the model is bidirectional or shapes do not fit.
        """
        systems = self.discretize() if systems is None else systems
        hidden = self._encode(x, axes=0)
        states = []
        for block, old, system in zip(self.blocks, state.layers, systems, strict=True):
            hidden, new = block.step(old, hidden, system=system)
            states.append(new)
        keep = None if mask is None else mask[..., None]
        pool = self._merge(state, *self._gather(hidden[..., None, :], keep))
        out = hidden if self.pooling == "none" else self._pooled(*pool)
        return self.decoder(out), ModelState(tuple(states), *pool)

    def _merge(self, state: ModelState, total: Array, count: Array) -> tuple[Array, Array]:
        if self.pooling == "last":
            total = jnp.where(count[..., None] > 0, total, state.total)
        else:
            total = state.total + total
        return total, state.seen + count

    def prefill(
        self,
        state: ModelState,
        x: Array,
        *,
        mask: Bool[Array, "*batch length"] | None = None,
        systems: tuple[Any, ...] | None = None,
    ) -> tuple[Array, ModelState]:
        """Many positions at once, from any state.

        Args:
          state: From `init_state`, `step` or `prefill`.
          x: `[*batch, length, features_in]`, or tokens `[*batch, length]`.
          mask: True where a position counts for the pool.
          systems: From `discretize`; derived anew if not given.

        Returns:
          `(logits, state)`: with pooling the logits of everything seen, `[*batch, features_out]`;
          without, those of every position.

        Raises:
          TypeError: If `x` has the wrong kind of numbers.
          ValueError: If the model is bidirectional or shapes do not fit.
        """
        systems = self.discretize() if systems is None else systems
        hidden = self._encode(x, axes=1)
        states = []
        for block, old, system in zip(self.blocks, state.layers, systems, strict=True):
            hidden, new = block.prefill(old, hidden, system=system)
            states.append(new)
        pool = self._merge(state, *self._gather(hidden, mask))
        out = hidden if self.pooling == "none" else self._pooled(*pool)
        return self.decoder(out), ModelState(tuple(states), *pool)

    def generate(
        self,
        prompt: Int[Array, "*batch length"],
        steps: int,
        *,
        key: Key,
        temperature: float = 1.0,
    ) -> Int[Array, "*batch steps"]:
        """Continue a prompt of tokens step by step, at a cost per token that never grows.

        Args:
          prompt: Tokens, at least one.
          steps: How many tokens to draw.
          key: A random key.
          temperature: Divides the logits; 0 takes the largest.

        Returns:
          The new tokens, in the dtype of `prompt`.

        Raises:
          ValueError: If the model pools, does not embed tokens, is bidirectional, or an argument
            is out of range.
        """
        if self.pooling != "none" or not self.embeds:
            raise ValueError(
                "generate needs encoder='embedding' and pooling='none'; "
                f"got pooling={self.pooling!r}."
            )
        steps = check_int("steps", steps, least=1)
        check_real("temperature", temperature, least=0.0)
        if prompt.ndim < 1 or prompt.shape[-1] < 1:
            raise ValueError(f"prompt must hold at least one token; got shape {prompt.shape}.")
        systems = self.discretize()
        logits, state = self.prefill(self.init_state(prompt.shape[:-1]), prompt, systems=systems)

        def draw(logits: Array, key: Key) -> Array:
            if temperature == 0:
                return jnp.argmax(logits, axis=-1).astype(prompt.dtype)
            return jax.random.categorical(key, logits / temperature).astype(prompt.dtype)

        first, *rest = jax.random.split(key, steps)
        token = draw(logits[..., -1, :], first)
        if not rest:
            return token[..., None]

        graph, values = nnx.split(self)

        def body(carry, key):
            token, state = carry
            logits, state = nnx.merge(graph, values).step(state, token, systems=systems)
            token = draw(logits, key)
            return (token, state), token

        _, tokens = jax.lax.scan(body, (token, state), jnp.stack(rest))
        return jnp.concatenate([token[..., None], jnp.moveaxis(tokens, 0, -1)], axis=-1)
