"""`flax.nnx` layers over the pure functions of `jaxkit.quantize`.

A layer holds a codebook and its statistics, and returns the `VQOutput` (or `FSQOutput`,
`LFQOutput`) of its function. With `train=True` it also stores the new state, as a batch norm does;
`layer.state()` gives the state for the functional form.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit._typing import Array, Bool, DType, Float, Int, Key
from jaxkit.quantize._common import (
    METRICS,
    across,
    check_index,
    check_mask,
    check_vectors,
    select_rows,
)
from jaxkit.quantize.ema import EMAState
from jaxkit.quantize.estimators import ESTIMATORS
from jaxkit.quantize.fsq import FSQOutput, fsq, fsq_code
from jaxkit.quantize.init import data_init, kmeans, uniform_init
from jaxkit.quantize.lfq import LFQOutput, lfq, lfq_code, lfq_entropy_loss
from jaxkit.quantize.losses import commitment_loss
from jaxkit.quantize.product import merge_heads, product_quantize, split_heads
from jaxkit.quantize.residual import residual_init, residual_quantize
from jaxkit.quantize.search import lookup, normalize
from jaxkit.quantize.simvq import simvq_codebook, simvq_init
from jaxkit.quantize.vq import VQOutput, VQState, default_codebook, vector_quantize, vq_init

__all__ = ["FSQ", "LFQ", "CodebookState", "ResidualVQ", "VectorQuantizer"]

LEARNED = ("ema", "loss", "simvq", "frozen")
INITS = ("uniform", "normal")


class CodebookState(nnx.Variable):
    """Codes and statistics that no gradient trains: EMA codes, frozen codes, sums and counts."""


class VectorQuantizer(nnx.Module):
    """A vector quantizer with one codebook, or one for every head.

    Args:
      dim: Features of a vector.
      num_codes: K of each codebook.
      codebook: How codes are learned: `ema`, `loss` (an `nnx.Param`, by the codebook loss), `simvq`
        (frozen codes times a learned matrix, by the same loss) or `frozen`. Default: `loss` for the
        estimator `gumbel`, otherwise `ema`.
      estimator: `ste`, `rotation`, `rotation_unscaled`, `reflection`, `none` or `gumbel`.
      metric: `euclidean` or `cosine`.
      heads: Split vectors into so many parts, each with a code of its own.
      shared: One codebook for all heads.
      init: `uniform` in ±1/K, or `normal`, N(0, 1/d) (always for `simvq`). Better: `initialize`.
      dtype: Of the codebook, float32 or float64.
      rngs: Random keys; `params` is used.
      **options: Of `vector_quantize`: decay, smoothing, weights of losses, revival, temperature….
        `temperature` and the noise of `gumbel` apply in training only.

    Raises:
      ValueError: If an argument is out of range or does not go with another.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = VectorQuantizer(4, 16, estimator="rotation", rngs=nnx.Rngs(0))
      >>> z = jax.random.normal(jax.random.key(0), (32, 4))
      >>> layer.initialize(jax.random.key(1), z)
      >>> out = layer(z, train=True)
      >>> print(out.z_q.shape, out.index.shape, list(out.losses))
      (32, 4) (32,) ['commitment']

    Source: van den Oord et al. 2017 (arXiv 1711.00937); post 10489.
    """

    def __init__(
        self,
        dim: int,
        num_codes: int,
        *,
        codebook: str | None = None,
        estimator: str = "ste",
        metric: str = "euclidean",
        heads: int = 1,
        shared: bool = False,
        init: str = "uniform",
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.dim = check_int("dim", dim, least=1)
        self.num_codes = check_int("num_codes", num_codes, least=1)
        self.heads = check_int("heads", heads, least=1)
        check_choice("estimator", estimator, (*ESTIMATORS, "gumbel"))
        codebook = default_codebook(estimator) if codebook is None else codebook
        check_choice("codebook", codebook, LEARNED)
        check_choice("metric", metric, METRICS)
        check_choice("init", init, INITS)
        if dim % heads:
            raise ValueError(f"heads must divide dim = {dim}; got {heads}.")
        if codebook in ("simvq", "frozen") and options.get("revival_threshold", 0) > 0:
            raise ValueError(
                f"revival_threshold must be 0 for codebook {codebook!r}, whose codes are not "
                f"replaced; got {options['revival_threshold']!r}."
            )
        self.learned = codebook
        self.separate = heads > 1 and not shared
        # A dict would be taken for part of the layer's parameters.
        self.options = nnx.static(
            tuple({"estimator": estimator, "metric": metric, **options}.items())
        )
        key, size = rngs.params(), dim // heads

        def draw(key):
            if codebook == "simvq" or init == "normal":
                return simvq_init(key, num_codes, size, dtype=dtype)[0]
            return uniform_init(key, num_codes, size, dtype=dtype)

        codes = jax.vmap(draw)(jax.random.split(key, heads)) if self.separate else draw(key)
        codes = normalize(codes) if metric == "cosine" else codes
        self.codes = (nnx.Param if codebook == "loss" else CodebookState)(codes)
        if codebook == "simvq":
            eye = jnp.eye(size, dtype=dtype)
            self.weight = nnx.Param(
                jnp.broadcast_to(eye, (*codes.shape[:-2], size, size)) if self.separate else eye
            )
        ema = self._init_state(self.codebook()).ema
        self.sums, self.counts = CodebookState(ema.sums), CodebookState(ema.counts)

    def _init_state(self, codes: Array) -> VQState:
        return jax.vmap(vq_init)(codes) if self.separate else vq_init(codes)

    def codebook(self) -> Float[Array, "*heads codes dim"]:
        """The codes, [codes, dim] or [heads, codes, dim]; of SimVQ the effective ones."""
        codes = self.codes[...]
        if self.learned != "simvq":
            return codes
        apply = jax.vmap(simvq_codebook) if self.separate else simvq_codebook
        return apply(codes, self.weight[...])

    def state(self) -> VQState:
        """The state that `vector_quantize` (with heads: `product_quantize`) takes."""
        return VQState(self.codebook(), EMAState(self.sums[...], self.counts[...]))

    def set_state(self, state: VQState) -> None:
        """Store a state. The codes of SimVQ are those of its matrix and stay."""
        if self.learned != "simvq":
            self.codes[...] = state.codebook
        self.sums[...], self.counts[...] = state.ema

    def initialize(
        self,
        key: Key,
        z: Float[Array, "*batch dim"],
        *,
        method: str = "kmeans",
        steps: int = 20,
        mask: Bool[Array, "*batch"] | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> None:
        """Set the codebook from data and reset its statistics.

        Args:
          key: Random key.
          z: Vectors, several for each code.
          method: `kmeans` or `data`.
          steps: Most updates of `kmeans`.
          mask: False for vectors to leave out.
          axis_name: Mesh axes over which `z` is spread, inside `shard_map`.

        Raises:
          TypeError: If a dtype is wrong.
          ValueError: If a shape or a name is wrong, or for SimVQ, whose codes are a fixed set.
        """
        check_choice("method", method, ("kmeans", "data"))
        check_vectors(z, self.dim)
        if self.learned == "simvq":
            raise ValueError("codebook must not be 'simvq' for initialize: its codes are frozen.")
        metric = dict(self.options)["metric"]

        def fit(key, part, mask):
            if method == "kmeans":
                return kmeans(
                    key,
                    part,
                    self.num_codes,
                    steps=steps,
                    metric=metric,
                    mask=mask,
                    axis_name=axis_name,
                ).codebook
            codes = data_init(key, part, self.num_codes, mask=mask, axis_name=axis_name)
            return normalize(codes) if metric == "cosine" else codes

        parts = split_heads(z, self.heads)
        if self.separate:
            keys = jax.random.split(key, self.heads)
            codes = jax.vmap(fit, in_axes=(0, -2, None))(keys, parts, mask)
        else:
            of_parts = None if mask is None else jnp.repeat(mask[..., None], self.heads, axis=-1)
            codes = fit(key, parts, of_parts)
        codes = codes.astype(self.codes[...].dtype)
        self.set_state(self._init_state(codes))

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        *,
        train: bool = False,
        key: Key | None = None,
        mask: Bool[Array, "*batch"] | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> VQOutput:
        """Quantize.

        Args:
          z: Vectors.
          train: Update statistics (and EMA codes), revive, and store the new state.
          key: Random key, for a temperature, `gumbel` and revival; used in training only.
          mask: False for vectors to leave out.
          axis_name: Mesh axes over which the batch is spread, inside `shard_map`.

        Returns:
          The `VQOutput`; index `[...]`, or `[..., heads]` for more than one head.

        Raises:
          TypeError: If a dtype is wrong.
          ValueError: If a shape is wrong or `key` is missing.
        """
        check_vectors(z, self.dim)
        options = dict(self.options)
        if not train:
            options["temperature"] = 0.0
        quantize = vector_quantize if self.heads == 1 else product_quantize
        out = quantize(
            self.state(),
            z,
            update=train,
            key=key if train else None,
            mask=mask,
            codebook="loss" if self.learned == "simvq" else self.learned,
            axis_name=axis_name,
            **options,
        )
        if train:
            self.set_state(out.state)
        return out

    def decode(self, index: Int[Array, "..."]) -> Array:
        """The codes at `index` (as `__call__` returned it); NaN for the sentinel."""
        codes = self.codebook()
        if dict(self.options)["metric"] == "cosine":
            codes = normalize(codes)
        if self.heads == 1:
            return lookup(codes, index)
        if not self.separate:
            return merge_heads(lookup(codes, index))
        return merge_heads(jax.vmap(lookup, in_axes=(0, -1), out_axes=-2)(codes, index))


class ResidualVQ(nnx.Module):
    """Several vector quantizers, each on what the ones before it left over.

    Args:
      dim: Features of a vector.
      num_codes: K of each stage: one number, or one for every stage.
      stages: Number of stages, if `num_codes` is one number.
      codebook: `ema`, `loss`, `simvq` or `frozen`.
      estimator: Of `estimate`; applied once, or `per_stage`.
      per_stage: See `residual_quantize`.
      init: As in `VectorQuantizer`.
      dtype: Of the codebooks.
      rngs: Random keys; `params` is used.
      **options: Of `vector_quantize`.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = ResidualVQ(4, 16, stages=3, rngs=nnx.Rngs(0))
      >>> z = jax.random.normal(jax.random.key(0), (32, 4))
      >>> layer.initialize(jax.random.key(1), z)
      >>> error = [jnp.mean((z - layer(z, stages=n).z_q) ** 2) for n in (1, 2, 3)]
      >>> print(layer(z).index.shape, bool(error[0] > error[1] > error[2]))
      (32, 3) True

    Source: Zeghidour et al. 2021 (arXiv 2107.03312).
    """

    def __init__(
        self,
        dim: int,
        num_codes: int | Sequence[int],
        *,
        stages: int | None = None,
        codebook: str = "ema",
        estimator: str = "ste",
        per_stage: bool = False,
        init: str = "uniform",
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if isinstance(num_codes, Sequence):
            sizes = tuple(num_codes)
            if stages is not None and stages != len(sizes):
                raise ValueError(
                    f"stages must be {len(sizes)} for num_codes {sizes}; got {stages}."
                )
        else:
            sizes = (num_codes,) * check_int("stages", stages, least=1)
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("metric", options.get("metric", "euclidean"), ("euclidean",))
        self.dim, self.sizes = check_int("dim", dim, least=1), sizes
        self.estimator, self.per_stage = estimator, per_stage
        self.stages = nnx.List(
            VectorQuantizer(
                dim, size, codebook=codebook, init=init, dtype=dtype, rngs=rngs, **options
            )
            for size in sizes
        )
        self.learned = codebook
        self.options = nnx.static(tuple(options.items()))

    def state(self) -> tuple[VQState, ...]:
        """The states that `residual_quantize` takes."""
        return tuple(stage.state() for stage in self.stages)

    def set_state(self, states: Sequence[VQState]) -> None:
        """Store states, one a stage."""
        for stage, state in zip(self.stages, states, strict=True):
            stage.set_state(state)

    def initialize(
        self,
        key: Key,
        z: Float[Array, "*batch dim"],
        *,
        method: str = "kmeans",
        steps: int = 20,
        mask: Bool[Array, "*batch"] | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> None:
        """Fit the codebooks to data one after the other, see `residual_init`.

        Raises:
          TypeError: If a dtype is wrong.
          ValueError: If a shape or a name is wrong, or for SimVQ, whose codes are a fixed set.
        """
        check_vectors(z, self.dim)
        if self.learned == "simvq":
            raise ValueError("codebook must not be 'simvq' for initialize: its codes are frozen.")
        states = residual_init(
            key, z, self.sizes, method=method, steps=steps, mask=mask, axis_name=axis_name
        )
        dtype = self.stages[0].codes[...].dtype
        self.set_state([vq_init(state.codebook.astype(dtype)) for state in states])

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        *,
        train: bool = False,
        key: Key | None = None,
        mask: Bool[Array, "*batch"] | None = None,
        stages: int | Int[Array, "..."] | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> VQOutput:
        """Quantize; index `[..., stages]`.

        Args:
          z: Vectors.
          train: Update statistics (and EMA codes), revive, and store the new states.
          key: Random key, for a temperature and revival.
          mask: False for vectors to leave out.
          stages: Use the first so many stages only.
          axis_name: Mesh axes over which the batch is spread, inside `shard_map`.

        Returns:
          The `VQOutput` of `residual_quantize`.

        Raises:
          TypeError: If a dtype is wrong.
          ValueError: If a shape is wrong or `key` is missing.
        """
        check_vectors(z, self.dim)
        options = dict(self.options)
        if not train:
            options["temperature"] = 0.0
        out = residual_quantize(
            self.state(),
            z,
            estimator=self.estimator,
            per_stage=self.per_stage,
            stages=stages,
            update=train,
            key=key,
            mask=mask,
            codebook="loss" if self.learned == "simvq" else self.learned,
            axis_name=axis_name,
            **options,
        )
        if train:
            self.set_state(out.state)  # type: ignore[arg-type]
        return out

    def decode(self, index: Int[Array, "*batch stages"]) -> Float[Array, "*batch dim"]:
        """Σ_l of the codes at `index` [..., stages]; stages left out (K) count as zeros.

        If no stage has a code, the vector had none: NaN.
        """
        index = check_index(index)
        codes = [
            lookup(stage.codebook(), index[..., i], pad="zeros")
            for i, stage in enumerate(self.stages)
        ]
        total = sum(codes[1:], codes[0])
        sizes = across(jnp.asarray(self.sizes, index.dtype), index)
        none = jnp.all(index >= sizes, axis=-1, keepdims=True)
        return jnp.where(none, jnp.nan, total)


class FSQ(nnx.Module):
    """Finite scalar quantization, without parameters.

    Args:
      levels: L of every feature; `jaxkit.quantize.RECOMMENDED_LEVELS` has the paper's.
      convention: `default`, `paper` or `symmetric`, see `fsq`.
      eps: ε of the first two.

    Raises:
      ValueError: At the first call, as `fsq`.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = FSQ((8, 5, 5, 5))
      >>> out = layer(jnp.array([[-2.0, -0.3, 0.0, 0.4]]))
      >>> print(out.z_q, out.index, layer.num_codes)
      [[-1.  -0.5  0.   0.5]] [688] 1000

    Source: Mentzer et al. 2023 (arXiv 2309.15505).
    """

    def __init__(
        self,
        levels: Sequence[int],
        *,
        convention: str | Sequence[str] = "default",
        eps: float = 1e-3,
    ):
        self.levels = tuple(levels)
        self.convention = convention if isinstance(convention, str) else tuple(convention)
        self.eps = eps
        self.dim, self.num_codes = len(self.levels), 1
        for level in self.levels:
            self.num_codes *= check_int("levels", level, least=2)

    def __call__(
        self, z: Float[Array, "*batch dim"], *, mask: Bool[Array, "*batch"] | None = None
    ) -> FSQOutput:
        """Quantize; see `fsq`."""
        return fsq(z, self.levels, convention=self.convention, eps=self.eps, mask=mask)

    def decode(self, index: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """The codes at `index`; NaN for the sentinel."""
        return fsq_code(index, self.levels, convention=self.convention)


class LFQ(nnx.Module):
    """Look-up-free or binary spherical quantization, with its losses, without parameters.

    Args:
      num_codes: K = 2^d.
      spherical: Normalise first, and code by ±1/√d.
      scale: a, if not spherical.
      bit_order: Of the index: `little` or `big`.
      entropy_weight: Of `E H - ζ H E` (training).
      diversity_weight: ζ.
      inv_temperature: τ.
      group_size: Bits a group of the second entropy, see `lfq_entropies`.
      commitment_weight: Of the loss on z (training).

    Raises:
      ValueError: If `num_codes` is no power of 2 or a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> out, losses = LFQ(16)(jnp.array([[0.3, -0.2, 0.1, -0.4]]))
      >>> print(out.z_q, out.index, list(losses))
      [[ 1. -1.  1. -1.]] [5] ['commitment', 'entropy']

    Source: Yu et al. 2023 (arXiv 2310.05737); Zhao et al. 2024 (arXiv 2406.07548).
    """

    def __init__(
        self,
        num_codes: int,
        *,
        spherical: bool = False,
        scale: float = 1.0,
        bit_order: str = "little",
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        inv_temperature: float = 1.0,
        group_size: int | None = None,
        commitment_weight: float = 0.25,
    ):
        self.num_codes = check_int("num_codes", num_codes, least=2)
        self.dim = self.num_codes.bit_length() - 1
        if self.num_codes != 2**self.dim:
            raise ValueError(f"num_codes must be a power of 2; got {num_codes}.")
        self.spherical = spherical
        self.scale = self.dim**-0.5 if spherical else check_real("scale", scale, above=0)
        self.bit_order = bit_order
        self.entropy_weight = check_real("entropy_weight", entropy_weight, least=0)
        self.diversity_weight = check_real("diversity_weight", diversity_weight, least=0)
        self.inv_temperature = check_real("inv_temperature", inv_temperature, above=0)
        self.group_size = group_size
        self.commitment_weight = check_real("commitment_weight", commitment_weight, least=0)

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> tuple[LFQOutput, dict[str, Array]]:
        """Quantize.

        Args:
          z: Vectors of log2 K features.
          mask: False for vectors to leave out.
          axis_name: Mesh axes over which the batch is spread, inside `shard_map`.

        Returns:
          `(LFQOutput, losses)`, losses weighted.

        Raises:
          TypeError: If a dtype is wrong.
          ValueError: If a shape is wrong.
        """
        check_vectors(z, self.dim)
        check_mask(mask, z.shape[:-1])
        z = select_rows(mask, z)
        z = normalize(z) if self.spherical else z
        out = lfq(z, scale=self.scale, bit_order=self.bit_order, mask=mask)
        losses = {
            "commitment": self.commitment_weight
            * commitment_loss(z, out.z_q, mask=mask, axis_name=axis_name),
            "entropy": self.entropy_weight
            * lfq_entropy_loss(
                z,
                scale=self.scale,
                inv_temperature=self.inv_temperature,
                diversity_weight=self.diversity_weight,
                group_size=self.group_size,
                mask=mask,
                axis_name=axis_name,
            ),
        }
        return out, losses

    def decode(self, index: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """The codes at `index`; NaN for the sentinel."""
        return lfq_code(index, self.dim, scale=self.scale, bit_order=self.bit_order)
