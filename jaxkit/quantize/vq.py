"""The whole step of a vector quantizer, `(state, z) -> (z_q, index, losses, new_state)`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_real, is_traced
from jaxkit._typing import Array, Bool, Float, Int, Key
from jaxkit.quantize._common import (
    METRICS,
    check_codebook,
    check_mask,
    check_vectors,
    select_rows,
    wide_dtype,
)
from jaxkit.quantize._sharding import BATCH, EVERYWHERE, VECTORS, automatic
from jaxkit.quantize.ema import (
    EMAState,
    batch_statistics,
    ema_codebook,
    ema_init,
    ema_update,
    revive_rows,
)
from jaxkit.quantize.estimators import ESTIMATORS, estimate, gumbel_softmax_code
from jaxkit.quantize.losses import (
    codebook_loss,
    commitment_loss,
    entropy_loss,
    orthogonality_loss,
)
from jaxkit.quantize.search import lookup, nearest_code, normalize, sample_code

__all__ = ["CODEBOOKS", "VQOutput", "VQState", "vector_quantize", "vq_init"]

CODEBOOKS = ("ema", "loss", "frozen")


class VQState(NamedTuple):
    """A codebook and its statistics.

    Attributes:
      codebook: Codes. Take gradients with respect to it if it is learned by a loss.
      ema: Running sums and counts. The counts say which codes are dead, however codes are learned.
    """

    codebook: Float[Array, "codes dim"]
    ema: EMAState


class VQOutput(NamedTuple):
    """What a quantizer returns.

    Attributes:
      z_q: The codes, with a gradient to the encoder.
      index: int32; the sentinel K for vectors that are masked or not finite.
      losses: Scalars by name, already weighted: add them all to the task's loss.
      state: The new state.
    """

    z_q: Float[Array, "*batch dim"]
    index: Int[Array, "*batch"]  # type: ignore[assignment]
    losses: dict[str, Array]
    state: VQState


def vq_init(codebook: Float[Array, "codes dim"], *, count: float = 1.0) -> VQState:
    """The state of a codebook: N = count, m = count · e.

    Args:
      codebook: Codes, from `data_init`, `kmeans` or `uniform_init`.
      count: N; small if the first batches shall weigh more.

    Returns:
      The state.

    Raises:
      TypeError: If the codebook is not real floating-point.
      ValueError: If its shape or `count` is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> print(vq_init(jnp.eye(2)).ema.counts)
      [1. 1.]
    """
    return VQState(codebook, ema_init(codebook, count=count))


def _used(number: Any) -> bool:
    """Whether a weight, a threshold or a temperature is not known to be 0."""
    return is_traced(number) or number > 0


def default_codebook(estimator: str) -> str:
    """How codes are learned unless one says: by Gumbel-softmax's own gradient, else by averages."""
    return "loss" if estimator == "gumbel" else "ema"


def _update(state, z, index, *, key, codebook, metric, mask, axis_name, decay, smoothing, revival):
    """The state after a batch. `z` is normalised if the metric is the cosine."""
    sums, counts = batch_statistics(
        z, index, state.codebook.shape[0], mask=mask, axis_name=axis_name
    )
    ema = ema_update(state.ema, sums, counts, decay=decay)
    codes = jax.lax.stop_gradient(state.codebook)
    if codebook == "ema":
        codes = ema_codebook(ema, previous=codes, **smoothing)
        codes = normalize(codes) if metric == "cosine" else codes
    threshold, reset_size = revival
    if _used(threshold):
        ema, replaced, rows = revive_rows(
            key, ema, z, threshold=threshold, reset_size=reset_size, mask=mask, axis_name=axis_name
        )
        codes = jnp.where(replaced[:, None], rows.astype(codes.dtype), codes)
    return VQState(codes, ema)


@automatic(VQOutput._make((VECTORS, BATCH, EVERYWHERE, EVERYWHERE)))
def vector_quantize(
    state: VQState,
    z: Float[Array, "*batch dim"],
    *,
    update: bool = False,
    key: Key | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    codebook: str | None = None,
    estimator: str = "ste",
    metric: str = "euclidean",
    decay: float = 0.99,
    smoothing: str = "laplace",
    epsilon: float = 1e-5,
    floor: float = 0.01,
    revival_threshold: float = 0.0,
    reset_size: float | None = None,
    temperature: float = 0.0,
    gumbel_temperature: float = 1.0,
    commitment_weight: float | None = None,
    codebook_weight: float | None = None,
    orthogonality_weight: float = 0.0,
    entropy_weight: float = 0.0,
    entropy_temperature: float = 1.0,
    diversity_weight: float = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str = "auto",
) -> VQOutput:
    """Replace every vector by its code.

    With the nearest code i (the search), q = e_i (the look-up) and z_q = q with the estimator's
    gradient; the losses

        commitment_weight · mean (z - sg q)²,    codebook_weight · mean (q - sg z)²

    (the second for `codebook="loss"`), and, if weighted, the regularisers of
    `jaxkit.quantize.losses`; then, if `update`, the new statistics, codes, and revival, all from
    this batch. The codes returned are those before the update. With `metric="cosine"` both `z` and
    the codes are normalised first, and `z_q` is a unit vector. A loss of weight 0 is left out.

    With `estimator="gumbel"` codes learn by its gradient, and both losses are off by default: see
    `gumbel_softmax_code` for why.

    A vector that is not finite gets the index K and z_q = NaN, so that every loss shows it; it
    enters neither the statistics nor a revival. A masked vector gets the index K and z_q = 0, and
    no gradient.

    Args:
      state: Codebook and statistics, from `vq_init`.
      z: Vectors.
      update: Return a new state (training), rather than the same.
      key: Random key, for `temperature`, `gumbel` (which without one takes the nearest code) and
        revival; the same on all devices.
      mask: False for vectors to leave out.
      codebook: How codes are learned: `ema`, `loss` (by their gradient) or `frozen`. Default:
        `loss` for `gumbel`, otherwise `ema`.
      estimator: `ste`, `rotation`, `rotation_unscaled`, `reflection`, `none`, see `estimate`; or
        `gumbel`, see `gumbel_softmax_code`.
      metric: `euclidean` or `cosine`.
      decay: γ in [0, 1).
      smoothing: `laplace`, `none` or `clip`, see `ema_codebook`; with `epsilon`, `floor`.
      epsilon: ε of `laplace`.
      floor: Of `clip`.
      revival_threshold: Codes with a count below it are replaced by vectors of the batch; 0: none.
      reset_size: Their new count. Default: the threshold.
      temperature: Above 0, codes are drawn (`sample_code`) instead of taking the nearest.
      gumbel_temperature: Of the relaxation, for `gumbel`.
      commitment_weight: Weight of the loss on z. Default: 0.25; 0 for `gumbel`.
      codebook_weight: Weight of the loss on the codes, for `codebook="loss"`. Default: 1; 0 for
        `gumbel`.
      orthogonality_weight: Weight of `orthogonality_loss`.
      entropy_weight: Weight of `entropy_loss`, with the next two.
      entropy_temperature: Of the soft assignment.
      diversity_weight: ζ.
      axis_name: Mesh axes over which the batch is spread, inside `shard_map`.
      implementation: Of the search, see `jaxkit_kernels`.

    Returns:
      `VQOutput(z_q, index, losses, state)`: `z_q` in the dtype of `z`, losses in float32 (float64
      if an argument has it).

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape, a name or a number is wrong, or `key` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> state = vq_init(jnp.array([[0.0], [10.0]]))
      >>> z = jnp.array([[1.0], [2.0], [11.0]])
      >>> out = vector_quantize(state, z, update=True, decay=0.5)
      >>> print(out.z_q[:, 0], out.index, {k: float(v) for k, v in out.losses.items()})
      [ 0.  0. 10.] [0 0 1] {'commitment': 0.5}
      >>> [f"{code:.3f}" for code in out.state.codebook[:, 0]]
      ['1.000', '10.500']

    Source: van den Oord et al. 2017 (arXiv 1711.00937); Fifty et al. 2024 (arXiv 2410.06424); post
    10489.
    """
    check_choice("estimator", estimator, (*ESTIMATORS, "gumbel"))
    gumbel = estimator == "gumbel"
    codebook = default_codebook(estimator) if codebook is None else codebook
    check_choice("codebook", codebook, CODEBOOKS)
    if commitment_weight is None:
        commitment_weight = 0.0 if gumbel else 0.25
    if codebook_weight is None:
        codebook_weight = 0.0 if gumbel else 1.0
    check_choice("metric", metric, METRICS)
    check_vectors(z, check_codebook(state.codebook)[1])
    check_mask(mask, z.shape[:-1])
    for name, value in (
        ("revival_threshold", revival_threshold),
        ("temperature", temperature),
        ("commitment_weight", commitment_weight),
        ("codebook_weight", codebook_weight),
        ("orthogonality_weight", orthogonality_weight),
        ("entropy_weight", entropy_weight),
    ):
        check_real(name, value, least=0)
    reviving = _used(revival_threshold)
    if reviving and codebook == "frozen":
        raise ValueError(
            f"revival_threshold must be 0 for a frozen codebook; got {revival_threshold!r}."
        )
    sampling = _used(temperature)
    if key is None and (sampling or (update and (gumbel or reviving))):
        raise ValueError(
            "key must be a random key for temperature > 0, and for an update with estimator "
            "'gumbel' or revival_threshold > 0; got None."
        )
    # Without a key nothing below is random.
    search_key, revival_key = jax.random.split(jax.random.key(0) if key is None else key)
    if axis_name is not None:  # other noise for the vectors of other devices
        search_key = jax.random.fold_in(search_key, jax.lax.axis_index(axis_name))

    dtype, wide = z.dtype, wide_dtype(z, state.codebook)
    codes = state.codebook.astype(wide)
    # What masked rows hold, NaN included, must not reach a gradient.
    z = select_rows(mask, z)
    if metric == "cosine":
        z, codes = normalize(z.astype(wide)).astype(dtype), normalize(codes)

    if gumbel:
        z_q, index = gumbel_softmax_code(
            None if key is None else search_key,
            z,
            jax.lax.stop_gradient(codes) if codebook == "ema" else codes,
            temperature=gumbel_temperature,
            metric=metric,
            mask=mask,
        )
    elif sampling:
        index = sample_code(search_key, z, codes, temperature=temperature, metric=metric, mask=mask)
    else:
        index = nearest_code(z, codes, metric=metric, mask=mask, implementation=implementation)
    q = select_rows(mask, lookup(codes, index))
    if not gumbel:
        z_q = select_rows(mask, estimate(z, q.astype(dtype), estimator=estimator))

    of_batch: dict[str, Any] = {"mask": mask, "axis_name": axis_name}
    losses = {}
    if _used(commitment_weight):
        losses["commitment"] = commitment_weight * commitment_loss(z, q, **of_batch)
    if codebook == "loss" and _used(codebook_weight):
        losses["codebook"] = codebook_weight * codebook_loss(z, q, **of_batch)
    if _used(orthogonality_weight):
        losses["orthogonality"] = orthogonality_weight * orthogonality_loss(codes)
    if _used(entropy_weight):
        losses["entropy"] = entropy_weight * entropy_loss(
            z,
            codes,
            temperature=entropy_temperature,
            diversity_weight=diversity_weight,
            **of_batch,
        )
    if update:
        state = _update(
            state,
            jax.lax.stop_gradient(z),
            index,
            key=revival_key,
            codebook=codebook,
            metric=metric,
            decay=decay,
            smoothing={"smoothing": smoothing, "epsilon": epsilon, "floor": floor},
            revival=(revival_threshold, reset_size),
            **of_batch,
        )
    return VQOutput(z_q, index, losses, state)
