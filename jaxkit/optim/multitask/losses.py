"""Weights from the values of the losses alone: no gradient of a single task is needed."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxkit._checks import check_choice, check_real, is_traced
from jaxkit._dtypes import wide
from jaxkit._typing import Array, ArrayLike, Float, Key
from jaxkit.optim.multitask._gram import check_vector

__all__ = [
    "DWAState",
    "FAMOState",
    "LogScaleState",
    "dwa",
    "dwa_init",
    "equal",
    "famo",
    "famo_init",
    "imtl_l",
    "imtl_l_loss",
    "inverse_reference",
    "log_scale_init",
    "power_mean",
    "power_mean_weights",
    "random_weights",
    "real_time",
    "uncertainty",
    "uncertainty_loss",
]

Kind = Literal["regression", "classification"]


def _values(losses: Any, *, positive: bool = False) -> Array:
    """The losses, detached, in float32 at least; positive where their logarithm is needed."""
    if getattr(losses, "ndim", None) != 1 or len(losses) < 2:
        got = f"shape {losses.shape}" if hasattr(losses, "shape") else repr(losses)
        raise ValueError(f"losses must be a vector of at least 2 losses; got {got}.")
    if positive:
        check_vector("losses", losses, len(losses), positive=True)
    return jax.lax.stop_gradient(losses).astype(wide(losses.dtype))


def _like(old: Any, new: Any) -> Any:
    return jax.tree.map(lambda x, y: y.astype(x.dtype), old, new)


def equal(losses: Float[Array, " tasks"]) -> Float[Array, " tasks"]:
    """1/n: the mean of the losses.

    Example:
      >>> print(equal(jnp.array([1.0, 4.0])))
      [0.5 0.5]

    Source: post 8870.
    """
    return jnp.full_like(_values(losses), 1 / len(losses)).astype(losses.dtype)


def inverse_reference(
    losses: Float[Array, " tasks"], *, reference: ArrayLike
) -> Float[Array, " tasks"]:
    """1/L_i of a model that knows nothing: losses in units of where they start.

    Args:
      losses: of this step; only their number matters.
      reference: at the initialisation (log K for a K-way softmax, E‖y‖² for a regression), or of
        the best constant prediction (the entropy of the labels, the variance of the targets).

    Returns:
      The weights.

    Raises:
      ValueError: reference of wrong length, or not positive.

    Example:
      >>> print(inverse_reference(jnp.array([1.0, 4.0]), reference=[2.0, 4.0]))
      [0.5  0.25]

    Source: post 8870.
    """
    values = _values(losses)
    check_vector("reference", reference, len(losses), positive=True)
    return (1 / jnp.asarray(reference).astype(values.dtype)).astype(losses.dtype)


def real_time(losses: Float[Array, " tasks"]) -> Float[Array, " tasks"]:
    """1/L_i of this step: the gradient of Σ log L_i, so no loss's scale matters.

    Args:
      losses: L; a traced loss that is not positive has a weight that is not, or not finite.

    Returns:
      The weights.

    Raises:
      ValueError: a loss is not positive.

    Example:
      >>> print(real_time(jnp.array([1.0, 4.0])))
      [1.   0.25]

    Source: post 8870.
    """
    return (1 / _values(losses, positive=True)).astype(losses.dtype)


def power_mean(losses: Float[Array, " tasks"], *, gamma: float) -> Float[Array, ""]:
    """((1/n) Σ L_i^γ)^{1/γ}: the mean for γ = 1, geometric mean for 0, extremes for ±∞.

    Its gradient is that of the losses with `power_mean_weights`.

    Args:
      losses: L, positive.
      gamma: γ, static.

    Returns:
      The mean.

    Raises:
      ValueError: a loss is not positive, or gamma is not a number.

    Example:
      >>> print(power_mean(jnp.array([0.5, 2.0, 8.0]), gamma=0.0))
      2.0

    Source: post 8870.
    """
    _check_gamma(losses, gamma)
    values = losses.astype(wide(losses.dtype))
    if gamma == 1:
        return jnp.mean(values).astype(losses.dtype)
    if math.isinf(gamma):
        return (jnp.max(values) if gamma > 0 else jnp.min(values)).astype(losses.dtype)
    logs = jnp.log(values)
    middle = jnp.mean(logs)
    if gamma == 0:
        return jnp.exp(middle).astype(losses.dtype)
    if abs(gamma) < 0.1:  # the sum is n (1 + O(γ)): its logarithm over γ would be rounding
        excess = jnp.log1p(jnp.mean(jnp.expm1(gamma * (logs - middle)))) / gamma
        return jnp.exp(middle + excess).astype(losses.dtype)
    total = jax.nn.logsumexp(gamma * logs) - math.log(len(losses))
    return jnp.exp(total / gamma).astype(losses.dtype)


def power_mean_weights(losses: Float[Array, " tasks"], *, gamma: float) -> Float[Array, " tasks"]:
    """∂L(γ)/∂L_i = (1/n) (L_i/L(γ))^{γ−1}, with Σ w_i L_i = L(γ).

    Args:
      losses: L, positive.
      gamma: γ, static; the extremes share their weight among equal losses.

    Returns:
      The weights.

    Raises:
      ValueError: a loss is not positive, or gamma is not a number.

    Example:
      >>> print(power_mean_weights(jnp.array([0.5, 2.0, 8.0]), gamma=0.0))
      [1.3333334  0.33333334 0.08333334]

    Source: post 8870.
    """
    _check_gamma(losses, gamma)
    values = _values(losses)
    if math.isinf(gamma):
        extreme = (values == power_mean(values, gamma=gamma)).astype(values.dtype)
        return (extreme / jnp.sum(extreme)).astype(losses.dtype)
    if gamma == 1:
        return equal(losses)
    ratio = jnp.log(values) - jnp.log(power_mean(values, gamma=gamma))
    return (jnp.exp((gamma - 1) * ratio) / len(losses)).astype(losses.dtype)


def _check_gamma(losses: Any, gamma: float) -> None:
    if is_traced(gamma) or not isinstance(gamma, (int, float)) or math.isnan(gamma):
        raise ValueError(f"gamma must be a static number; got {gamma!r}.")
    _values(losses, positive=gamma != 1)


def random_weights(losses: Float[Array, " tasks"], *, key: Key) -> Float[Array, " tasks"]:
    """softmax of N(0, 1): the baseline that a method must beat.

    Example:
      >>> w = random_weights(jnp.ones(3), key=jax.random.key(0))
      >>> print(w.shape, w.sum().round(5))
      (3,) 1.0

    Source: Lin et al. 2021 (arXiv 2111.10603).
    """
    values = _values(losses)
    noise = jax.random.normal(key, values.shape, values.dtype)
    return jax.nn.softmax(noise).astype(losses.dtype)


class LogScaleState(NamedTuple):
    """The learned s of `uncertainty` and `imtl_l`, `[tasks]`."""

    s: Array


def log_scale_init(tasks: int) -> LogScaleState:
    """s = 0.

    Example:
      >>> print(log_scale_init(2).s)
      [0. 0.]
    """
    return LogScaleState(jnp.zeros(tasks))


def uncertainty_loss(
    losses: Float[Array, " tasks"], s: Float[Array, " tasks"], *, kind: Kind = "regression"
) -> Float[Array, ""]:
    r"""Σ L_i e^{−s_i}/2 + s_i/2, or Σ L_i e^{−s_i} + s_i/2 for classification.

    To be minimised over s too, for instance with s among the parameters. At the optimum over s the
    first is ½ Σ (1 + log L_i): real-time weights again.

    Args:
      losses: L.
      s: logarithms of the tasks' variances.
      kind: "regression" or "classification".

    Returns:
      The loss, differentiable in both.

    Raises:
      ValueError: unknown kind, s of wrong length.

    Example:
      >>> print(uncertainty_loss(jnp.array([1.0, 4.0]), jnp.log(jnp.array([1.0, 4.0]))))
      1.6931472

    Source: Kendall et al. 2018 (arXiv 1705.07115); post 8870.
    """
    check_choice("kind", kind, ("regression", "classification"))
    values, s = _with_scales(losses, s)
    half = 0.5 if kind == "regression" else 1.0
    return jnp.sum(half * values * jnp.exp(-s) + s / 2).astype(losses.dtype)


def _with_scales(losses: Array, s: Array) -> tuple[Array, Array]:
    """Both in the wider type, not detached."""
    _values(losses)
    check_length("s", s, losses)
    dtype = wide(losses.dtype, s.dtype)
    return losses.astype(dtype), s.astype(dtype)


def check_length(name: str, value: Any, losses: Array) -> None:
    """Raise `ValueError` unless there is one entry a task."""
    if value.shape != losses.shape:
        raise ValueError(f"{name} must have shape {losses.shape}; got {value.shape}.")


def uncertainty(
    losses: Float[Array, " tasks"],
    state: LogScaleState,
    *,
    kind: Kind = "regression",
    learning_rate: float = 1e-2,
) -> tuple[Float[Array, " tasks"], LogScaleState]:
    """Uncertainty weighting with s learned by a gradient step of its own in every step.

    Args:
      losses: L.
      state: from `log_scale_init`, or the step before.
      kind: "regression" (w = e^{−s}/2) or "classification" (w = e^{−s}).
      learning_rate: of s.

    Returns:
      w, and the new state.

    Raises:
      ValueError: unknown kind.

    Example:
      >>> w, state = uncertainty(jnp.array([1.0, 3.0]), log_scale_init(2), learning_rate=0.1)
      >>> print(w, state.s)
      [0.5 0.5] [0.  0.1]

    Source: Kendall et al. 2018 (arXiv 1705.07115); post 8870.
    """
    check_choice("kind", kind, ("regression", "classification"))
    check_real("learning_rate", learning_rate, least=0)
    check_length("state.s", state.s, losses)
    values = _values(losses)
    s = state.s.astype(values.dtype)
    weights = jnp.exp(-s) * (0.5 if kind == "regression" else 1.0)
    new = s - learning_rate * (0.5 - weights * values)
    return weights.astype(losses.dtype), _like(state, LogScaleState(new))


def imtl_l_loss(losses: Float[Array, " tasks"], s: Float[Array, " tasks"]) -> Float[Array, ""]:
    """Σ e^{s_i} L_i − s_i, to be minimised over s too; then e^{s_i} L_i = 1.

    Args:
      losses: L.
      s: logarithms of the weights.

    Returns:
      The loss, differentiable in both.

    Raises:
      ValueError: s of wrong length.

    Example:
      >>> print(imtl_l_loss(jnp.array([1.0, 4.0]), jnp.zeros(2)))
      5.0

    Source: Liu et al. 2021 (IMTL, ICLR).
    """
    values, s = _with_scales(losses, s)
    return jnp.sum(jnp.exp(s) * values - s).astype(losses.dtype)


def imtl_l(
    losses: Float[Array, " tasks"], state: LogScaleState, *, learning_rate: float = 1e-2
) -> tuple[Float[Array, " tasks"], LogScaleState]:
    """IMTL-L: w = e^s, with s learned by a gradient step of its own in every step.

    Args:
      losses: L.
      state: from `log_scale_init`, or the step before.
      learning_rate: of s.

    Returns:
      w, and the new state.

    Example:
      >>> w, state = imtl_l(jnp.array([1.0, 3.0]), log_scale_init(2), learning_rate=0.1)
      >>> print(w, state.s)
      [1. 1.] [ 0.  -0.2]

    Source: Liu et al. 2021 (IMTL, ICLR).
    """
    check_real("learning_rate", learning_rate, least=0)
    check_length("state.s", state.s, losses)
    values = _values(losses)
    s = state.s.astype(values.dtype)
    new = s - learning_rate * (jnp.exp(s) * values - 1)
    return jnp.exp(s).astype(losses.dtype), _like(state, LogScaleState(new))


class DWAState(NamedTuple):
    """Losses of the two steps before, and the number of steps seen."""

    last: Array
    before: Array
    steps: Array


def dwa_init(tasks: int) -> DWAState:
    """No step seen.

    Example:
      >>> int(dwa_init(2).steps)
      0
    """
    return DWAState(jnp.ones(tasks), jnp.ones(tasks), jnp.zeros([], jnp.int32))


def dwa(
    losses: Float[Array, " tasks"], state: DWAState, *, temperature: float = 2.0
) -> tuple[Float[Array, " tasks"], DWAState]:
    r"""n softmax_i(L_i(t−1)/L_i(t−2)/T): more weight to losses that fall slowly.

    The first two steps have weights one. Losses of single batches are noisy: the authors average
    over an epoch.

    Args:
      losses: L(t).
      state: from `dwa_init`, or the step before.
      temperature: T.

    Returns:
      w, and the new state.

    Raises:
      ValueError: temperature not positive.

    Example:
      >>> state = dwa_init(2)
      >>> for losses in ([4.0, 1.0], [2.0, 1.0], [1.0, 1.0]):
      ...     w, state = dwa(jnp.array(losses), state)
      >>> print(jnp.array_str(w, precision=4))
      [0.8756 1.1244]

    Source: Liu et al. 2019 (arXiv 1803.10704).
    """
    check_real("temperature", temperature, above=0)
    check_length("state.last", state.last, losses)
    values = _values(losses)
    ratio = state.last.astype(values.dtype) / state.before.astype(values.dtype)
    weights = len(losses) * jax.nn.softmax(ratio / temperature)
    weights = jnp.where(state.steps < 2, 1, weights)
    new = DWAState(values, state.last, optax.safe_increment(state.steps))
    return weights.astype(losses.dtype), _like(state, new)


class FAMOState(NamedTuple):
    """Logits z of the weights, Adam's two moments, and the losses of the step before."""

    z: Array
    mu: Array
    nu: Array
    last: Array
    steps: Array


def famo_init(tasks: int) -> FAMOState:
    """z = 0.

    Example:
      >>> print(famo_init(2).z)
      [0. 0.]
    """
    zeros = jnp.zeros(tasks)
    return FAMOState(zeros, zeros, zeros, jnp.ones(tasks), jnp.zeros([], jnp.int32))


def famo(
    losses: Float[Array, " tasks"],
    state: FAMOState,
    *,
    lower: ArrayLike | None = None,
    learning_rate: float = 0.025,
    decay: float = 0.01,
) -> tuple[Float[Array, " tasks"], FAMOState]:
    r"""FAMO: all losses fall at the same relative rate, without the gradient of any single task.

    Minimise Σ p_i log(L_i − b_i)/c with p = softmax(z), which is w_i = p_i/(c (L_i − b_i)) with
    Σ w = 1; z follows the change of log(L − b) since the step before, by Adam: a task that fell
    more gets less. The authors compare both losses on one batch.

    Args:
      losses: L(t).
      state: from `famo_init`, or the step before.
      lower: b, lower bounds of the losses; by default 0.
      learning_rate: of z.
      decay: L2 decay of z.

    Returns:
      w, and the new state.

    Raises:
      ValueError: a loss not above its bound, bounds of wrong length.

    Example:
      >>> w, state = famo(jnp.array([1.0, 4.0]), famo_init(2))
      >>> print(w)
      [0.8 0.2]

    Source: Liu et al. 2023 (arXiv 2306.03792).
    """
    check_real("learning_rate", learning_rate, least=0)
    check_real("decay", decay, least=0)
    check_length("state.z", state.z, losses)
    values = _values(losses)
    if lower is not None:
        bounds = jnp.asarray(lower).astype(values.dtype)
        check_length("lower", bounds, losses)
        values = values - bounds
    if not is_traced(values):
        check_vector("losses less lower", values, len(losses), positive=True)
    z, mu, nu, last = (x.astype(values.dtype) for x in state[:4])
    change = jnp.log(last) - jnp.log(values)
    p = jax.nn.softmax(z)
    slope = jnp.where(state.steps > 0, p * (change - p @ change) + decay * z, 0)
    mu, nu = 0.9 * mu + 0.1 * slope, 0.999 * nu + 0.001 * slope**2
    # The first step has nothing to compare with.
    updates = jnp.maximum(state.steps, 1).astype(values.dtype)
    size = jnp.sqrt(nu / (1 - 0.999**updates)) + 1e-8
    z = z - learning_rate * mu / (1 - 0.9**updates) / size
    weights = jax.nn.softmax(z) / values
    new = FAMOState(z, mu, nu, values, optax.safe_increment(state.steps))
    return (weights / jnp.sum(weights)).astype(losses.dtype), _like(state, new)
