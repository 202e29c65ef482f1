"""A decoder-only language model over quantised keys, with generation at a constant cost a token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Bool, DType, Float, Int, Key
from jaxkit.attention.vq._operands import check_mask
from jaxkit.attention.vq.codebook import CodeStatistics, update_codebooks
from jaxkit.attention.vq.layers import VQAttention, rms_norm
from jaxkit.quantize import EMAState

__all__ = [
    "LanguageModelLoss",
    "VQBlock",
    "VQModelState",
    "VQTransformer",
    "bits_per_byte",
    "next_token_loss",
    "sample_token",
]

POSITIONS = ("none", "sinusoids")


class VQModelState(NamedTuple):
    """State of a `VQTransformer` between tokens; its size does not depend on their number.

    Attributes:
      layers: One state for each block.
      position: How many tokens there have been, int32.
    """

    layers: tuple[Any, ...]
    position: Array


class LanguageModelLoss(NamedTuple):
    """What `next_token_loss` tells beside the loss.

    Attributes:
      cross_entropy: Mean over the tokens that count, in nats.
      commitment: Summed over layers.
      statistics: For `update_codebooks`; empty without hard codes.
    """

    cross_entropy: Array
    commitment: Array
    statistics: tuple[CodeStatistics, ...]


class _Norm(nnx.Module):
    """RMS norm with a gain."""

    def __init__(self, dim: int, *, dtype: DType, param_dtype: DType):
        self.gain = nnx.Param(jnp.ones((dim,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        return rms_norm(x) * self.gain[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class VQBlock(nnx.Module):
    """x + attention(x), and for heads without a gate an MLP after it: x + W₂ gelu(W₁ RMSNorm(x)).

    Two `shga` blocks take the place of one of the others.

    Args:
      attention: The layer.
      mlp_ratio: Width of the MLP over that of the model; 0 for none.
      dropout: Rate, on what is added to the residual stream.
      layer_drop: Rate at which a sequence skips the block while training.
      rngs: Random keys.

    Raises:
      ValueError: If a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> attention = VQAttention(8, key_dim=4, num_codes=6, block_length=4, rngs=rngs)
      >>> print(VQBlock(attention, mlp_ratio=0, rngs=rngs)(jnp.ones((1, 5, 8)))[0].shape)
      (1, 5, 8)

    Source: Lingle 2023 (arXiv 2309.16354); Hua et al. 2022 (2202.10447).
    """

    def __init__(
        self,
        attention: VQAttention,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        layer_drop: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_real("mlp_ratio", mlp_ratio, least=0.0)
        for name, rate in (("dropout", dropout), ("layer_drop", layer_drop)):
            check_real(name, rate, least=0.0)
            if rate >= 1:
                raise ValueError(f"{name} must be less than 1; got {rate}.")
        self.attention = attention
        self.dropout = nnx.Dropout(dropout)
        self.layer_drop = layer_drop
        width = round(mlp_ratio * attention.dim)
        self.has_mlp = width > 0
        if self.has_mlp:
            types: dict[str, Any] = {
                "dtype": attention.dtype,
                "param_dtype": attention.param_dtype,
            }
            self.norm = _Norm(attention.dim, **types)
            self.up = nnx.Linear(attention.dim, width, rngs=rngs, **types)
            self.down = nnx.Linear(width, attention.dim, rngs=rngs, **types)

    def _mlp(self, x: Array) -> Array:
        return self.down(jax.nn.gelu(self.up(self.norm(x))))

    def _add(self, x: Array, y: Array, key: Key | None) -> Array:
        """x + y, of which training drops entries, and whole sequences."""
        if key is None:
            return x + y
        drop, skip = jax.random.split(key)
        y = self.dropout(y, deterministic=False, rngs=drop)
        if self.layer_drop:
            kept = 1 - self.layer_drop
            rows = jax.random.bernoulli(skip, kept, (*x.shape[:-2], 1, 1))
            y = jnp.where(rows, y / jnp.asarray(kept, y.dtype), jnp.zeros_like(y))
        return x + y

    def __call__(
        self,
        x: Float[Array, "*batch length dim"],
        *,
        mask: Bool[Array, "*batch length"] | None = None,
        statistics: bool = False,
        key: Key | None = None,
    ) -> tuple[Float[Array, "*batch length dim"], CodeStatistics | None]:
        """Apply the block to a sequence; dropout is on where a `key` is given."""
        first, second = (None, None) if key is None else jax.random.split(key)
        found = None
        if statistics:
            y, found = self.attention(x, mask=mask, statistics=True)
        else:
            y = self.attention(x, mask=mask)
        x = self._add(x, y, first)
        if self.has_mlp:
            x = self._add(x, self._mlp(x), second)
        return x, found

    def _stream(self, y: tuple[Array, Any], x: Array) -> tuple[Array, Any]:
        x, state = x + y[0], y[1]
        return (x + self._mlp(x) if self.has_mlp else x), state

    def step(self, state: Any, x: Array, *, mask: Array | None = None) -> tuple[Array, Any]:
        """One token, without dropout."""
        return self._stream(self.attention.step(state, x, mask=mask), x)

    def prefill(self, state: Any, x: Array, *, mask: Array | None = None) -> tuple[Array, Any]:
        """Many tokens at once, without dropout."""
        return self._stream(self.attention.prefill(state, x, mask=mask), x)


class VQTransformer(nnx.Module):
    """Embedding, blocks, norm and read-out: logits of the next token for every position.

    As a sequence map it runs in blocks (`__call__`), as a stream token by token (`init_state`,
    `prefill`, `step`, `generate`), with the same result. Every weight is an `nnx.Param`; codebooks
    are not (`codebooks`, `set_codebooks`, and `update_codebooks` in a training step):

        value, aux = next_token_loss(model, tokens, key=key)     # differentiate this
        model.set_codebooks(update_codebooks(model.codebooks(), aux.statistics))

    Args:
      vocab_size: Number of input tokens; 256 for bytes.
      outputs: Number of logits. Default: `vocab_size`.
      dim: Width.
      layers: Number of blocks; two of `shga` take the place of one of the other types.
      head_type: `shga`, `mha`, `mqa` or `gqa`.
      mlp_ratio: Width of the MLPs over `dim`. Default: none for `shga`, 4 for the others.
      positions: `none`, or `sinusoids`: scaled sinusoids of the position are added to the input.
      tied: Read out with the embedding (`outputs` = `vocab_size`).
      dropout: Rate; drawn only where a `key` is given.
      layer_drop: Rate at which a sequence skips a block.
      dtype: Of the activations; default: that of the parameters. Logits are float32 at least.
      param_dtype: Of the parameters.
      rngs: Random keys.
      **options: Of every `VQAttention`: `key_dim`, `num_codes`, `block_length`, `bias`, …

    Raises:
      ValueError: If an argument is unknown or out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = VQTransformer(
      ...     11, dim=8, layers=2, key_dim=4, num_codes=6, block_length=4, rngs=nnx.Rngs(0)
      ... )
      >>> prompt = jnp.asarray([[1, 4, 2]])
      >>> print(model(prompt).shape, model.generate(prompt, 5, key=jax.random.key(0)).shape)
      (1, 3, 11) (1, 5)

    Source: Lingle 2023 (arXiv 2309.16354); posts 9844 and 9862.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        outputs: int | None = None,
        dim: int = 768,
        layers: int = 24,
        head_type: str = "shga",
        mlp_ratio: float | None = None,
        positions: str = "none",
        tied: bool = False,
        dropout: float = 0.0,
        layer_drop: float = 0.0,
        dtype: DType | None = None,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.vocab_size = check_int("vocab_size", vocab_size, least=1)
        outputs = vocab_size if outputs is None else check_int("outputs", outputs, least=1)
        if tied and outputs != vocab_size:
            raise ValueError(
                f"outputs must be vocab_size = {vocab_size} with tied=True; got {outputs}."
            )
        self.dim = check_int("dim", dim, least=1)
        check_int("layers", layers, least=1)
        check_choice("positions", positions, POSITIONS)
        self.param_dtype = jnp.dtype(param_dtype)
        self.dtype = self.param_dtype if dtype is None else jnp.dtype(dtype)
        self.tied = tied
        if mlp_ratio is None:
            mlp_ratio = 0.0 if head_type == "shga" else 4.0
        # Rows of unit size, as the norm of the first block makes of them anyway.
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), (vocab_size, dim), self.param_dtype)
        )
        self.placed = positions == "sinusoids"
        if self.placed:
            if dim % 2:
                raise ValueError(f"dim must be even with positions='sinusoids'; got {dim}.")
            self.position_scale = nnx.Param(jnp.asarray(dim**-0.5, param_dtype))
        self.blocks = nnx.List(
            VQBlock(
                VQAttention(
                    dim,
                    head_type=head_type,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                    **options,
                ),
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                layer_drop=layer_drop,
                rngs=rngs,
            )
            for _ in range(layers)
        )
        self.norm = _Norm(dim, dtype=self.dtype, param_dtype=param_dtype)
        if not tied:
            self.readout = nnx.Linear(
                dim, outputs, dtype=wide(self.dtype), param_dtype=param_dtype, rngs=rngs
            )

    def _embed(self, tokens: Array, position: Any) -> Array:
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers; got dtype {tokens.dtype}.")
        # An embedding of NaN shows a token that there is not; -1 would be the last one.
        index = jnp.where(tokens < 0, self.vocab_size, tokens)
        table = self.embedding[...].astype(self.dtype)
        x = table.at[index].get(mode="fill", fill_value=jnp.nan)
        if self.placed:
            places = position + jnp.arange(tokens.shape[-1], dtype=jnp.int32)
            frequency = 1e5 ** (-np.arange(0, self.dim, 2) / self.dim)
            phase = places.astype(jnp.float32)[:, None] * frequency.astype(np.float32)[None]
            waves = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1).astype(x.dtype)
            waves = waves * self.position_scale[...].astype(x.dtype)
            x = x + waves.reshape((1,) * (x.ndim - 2) + waves.shape)
        return x

    def _read(self, x: Array) -> Array:
        x = self.norm(x).astype(wide(self.dtype))
        if not self.tied:
            return self.readout(x)
        table = self.embedding[...].astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, table) * jnp.asarray(self.dim**-0.5, x.dtype)

    def _check(self, tokens: Array, mask: Array | None, axes: int) -> None:
        if tokens.ndim < axes:
            raise ValueError(f"tokens must have at least {axes} axes; got shape {tokens.shape}.")
        if mask is not None:
            check_mask(mask, tokens.shape)

    def __call__(
        self,
        tokens: Int[Array, "*batch length"],
        *,
        mask: Bool[Array, "*batch length"] | None = None,
        statistics: bool = False,
        key: Key | None = None,
    ) -> Any:
        """Logits `[*batch, length, outputs]` of the token after each position.

        Args:
          tokens: Integers in [0, vocab_size); others give NaN.
          mask: True where a position counts as a key.
          statistics: Return `(logits, tuple of CodeStatistics)`, one for each block.
          key: Random key of dropout; without one there is no dropout.

        Returns:
          Logits, float32 at least, or a pair.

        Raises:
          TypeError: If `tokens` are no integers or `mask` is not boolean.
          ValueError: If shapes do not fit.
        """
        self._check(tokens, mask, 1)
        x = self._embed(tokens, 0)
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        every = []
        for own, own_key in zip(self.blocks, keys, strict=True):
            x, found = own(x, mask=mask, statistics=statistics, key=own_key)
            every.append(found)
        logits = self._read(x)
        return (logits, tuple(every)) if statistics else logits

    # Codebooks.

    @property
    def quantized(self) -> bool:
        """Whether the keys have hard codes, and so codebooks outside the parameters."""
        return self.blocks[0].attention.quantizer == "hard"

    def codebooks(self) -> tuple[EMAState, ...]:
        """The running statistics of every block's codebook; empty without hard codes."""
        if not self.quantized:
            return ()
        return tuple(block.attention.codebook_state() for block in self.blocks)

    def set_codebooks(self, states: Sequence[EMAState]) -> None:
        """Take over statistics, in place.

        Raises:
          ValueError: If there are not as many as codebooks, or shapes differ.
        """
        if len(states) != len(self.codebooks()):
            raise ValueError(
                f"states must have one entry for each of {len(self.codebooks())} codebooks; "
                f"got {len(states)}."
            )
        if self.quantized:
            for block, state in zip(self.blocks, states, strict=True):
                block.attention.set_codebook_state(state)

    def update_codebooks(
        self,
        statistics: Sequence[CodeStatistics],
        *,
        key: Key | None = None,
        threshold: float | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> None:
        """`jaxkit.attention.vq.update_codebooks` in place, with the decay of the layers.

        Without hard codes, or with a decay of 1, nothing changes.
        """
        if not self.quantized or self.blocks[0].attention.decay >= 1:
            return
        states = update_codebooks(
            self.codebooks(),
            statistics,
            decay=self.blocks[0].attention.decay,
            key=key,
            threshold=threshold,
            axis_name=axis_name,
        )
        self.set_codebooks(states)

    def init_codebooks(
        self,
        key: Key,
        tokens: Int[Array, "*batch length"],
        *,
        method: str = "data",
        steps: int = 20,
        mask: Bool[Array, "*batch length"] | None = None,
    ) -> None:
        """Take codes from the keys that these tokens give, block after block, in place.

        Args:
          key: A random key.
          tokens: As in a call.
          method: `data` (keys drawn) or `kmeans`.
          steps: Most steps of `kmeans`.
          mask: True where a position counts.

        Raises:
          ValueError: If the model has no hard codes or an argument is out of range.
        """
        self._check(tokens, mask, 1)
        x = self._embed(tokens, 0)
        for block, own in zip(self.blocks, jax.random.split(key, len(self.blocks)), strict=True):
            block.attention.init_codebook_from(own, x, method=method, steps=steps, mask=mask)
            x, _ = block(x, mask=mask)

    # The stream.

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> VQModelState:
        """The state before the first token.

        Raises:
          ValueError: If the layers have no state of fixed size.
        """
        layers = tuple(block.attention.init_state(batch_shape) for block in self.blocks)
        return VQModelState(layers, jnp.zeros((), jnp.int32))

    def step(
        self,
        state: VQModelState,
        tokens: Int[Array, "*batch"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
    ) -> tuple[Float[Array, "*batch outputs"], VQModelState]:
        """One token: logits of the next, and the state after it.

        Args:
          state: From `init_state`, `step` or `prefill`.
          tokens: One for each sequence.
          mask: True where the token counts; where not, it takes a position and is seen by none.

        Returns:
          `(logits, state)`.

        Raises:
          TypeError: If `tokens` are no integers.
          ValueError: If shapes do not fit.
        """
        self._check(tokens, mask, 0)
        x = self._embed(tokens[..., None], state.position)[..., 0, :]
        layers = []
        for block, old in zip(self.blocks, state.layers, strict=True):
            x, new = block.step(old, x, mask=mask)
            layers.append(new)
        return self._read(x), VQModelState(tuple(layers), state.position + 1)

    def prefill(
        self,
        state: VQModelState,
        tokens: Int[Array, "*batch length"],
        *,
        mask: Bool[Array, "*batch length"] | None = None,
        last: bool = False,
    ) -> tuple[Array, VQModelState]:
        """Many tokens at once from any state: any cut gives the logits of one call on the whole.

        Args:
          state: From `init_state`, `step` or `prefill`.
          tokens: As in a call.
          mask: True where a token counts.
          last: Read out the last position alone, `[*batch, outputs]`.

        Returns:
          `(logits, state)`.

        Raises:
          TypeError: If `tokens` are no integers.
          ValueError: If shapes do not fit.
        """
        self._check(tokens, mask, 1)
        x = self._embed(tokens, state.position)
        layers = []
        for block, old in zip(self.blocks, state.layers, strict=True):
            x, new = block.prefill(old, x, mask=mask)
            layers.append(new)
        logits = self._read(x[..., -1, :] if last else x)
        return logits, VQModelState(tuple(layers), state.position + tokens.shape[-1])

    def generate(
        self,
        prompt: Int[Array, "*batch length"],
        steps: int,
        *,
        key: Key,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        mask: Bool[Array, "*batch length"] | None = None,
    ) -> Int[Array, "*batch steps"]:
        """Continue a prompt token by token, at a cost and in a memory that never grow.

        Args:
          prompt: Tokens, at least one; shorter ones padded on the left, with a `mask`.
          steps: How many tokens to draw.
          key: A random key.
          temperature: Divides the logits; 0 takes the largest.
          top_k: Draw among so many of the most likely alone.
          top_p: Draw among the fewest most likely whose probabilities reach so much.
          mask: False at padding.

        Returns:
          The new tokens, in the dtype of `prompt`.

        Raises:
          TypeError: If `prompt` holds no integers.
          ValueError: If the model has other outputs than inputs, or an argument is out of range.
        """
        steps = check_int("steps", steps, least=1)
        if not self.tied and self.readout.out_features != self.vocab_size:
            raise ValueError(
                f"outputs must be vocab_size = {self.vocab_size} to generate; "
                f"got {self.readout.out_features}."
            )
        if prompt.ndim < 1 or prompt.shape[-1] < 1:
            raise ValueError(f"prompt must hold at least one token; got shape {prompt.shape}.")
        lead = prompt.shape[:-1]
        logits, state = self.prefill(self.init_state(lead), prompt, mask=mask, last=True)

        def draw(key: Key, logits: Array) -> Array:
            token = sample_token(key, logits, temperature=temperature, top_k=top_k, top_p=top_p)
            return token.astype(prompt.dtype)

        first, *rest = jax.random.split(key, steps)
        token = draw(first, logits)
        if not rest:
            return token[..., None]
        graph, values = nnx.split(self)

        def body(carry: Any, key: Key) -> Any:
            token, state = carry
            logits, state = nnx.merge(graph, values).step(state, token)
            token = draw(key, logits)
            return (token, state), token

        _, tokens = jax.lax.scan(body, (token, state), jnp.stack(rest))
        return jnp.concatenate([token[..., None], jnp.moveaxis(tokens, 0, -1)], axis=-1)


def sample_token(
    key: Key,
    logits: Float[Array, "*batch tokens"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "*batch"]:
    """Draw from softmax(logits / temperature), cut to the most likely tokens.

    Args:
      key: A random key.
      logits: Real.
      temperature: 0 takes the largest.
      top_k: So many of the largest stay (more where they tie).
      top_p: The fewest of the largest whose probabilities reach it stay.

    Returns:
      Tokens, int32.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
      >>> keys = jax.random.split(jax.random.key(0), 50)
      >>> sorted({int(sample_token(key, logits, top_p=0.7)) for key in keys})
      [0, 1]

    Source: Holtzman et al. 2019 (arXiv 1904.09751).
    """
    check_real("temperature", temperature, least=0.0)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / jnp.asarray(temperature, logits.dtype)
    lowest = jnp.asarray(-jnp.inf, logits.dtype)
    if top_k is not None:
        count = min(check_int("top_k", top_k, least=1), logits.shape[-1])
        least = jax.lax.top_k(logits, count)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, lowest)
    if top_p is not None:
        check_real("top_p", top_p, above=0.0, most=1.0)
        ordered = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(ordered, axis=-1)
        # Kept: those before which not enough has been gathered; always the first.
        kept = jnp.cumsum(share, axis=-1) - share < top_p
        kept = kept.at[..., 0].set(True)
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, lowest)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def next_token_loss(
    model: VQTransformer,
    tokens: Int[Array, "*batch length"],
    *,
    targets: Int[Array, "*batch length"] | None = None,
    mask: Bool[Array, "*batch length"] | None = None,
    loss_mask: Bool[Array, "*batch length"] | None = None,
    commitment_weight: float = 1e-4,
    key: Key | None = None,
) -> tuple[Float[Array, ""], LanguageModelLoss]:
    """Cross-entropy of the next token plus the weighted commitment loss: the whole objective.

    Pure: it does not touch the codebooks. With `graph, params, rest = nnx.split(model, nnx.Param,
    ...)` the function `lambda params: next_token_loss(nnx.merge(graph, params, rest), batch)` is
    for `jax.value_and_grad(..., has_aux=True)`.

    Args:
      model: A `VQTransformer`.
      tokens: Inputs.
      targets: What follows each of them. Default: the tokens shifted by one; the last is not
        scored.
      mask: True where a position counts as a key, and where its target counts.
      loss_mask: True where the target counts, in addition.
      commitment_weight: Of Σ_layers mean Σ_heads ‖k − sg(C_z)‖².
      key: Random key of dropout.

    Returns:
      `(loss, LanguageModelLoss)`.

    Raises:
      TypeError: If tokens are no integers or masks not boolean.
      ValueError: If shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = VQTransformer(
      ...     5, dim=8, layers=1, key_dim=4, num_codes=3, block_length=4, rngs=nnx.Rngs(0)
      ... )
      >>> loss, aux = next_token_loss(model, jnp.asarray([[1, 2, 3, 4, 0]]))
      >>> model.set_codebooks(update_codebooks(model.codebooks(), aux.statistics))
      >>> print(loss.shape, aux.statistics[0].counts.sum())
      () 5

    Source: Lingle 2023 (arXiv 2309.16354).
    """
    check_real("commitment_weight", commitment_weight, least=0.0)
    if model.quantized:
        logits, statistics = model(tokens, mask=mask, statistics=True, key=key)
    else:
        logits, statistics = model(tokens, mask=mask, key=key), ()
    counted = jnp.ones(tokens.shape, bool)
    for extra in (mask, loss_mask):
        if extra is not None:
            check_mask(extra, tokens.shape)
            counted = counted & extra
    if targets is None:
        logits, targets = logits[..., :-1, :], tokens[..., 1:]
        counted = counted[..., 1:]
    elif targets.shape != tokens.shape:
        raise ValueError(f"targets must have shape {tokens.shape}; got {targets.shape}.")
    score = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - score
    weight = counted.astype(losses.dtype)
    total = jnp.maximum(jnp.sum(weight), jnp.ones((), losses.dtype))
    cross_entropy = jnp.sum(jnp.where(counted, losses, 0)) / total
    commitment = jnp.zeros((), losses.dtype)
    for found in statistics:
        commitment = commitment + found.commitment.astype(losses.dtype)
    loss = cross_entropy + commitment_weight * commitment
    return loss, LanguageModelLoss(cross_entropy, commitment, statistics)


def bits_per_byte(nats_per_token: Float[Array, ""] | float, *, bytes_per_token: float = 1.0) -> Any:
    """nats / (ln 2 · bytes): the mean cross-entropy as bits per byte of text.

    Args:
      nats_per_token: Mean cross-entropy.
      bytes_per_token: Mean number of bytes that a token stands for.

    Returns:
      Bits per byte.

    Raises:
      ValueError: If `bytes_per_token` is not positive.

    Example:
      >>> import math
      >>> bits_per_byte(math.log(256))
      8.0
    """
    check_real("bytes_per_token", bytes_per_token, above=0.0)
    return nats_per_token / (float(np.log(2.0)) * bytes_per_token)
