"""The attention layer: projections, norms and a codebook around the pure functions."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkit._checks import check_choice, check_floating, check_int, check_real
from jaxkit._dtypes import wide
from jaxkit._norms import rms_norm
from jaxkit._typing import Array, Bool, DType, Float, Key
from jaxkit.attention.vq import bidirectional, block, decode, soft
from jaxkit.attention.vq._operands import check_mask
from jaxkit.attention.vq.biases import relative_sinusoids, xl_bias
from jaxkit.attention.vq.codebook import (
    CODEBOOK_INITS,
    CodeStatistics,
    code_statistics,
    codebook_from_keys,
    codebook_of,
    init_codebook,
    update_codebook,
)
from jaxkit.attention.vq.codes import find_codes
from jaxkit.attention.vq.reference import quadratic_attention
from jaxkit.quantize import EMAState

__all__ = ["CodebookVariable", "VQAttention", "rms_norm"]

HEAD_TYPES = ("shga", "mha", "mqa", "gqa")
BIASES = ("xl", "table", "none")
QUANTIZERS = ("hard", "soft", "none")


class CodebookVariable(nnx.Variable):
    """Running statistics of a codebook: state of the model, and no `nnx.Param`."""


class _Operands(NamedTuple):
    """Inputs of the attention, `[batch, heads, length, …]`."""

    q: Array
    k: Array
    v: Array
    gate: Array | None
    bias: Array | None


class VQAttention(nnx.Module):
    """Attention over vector-quantised keys, from `[*batch, length, dim]` to the same shape.

    x̃ = RMSNorm(x) g + b; q and k are x̃W_q and x̃W_k, each RMS-normalised without a gain and times
    dk^(−1/4), so that ‖k‖ = dk^(1/4) and |q · k| ≤ √dk. The output is (o ∘ gate) W_o, without the
    residual (`VQBlock` adds it).

    | head_type | H        | G      | dv    | v, gate                    |
    |-----------|----------|--------|-------|----------------------------|
    | `shga`    | 1        | 1      | 2 dim | silu(x̃W_v), silu(x̃W_g)     |
    | `mha`     | dim / dk | H      | dk    | x̃W_v, none; an MLP follows |
    | `mqa`     | dim / dk | 1      | dk    | the same                   |
    | `gqa`     | dim / dk | groups | dk    | the same                   |

    As a sequence map it runs in blocks, as a stream by `init_state`, `step` and `prefill`, with the
    same result. The codebook is state outside the parameters; training calls

        y, statistics = layer(x, statistics=True)
        layer.update_codebook(statistics)

    Args:
      dim: Width of the model.
      head_type: `shga`, `mha`, `mqa` or `gqa`.
      key_dim: dk.
      groups: G of `gqa`.
      num_codes: S.
      block_length: L.
      window: W ≤ L, how far biases reach. Default: L.
      bias: `xl` (Transformer-XL's), `table` (one number for each head and lag) or `none`.
      rotary_base: Rotate queries and keys by min(i − j, W), with this base. None: do not.
      wavelength: λ of the sinusoids of `xl`.
      quantizer: `hard` codes; `soft` codes, whose codebook is a parameter (then without bias and
        window); or `none`, dense attention in O(T²).
      temperature: τ of soft codes.
      causal: False lets all see all, through codes alone (no bias, no window).
      codebook_init: `keys`, `normal` (the paper's) or `sinusoids`; see `init_codebook`, and
        `init_codebook_from` for codes from data.
      decay: γ of the codebook's moving average. 1 keeps the codebook as it is.
      query_scale: First value of a learned factor of q. None: no factor.
      reduction: `serial`, `assoc_scan`, `matmul` or `sum`; see `reduce_blocks`.
      cache: False forgets what is older than two blocks.
      local: Of `cache=False`: `blocks`, or `window` to forget also the lags beyond W.
      grad_through_cache: False stops the gradient to v through the cache.
      implementation: Of the kernels; see `jaxkit_kernels`.
      dtype: Of the activations; default: that of the parameters.
      param_dtype: Of the parameters.
      rngs: Random keys; `params` is used.

    Raises:
      ValueError: If an argument is unknown, out of range or does not go with another.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = VQAttention(8, key_dim=4, num_codes=6, block_length=4, rngs=nnx.Rngs(0))
      >>> x = jnp.sin(jnp.arange(80.0)).reshape(1, 10, 8)
      >>> y, state = layer.prefill(layer.init_state((1,)), x)
      >>> print(layer(x).shape, bool(abs(layer(x) - y).max() < 1e-5))
      (1, 10, 8) True

    Source: Lingle 2023 (arXiv 2309.16354); Hua et al. 2022 (2202.10447); posts 9844 and 9862.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_type: str = "shga",
        key_dim: int = 128,
        groups: int | None = None,
        num_codes: int = 512,
        block_length: int = 512,
        window: int | None = None,
        bias: str = "xl",
        rotary_base: float | None = None,
        wavelength: float = 1e5,
        quantizer: str = "hard",
        temperature: float = 0.1,
        causal: bool = True,
        codebook_init: str = "keys",
        decay: float = 0.99,
        query_scale: float | None = None,
        reduction: str = "assoc_scan",
        cache: bool = True,
        local: str = "blocks",
        grad_through_cache: bool = True,
        implementation: Any = "auto",
        dtype: DType | None = None,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        for name, value, choices in (
            ("head_type", head_type, HEAD_TYPES),
            ("bias", bias, BIASES),
            ("quantizer", quantizer, QUANTIZERS),
            ("codebook_init", codebook_init, CODEBOOK_INITS),
            ("reduction", reduction, block.REDUCTIONS),
            ("local", local, block.LOCALS),
        ):
            check_choice(name, value, choices)
        self.dim = check_int("dim", dim, least=1)
        self.key_dim = check_int("key_dim", key_dim, least=1)
        self.num_codes = check_int("num_codes", num_codes, least=1)
        self.block_length = check_int("block_length", block_length, least=1)
        self.window = block_length if window is None else check_int("window", window, least=0)
        if self.window > block_length:
            raise ValueError(f"window must be at most block_length = {block_length}; got {window}.")
        check_real("temperature", temperature, above=0.0)
        check_real("decay", decay, least=0.0, most=1.0)
        plain = bias == "none" and rotary_base is None and cache
        if (quantizer == "soft" or not causal) and not plain:
            what = "quantizer='soft'" if quantizer == "soft" else "causal=False"
            raise ValueError(
                f"bias must be 'none', rotary_base None and cache True with {what}, which has no "
                f"window; got bias={bias!r}, rotary_base={rotary_base!r}, cache={cache!r}."
            )
        if quantizer == "none" and not causal:
            raise ValueError("causal must be True with quantizer='none'; got False.")
        if rotary_base is not None and key_dim % 2:
            raise ValueError(f"key_dim must be even to be rotated; got {key_dim}.")
        self._set_heads(head_type, groups)
        self.bias_type, self.rotary_base = bias, rotary_base
        self.quantizer, self.temperature, self.causal = quantizer, temperature, causal
        self.decay = decay
        self.reduction, self.cache, self.local = reduction, cache, local
        self.grad_through_cache, self.implementation = grad_through_cache, implementation
        self.param_dtype = jnp.dtype(param_dtype)
        self.dtype = self.param_dtype if dtype is None else jnp.dtype(dtype)

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        zeros = lambda *shape: nnx.Param(jnp.zeros(shape, param_dtype))
        self.norm_gain = nnx.Param(jnp.ones((dim,), param_dtype))
        self.norm_bias = zeros(dim)
        self.query = linear(dim, self.heads * key_dim)
        self.key = linear(dim, self.groups * key_dim)
        self.value = linear(dim, self.groups * self.value_dim)
        self.out = linear(self.heads * self.value_dim, dim)
        if self.gated:
            self.gate = linear(dim, self.value_dim)
        if query_scale is not None:
            check_real("query_scale", query_scale, above=0.0)
            self.log_query_scale = nnx.Param(jnp.asarray(math.log(query_scale), param_dtype))
        self.scales_query = query_scale is not None
        if bias == "table":
            self.table = zeros(self.heads, self.window + 1)
        elif bias == "xl":
            self.u, self.w = zeros(self.heads, key_dim), zeros(self.heads, key_dim)
            self.wavelength = wavelength
            self.relative = linear(dim, self.heads * key_dim)
            relative_sinusoids(1, dim, wavelength=wavelength)
        if quantizer != "none":
            first = init_codebook(
                rngs.params(),
                self.groups,
                num_codes,
                key_dim,
                init=codebook_init,
                dtype=wide(self.param_dtype),
            )
            if quantizer == "soft":
                self.codes = nnx.Param(first.sums.astype(param_dtype))
            else:
                self.code_sums = CodebookVariable(first.sums)
                self.code_counts = CodebookVariable(first.counts)

    def _set_heads(self, head_type: str, groups: int | None) -> None:
        self.gated = head_type == "shga"
        if head_type != "shga" and self.dim % self.key_dim:
            raise ValueError(
                f"key_dim must divide dim = {self.dim} for head_type {head_type!r}; "
                f"got {self.key_dim}."
            )
        self.heads = 1 if self.gated else self.dim // self.key_dim
        self.value_dim = 2 * self.dim if self.gated else self.key_dim
        if (head_type == "gqa") != (groups is not None):
            raise ValueError(
                f"groups must be given for head_type 'gqa' and for no other; "
                f"got groups={groups!r} with {head_type!r}."
            )
        self.groups = self.heads if head_type == "mha" else 1
        if groups is not None:
            self.groups = check_int("groups", groups, least=1)
            if self.heads % self.groups:
                raise ValueError(
                    f"groups must divide the {self.heads} heads (dim / key_dim); got {groups}."
                )

    # The codebook.

    def codebook_state(self) -> EMAState:
        """The running statistics (m, n).

        Raises:
          ValueError: If the layer has no hard codes.
        """
        if self.quantizer != "hard":
            raise ValueError(f"quantizer must be 'hard' for this; got {self.quantizer!r}.")
        return EMAState(self.code_sums[...], self.code_counts[...])

    def set_codebook_state(self, state: EMAState) -> None:
        """Take over statistics, from `update_codebook` or from another layer.

        Raises:
          ValueError: If the layer has no hard codes or shapes differ.
        """
        old = self.codebook_state()
        for name, new, current in (
            ("state.sums", state.sums, old.sums),
            ("state.counts", state.counts, old.counts),
        ):
            if new.shape != current.shape:
                raise ValueError(f"{name} must have shape {current.shape}; got {new.shape}.")
        self.code_sums[...] = state.sums.astype(old.sums.dtype)
        self.code_counts[...] = state.counts.astype(old.counts.dtype)

    def codebook(self) -> Float[Array, "groups codes key_dim"]:
        """C, in the precision of its statistics."""
        if self.quantizer == "soft":
            return self.codes[...]
        return codebook_of(self.codebook_state())

    def update_codebook(self, statistics: CodeStatistics, **options: Any) -> None:
        """One step of the moving average, in place; nothing if `decay` is 1.

        Args:
          statistics: From a call with `statistics=True`.
          **options: `key`, `threshold`, `axis_name` of `jaxkit.attention.vq.update_codebook`.
        """
        if self.decay < 1:
            state = update_codebook(self.codebook_state(), statistics, decay=self.decay, **options)
            self.set_codebook_state(state)

    def init_codebook_from(
        self,
        key: Key,
        x: Float[Array, "*batch length dim"],
        *,
        method: str = "data",
        steps: int = 20,
        mask: Bool[Array, "*batch length"] | None = None,
    ) -> None:
        """Take codes from the keys of these inputs: drawn (`data`) or by `kmeans`, in place."""
        flat, mask, _ = self._flat(x, mask)
        k = self._operands(flat).k
        state = codebook_from_keys(key, k, self.num_codes, method=method, steps=steps, mask=mask)
        self.set_codebook_state(state)

    # The operands of the attention.

    def _flat(
        self, x: Array, mask: Array | None, *, axes: int = 2
    ) -> tuple[Array, Array | None, tuple[int, ...]]:
        check_floating("x", x)
        if x.ndim < axes or x.shape[-1] != self.dim:
            last = ("length", self.dim) if axes == 2 else (self.dim,)
            raise ValueError(f"x must have shape (…, {', '.join(map(str, last))}); got {x.shape}.")
        lead = x.shape[:-axes]
        if mask is not None:
            check_mask(mask, x.shape[:-1])
            mask = mask.reshape(-1, *mask.shape[len(lead) :])
        return x.astype(self.dtype).reshape(-1, *x.shape[len(lead) :]), mask, lead

    def _operands(self, x: Array) -> _Operands:
        """From x `[batch, length, dim]`."""
        dtype = self.dtype
        y = rms_norm(x) * self.norm_gain[...].astype(dtype)[None, None]
        y = y + self.norm_bias[...].astype(dtype)[None, None]
        scale = jnp.asarray(self.key_dim**-0.25, dtype)

        def split(x: Array, heads: int) -> Array:
            return jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 1)

        q = rms_norm(split(self.query(y), self.heads)) * scale
        k = rms_norm(split(self.key(y), self.groups)) * scale
        v, gate = split(self.value(y), self.groups), None
        if self.gated:
            v, gate = jax.nn.silu(v), jax.nn.silu(self.gate(y))
        if self.scales_query:
            q = q * jnp.exp(self.log_query_scale[...]).astype(dtype)
        bias = None
        if self.bias_type == "table":
            bias = self.table[...].astype(dtype)
        elif self.bias_type == "xl":
            bias = xl_bias(q, self._relative(scale), self.w[...].astype(dtype) * scale)
            q = q + (self.u[...].astype(dtype) * scale)[None, :, None]
        return _Operands(q, k, v, gate, bias)

    def _relative(self, scale: Array) -> Array:
        """r_l for the lags 0 … W, `[heads, lags, key_dim]`."""
        waves = relative_sinusoids(
            self.window + 1, self.dim, wavelength=self.wavelength, dtype=self.dtype
        )
        r = self.relative(waves).reshape(self.window + 1, self.heads, self.key_dim)
        return jnp.moveaxis(r, 1, 0) * scale

    def _finish(self, out: Array, gate: Array | None, lead: tuple[int, ...]) -> Array:
        """From `[batch, heads, length, value_dim]`."""
        out = jnp.moveaxis(out, 1, 2)
        out = out.reshape(*out.shape[:2], self.heads * self.value_dim)
        y = self.out(out if gate is None else out * gate)
        return y.reshape(*lead, *y.shape[1:])

    def __call__(
        self,
        x: Float[Array, "*batch length dim"],
        *,
        mask: Bool[Array, "*batch length"] | None = None,
        statistics: bool = False,
    ) -> Any:
        """Attention over a sequence.

        Args:
          x: Real.
          mask: True where a position counts as a key.
          statistics: Return `(y, CodeStatistics)`, for the commitment loss and the codebook's
            update.

        Returns:
          The output, in the layer's dtype, or a pair.

        Raises:
          TypeError: If `x` is not real or `mask` not boolean.
          ValueError: If shapes do not fit, or `statistics` are asked for without hard codes.
        """
        if statistics and self.quantizer != "hard":
            raise ValueError(
                f"statistics must be False without hard codes; got quantizer={self.quantizer!r}."
            )
        flat, mask, lead = self._flat(x, mask)
        q, k, v, gate, bias = self._operands(flat)
        found = None
        if self.quantizer == "none":
            out = quadratic_attention(
                q,
                k,
                v,
                None,
                bias=bias,
                window=self.window,
                mask=mask,
                rotary_base=self.rotary_base,
                block_length=self.block_length,
                cache=self.cache,
                local=self.local,
            )
        elif self.quantizer == "soft":
            out = soft.soft_attention(
                q,
                k,
                v,
                self.codebook(),
                temperature=self.temperature,
                causal=self.causal,
                block_length=self.block_length,
                reduction=self.reduction,
                mask=mask,
            )
        else:
            codebook = self.codebook()
            # The same rounding of C as in the scores.
            codes = find_codes(k, codebook.astype(k.dtype), mask=mask)
            if statistics:
                found = code_statistics(k, codes, codebook.astype(k.dtype), mask=mask)
            if self.causal:
                out = block.vq_attention(
                    q,
                    k,
                    v,
                    codebook,
                    codes=codes,
                    bias=bias,
                    window=self.window,
                    mask=mask,
                    grad_through_cache=self.grad_through_cache,
                    reduction=self.reduction,
                    **self._options(),
                )
            else:
                out = bidirectional.bidirectional_attention(
                    q, k, v, codebook, codes=codes, mask=mask
                )
        y = self._finish(out, gate, lead)
        return (y, found) if statistics else y

    def _options(self) -> dict[str, Any]:
        return {
            "block_length": self.block_length,
            "rotary_base": self.rotary_base,
            "cache": self.cache,
            "local": self.local,
            "implementation": self.implementation,
        }

    # The stream.

    def _streams(self) -> None:
        if not self.causal or self.quantizer == "none":
            got = "causal=False" if not self.causal else "quantizer='none'"
            raise ValueError(
                "causal must be True and quantizer 'hard' or 'soft' for init_state, step and "
                f"prefill: nothing else has a state of fixed size; got {got}."
            )

    def init_state(self, batch_shape: tuple[int, ...] = ()) -> Any:
        """The state before the first token, with one batch axis for all of `batch_shape`.

        Raises:
          ValueError: If the layer has no state of fixed size.
        """
        self._streams()
        batch = math.prod(batch_shape)
        if self.quantizer == "soft":
            return soft.soft_init_state(
                batch, self.groups, self.num_codes, self.value_dim, dtype=self.dtype
            )
        return decode.init_state(
            batch,
            self.groups,
            self.num_codes,
            self.value_dim,
            window=self.window,
            block_length=self.block_length,
            cache=self.cache,
            local=self.local,
            dtype=self.dtype,
        )

    def step(
        self,
        state: Any,
        x: Float[Array, "*batch dim"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
    ) -> tuple[Float[Array, "*batch dim"], Any]:
        """One token, at a cost that does not depend on how many there have been.

        Raises:
          TypeError: If `x` is not real.
          ValueError: If the layer has no state of fixed size or shapes do not fit.
        """
        self._streams()
        flat, mask, lead = self._flat(x, mask, axes=1)
        q, k, v, gate, bias = self._operands(flat[:, None])
        q, k, v = (x[:, :, 0] for x in (q, k, v))
        if self.quantizer == "soft":
            out, state = soft.soft_step(
                state, q, k, v, self.codebook(), temperature=self.temperature, mask=mask
            )
        else:
            if bias is not None and bias.ndim == 4:
                bias = bias[:, :, 0]
            out, state = decode.step(
                state, q, k, v, self.codebook(), bias=bias, mask=mask, **self._options()
            )
        return self._finish(out[:, :, None], gate, lead)[..., 0, :], state

    def prefill(
        self,
        state: Any,
        x: Float[Array, "*batch length dim"],
        *,
        mask: Bool[Array, "*batch length"] | None = None,
    ) -> tuple[Float[Array, "*batch length dim"], Any]:
        """Many tokens at once from any state, with the exact state after them.

        Raises:
          TypeError: If `x` is not real.
          ValueError: If the layer has no state of fixed size or shapes do not fit.
        """
        self._streams()
        flat, mask, lead = self._flat(x, mask)
        q, k, v, gate, bias = self._operands(flat)
        if self.quantizer == "soft":
            out, state = soft.soft_prefill(
                state,
                q,
                k,
                v,
                self.codebook(),
                temperature=self.temperature,
                block_length=self.block_length,
                reduction=self.reduction,
                mask=mask,
            )
        else:
            out, state = decode.prefill(
                state,
                q,
                k,
                v,
                self.codebook(),
                bias=bias,
                mask=mask,
                reduction=self.reduction,
                **self._options(),
            )
        return self._finish(out, gate, lead), state
