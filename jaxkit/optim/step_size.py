"""Step sizes learned by exponentiated gradient: a global scale and one gain per coordinate.

The update of `exponentiated.py`, taken on the step size: it grows while gradients keep their
direction and shrinks while they turn back. For learning rates that are badly known, and for data
that shift.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxkit._checks import check_choice, check_real, is_traced
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Int
from jaxkit.optim._leaves import flatten
from jaxkit.optim.loss_scaling import all_finite

__all__ = ["EGDDState", "EGStepSizeState", "StepSizes", "eg_sgd", "eg_stepsize", "egdd"]

Rate: TypeAlias = float | Array | Callable[[Any], Any]
Bounds: TypeAlias = tuple[float, float]
Axes: TypeAlias = str | tuple[str, ...] | None


class StepSizes(NamedTuple):
    """Scale and gains as logarithms, which cannot overflow, and the average behind the gains."""

    count: Int[Array, ""]  # type: ignore[assignment]  # hides the tuple's method
    """Steps whose gradients were finite."""
    log_scale: Any
    """log s: a scalar, or one for each leaf; `None` without a scale."""
    log_gain: Any
    """log p, as large as the parameters; `None` without gains."""
    average: Any
    """Moving average ḡ of the gradients, from 0; `None` where no gain looks at it."""

    @property
    def scale(self) -> Any:
        """s."""
        return jax.tree.map(jnp.exp, self.log_scale)

    @property
    def gain(self) -> Any:
        """p."""
        return jax.tree.map(jnp.exp, self.log_gain)


class EGStepSizeState(NamedTuple):
    """Step sizes, the optimizer inside, and what it last did."""

    step_sizes: StepSizes
    inner_state: Any
    previous: Any
    """The last update before its scale, 0 where not finite; `None` where no signal looks at it."""


class EGDDState(NamedTuple):
    """Step sizes and the momentum v, rates and gains included."""

    step_sizes: StepSizes
    momentum: Any


def eg_stepsize(
    inner: optax.GradientTransformation,
    *,
    gain_lr: float = 0.01,
    scale_lr: float = 0.001,
    beta: float = 0.9,
    gain_bounds: Bounds = (1e-2, 1e2),
    scale_bounds: Bounds = (0.1, 10.0),
    gain_signal: Literal["ema", "direction"] = "ema",
    raw: bool = False,
    where: Literal["post", "pre"] = "post",
    scale_scope: Literal["global", "leaf"] = "global",
    scale_rule: Literal["exponentiated", "additive"] = "exponentiated",
    axis_name: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimizer with its step sizes adapted by exponentiated gradient.

    Around the updates `d_t` of `inner`, with a scale `s` and gains `p` that start at 1, step t is

        s <- clip(s exp(scale_lr A)),    A = -cos(D_{t-1}, g_t)
        p <- clip(p exp(gain_lr h)),     h = sign(g_t) sign(ḡ_{t-1})
        D_t = p d_t,                     ḡ_t = β ḡ_{t-1} + (1 - β) g_t
        θ_t = θ_{t-1} + s D_t

    since `∂L/∂s = <D_{t-1}, g_t>` and `∂L/∂p = s d_{t-1} g_t`: both look at the past alone, and the
    first step leaves s and p at 1. A gradient that is not finite leaves s, p and ḡ as they are and
    goes on to `inner`; products so large that they overflow leave s. Nothing is differentiated
    through s and p.

    State besides that of `inner`, in float32 (float64 for float64 parameters; bfloat16 would round
    steps of one percent): 4 bytes a parameter each for p, ḡ and D, and two scalars. What is not
    needed is not kept: a `gain_lr` of 0 saves p and ḡ, a `scale_lr` of 0 saves D.

    Args:
      inner: An optax optimizer with its learning rate.
      gain_lr: Rate of the gains; 0 for none.
      scale_lr: Rate of the scale; 0 for none.
      beta: Decay β in [0, 1) of the average gradient.
      gain_bounds: Least and largest gain, with 1 between them.
      scale_bounds: Least and largest scale, likewise.
      gain_signal: "ema" as above, or "direction", `h = -sign(d_{t-1}) sign(g_t)`.
      raw: Products in place of cosine and signs: `A = -<D_{t-1}, g_t>`, `h = g_t ḡ_{t-1} /
        (1 - β^{t-1})` or `-d_{t-1} g_t`. They grow with the square of the loss, and the rates have
        to shrink with it.
      where: "post" as above, or "pre": `d_t` is the update for the gradient `p g_t`, and `D_t =
        d_t`. An optimizer that divides each coordinate by its own size, such as Adam, cancels gains
        in front of it, hence "post".
      scale_scope: One scale for all leaves ("global"), or one for each ("leaf").
      scale_rule: "exponentiated" as above, or "additive", `s <- clip(s + scale_lr A)`, the
        hypergradient's.
      axis_name: Inside `shard_map`, the mesh axes over which every parameter is split: the scale
        needs sums over all of them. Under plain `jit` these come by themselves.

    Returns:
      An optax transformation. `state.step_sizes.scale` and `.gain` are s and p.

    Raises:
      ValueError: `beta` outside [0, 1), a negative rate, bounds that do not contain 1, an unknown
        choice.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> optimizer = eg_stepsize(optax.sgd(1e-3), scale_lr=0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(10):
      ...     updates, state = optimizer.update(params, state, params)  # L = |θ|²/2
      ...     params = optax.apply_updates(params, updates)
      >>> print(state.step_sizes.scale.round(2))  # e^0.9
      2.46

    Source: post 8968; Amid, Anil, Fifty, Warmuth 2022 (arXiv 2202.00145); Baydin et al. 2018 for
    the additive rule (arXiv 1703.04782).
    """
    rule = _Rule(
        gain_lr,
        scale_lr,
        beta,
        gain_bounds,
        scale_bounds,
        raw,
        scale_scope,
        axis_name,
        gain_signal,
        scale_rule,
    )
    check_choice("where", where, ("post", "pre"))
    wide_inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> EGStepSizeState:
        return EGStepSizeState(
            step_sizes=rule.init(params),
            inner_state=wide_inner.init(params),
            previous=_zeros(params) if rule.looks_back else None,
        )

    def update(
        grads: Any, state: EGStepSizeState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EGStepSizeState]:
        past = jax.tree.map(jnp.negative, state.previous)
        sizes = rule.update(grads, past, state.step_sizes)
        if where == "pre":
            gained = _times(grads, sizes.gain)
            grads = jax.tree.map(lambda x, g: x.astype(g.dtype), gained, grads)
        updates, inner_state = wide_inner.update(grads, state.inner_state, params, **extra_args)
        moves = _times(updates, sizes.gain if where == "post" else None)
        previous = None
        if rule.looks_back:
            previous = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), moves)
        updates = _scaled(moves, sizes.scale, like=updates)
        return updates, EGStepSizeState(sizes, inner_state, previous)

    return optax.GradientTransformationExtraArgs(init, update)


def egdd(
    learning_rate: Rate,
    momentum: float = 0.9,
    *,
    gain_lr: float = 0.01,
    scale_lr: float = 0.001,
    beta: float = 0.9,
    gain_bounds: Bounds = (1e-2, 1e2),
    scale_bounds: Bounds = (0.1, 10.0),
    raw: bool = False,
    scale_scope: Literal["global", "leaf"] = "global",
    axis_name: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EGDD: gradient descent with momentum, a scale and gains by exponentiated gradient.

    Step t, in this order, from `v = ḡ = 0` and `s = p = 1`:

        s <- clip(s exp(scale_lr cos(g_t, v_{t-1})))
        p <- clip(p exp(gain_lr sign(g_t) sign(ḡ_{t-1})))
        v <- μ v + η p g_t
        ḡ <- β ḡ + (1 - β) g_t
        θ <- θ - s v

    It is `eg_stepsize` with `where="pre"` around momentum that has the rate inside, at 12 bytes a
    parameter in all: v, p and ḡ.

    Args:
      learning_rate: η > 0, or a schedule of the 0-based step (steps with a gradient that is not
        finite do not count).
      momentum: μ in [0, 1).
      gain_lr: As for `eg_stepsize`, and so are the others.
      scale_lr: Rate of the scale.
      beta: Decay of the average gradient.
      gain_bounds: Least and largest gain.
      scale_bounds: Least and largest scale.
      raw: `<g_t, v_{t-1}>` and `g_t ḡ_{t-1} / (1 - β^{t-1})` in place of cosine and signs.
      scale_scope: "global", or "leaf", as in the code that the authors' group published.
      axis_name: As for `eg_stepsize`.

    Returns:
      An optax transformation, with no learning rate to follow.

    Raises:
      ValueError: As for `eg_stepsize`; a rate that is not positive; `momentum` outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer, params = egdd(0.05), jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(jnp.array([1.0, 0.1, 10.0]), state, params)
      >>> print(100 * state.step_sizes.log_gain)
      [1. 1. 1.]

    Source: Amid, Anil, Fifty, Warmuth 2022 (arXiv 2202.00145); the order of the steps is that of
    the code in tensorflow/lingvo; post 8968.
    """
    rule = _Rule(gain_lr, scale_lr, beta, gain_bounds, scale_bounds, raw, scale_scope, axis_name)
    if not callable(learning_rate):
        check_real("learning_rate", learning_rate, above=0)
    _check_decay("momentum", momentum)

    def init(params: Any) -> EGDDState:
        return EGDDState(rule.init(params), _zeros(params))

    def update(
        grads: Any, state: EGDDState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EGDDState]:
        del extra_args
        count = state.step_sizes.count
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        sizes = rule.update(grads, state.momentum, state.step_sizes)
        v = jax.tree.map(
            lambda v, g: _as(momentum, v) * v + _as(rate, v) * g.astype(v.dtype),
            state.momentum,
            _times(grads, sizes.gain),
        )
        descent = jax.tree.map(jnp.negative, v)
        updates = _scaled(descent, sizes.scale, like=grads if params is None else params)
        return updates, EGDDState(sizes, v)

    return optax.GradientTransformationExtraArgs(init, update)


def eg_sgd(learning_rate: Rate, gamma: float) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent with a gain for each coordinate, in the short form of the post.

        ν <- ν exp(γ g_{t-1} g_t),    θ <- θ - η ν g_t

    from `ν = 1`, without bounds. It is `eg_stepsize` around `optax.sgd` with raw products, `beta=0`
    and no scale, at 8 bytes a parameter. γ has absorbed η, and has to shrink with the square of the
    loss.

    Args:
      learning_rate: η, or a schedule.
      gamma: γ.

    Returns:
      An optax transformation with an `EGStepSizeState`.

    Raises:
      ValueError: A rate that is not positive, a negative γ.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer, params = eg_sgd(0.1, 0.5), jnp.array([1.0, -2.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(5):
      ...     updates, state = optimizer.update(params, state, params)  # L = |θ|²/2
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(3))
      [0.294 0.001]

    Source: post 8968.
    """
    if not callable(learning_rate):
        check_real("learning_rate", learning_rate, above=0)
    check_real("gamma", gamma, least=0)
    return eg_stepsize(
        optax.sgd(learning_rate),
        gain_lr=gamma,
        scale_lr=0,
        beta=0,
        gain_bounds=(0, math.inf),
        raw=True,
    )


@dataclass(frozen=True)
class _Rule:
    """How scale and gains move, given the gradient and the direction of the last step."""

    gain_lr: Any
    scale_lr: Any
    beta: Any
    gain_bounds: Bounds
    scale_bounds: Bounds
    raw: bool
    scope: str
    axis_name: Axes
    gain_signal: str = "ema"
    scale_rule: str = "exponentiated"

    def __post_init__(self) -> None:
        check_real("gain_lr", self.gain_lr, least=0)
        check_real("scale_lr", self.scale_lr, least=0)
        _check_decay("beta", self.beta)
        for name in ("gain_bounds", "scale_bounds"):
            low, high = getattr(self, name)
            if not 0 <= low <= 1 <= high:
                raise ValueError(
                    f"{name} must be non-negative and contain the initial value 1;"
                    f" got {(low, high)}."
                )
        check_choice("gain_signal", self.gain_signal, ("ema", "direction"))
        check_choice("scale_scope", self.scope, ("global", "leaf"))
        check_choice("scale_rule", self.scale_rule, ("exponentiated", "additive"))

    @property
    def has_gains(self) -> bool:
        return not _is_zero(self.gain_lr)

    @property
    def has_scale(self) -> bool:
        return not _is_zero(self.scale_lr)

    @property
    def looks_back(self) -> bool:
        """Whether a signal needs the last update."""
        return self.has_scale or (self.has_gains and self.gain_signal == "direction")

    def init(self, params: Any) -> StepSizes:
        _, leaves, treedef = flatten(params)
        log_scale: Any = None
        if self.has_scale and self.scope == "leaf":
            log_scale = treedef.unflatten(jnp.zeros([], wide(x.dtype)) for x in leaves)
        elif self.has_scale:
            log_scale = jnp.zeros([], wide(*(x.dtype for x in leaves)))
        return StepSizes(
            count=jnp.zeros([], jnp.int32),
            log_scale=log_scale,
            log_gain=_zeros(params) if self.has_gains else None,
            average=_zeros(params) if self.has_gains and self.gain_signal == "ema" else None,
        )

    def update(self, grads: Any, past: Any, state: StepSizes) -> StepSizes:
        """Scale, gains and average after the gradient of this step.

        `past` is the direction of descent of the last step, `-D_{t-1}`, without the scale.
        """
        treedef: Any
        gs, treedef = jax.tree.flatten(jax.lax.stop_gradient(grads))
        gs = [g.astype(wide(g.dtype)) for g in gs]
        past = jax.lax.stop_gradient(past)
        finite = all_finite(gs, axis_name=self.axis_name)
        keep = lambda new, old: jnp.where(finite, new, old)
        flat = treedef.flatten_up_to

        log_scale = state.log_scale
        if self.has_scale and self.scope == "leaf":
            log_scale = treedef.unflatten(
                keep(self._moved(old, [g], [v]), old)
                for old, g, v in zip(flat(log_scale), gs, flat(past), strict=True)
            )
        elif self.has_scale:
            log_scale = keep(self._moved(log_scale, gs, flat(past)), log_scale)

        log_gain, average = state.log_gain, state.average
        if self.has_gains:
            # h: `past` over the gain is the direction without it.
            if self.gain_signal == "ema":
                signals = flat(average)
                if self.raw:
                    steps = jnp.maximum(state.count, 1)
                    signals = [
                        a / (1 - _as(self.beta, a) ** steps.astype(a.dtype)) for a in signals
                    ]
            elif self.raw:
                signals = flat(jax.tree.map(lambda v, p: v * jnp.exp(-p), past, log_gain))
            else:
                signals = flat(past)
            low, high = map(_log, self.gain_bounds)
            new = []
            for old, g, signal in zip(flat(log_gain), gs, signals, strict=True):
                h = g * signal if self.raw else jnp.sign(g) * jnp.sign(signal)
                new.append(keep(jnp.clip(old + _as(self.gain_lr, old) * h, low, high), old))
            log_gain = treedef.unflatten(new)
        if average is not None:
            average = treedef.unflatten(
                keep(_as(self.beta, a) * a + _as(1 - self.beta, a) * g, a)
                for a, g in zip(flat(average), gs, strict=True)
            )
        return StepSizes(state.count + finite.astype(jnp.int32), log_scale, log_gain, average)

    def _moved(self, log_scale: Array, gs: Sequence[Array], vs: Sequence[Array]) -> Array:
        """log s after the alignment A of gradients `gs` and directions `vs`."""
        zero = jnp.zeros_like(log_scale)

        def dot(xs: Sequence[Array], ys: Sequence[Array]) -> Array:
            terms = (jnp.sum(x * y).astype(zero.dtype) for x, y in zip(xs, ys, strict=True))
            total = sum(terms, zero)
            return total if self.axis_name is None else jax.lax.psum(total, self.axis_name)

        a = dot(gs, vs)
        if not self.raw:
            a = a / ((jnp.sqrt(dot(gs, gs)) + 1e-10) * (jnp.sqrt(dot(vs, vs)) + 1e-10))
        # Squares that overflow tell nothing.
        step = _as(self.scale_lr, zero) * jnp.where(jnp.isfinite(a), a, zero)
        low, high = self.scale_bounds
        if self.scale_rule == "additive":
            return jnp.log(jnp.clip(jnp.exp(log_scale) + step, low, high))
        return jnp.clip(log_scale + step, _log(low), _log(high))


def _as(value: Any, like: Array) -> Array:
    return jnp.asarray(value, like.dtype)


def _is_zero(rate: Any) -> bool:
    """Whether a rate is the number 0, for good: not one that `inject_hyperparams` can change."""
    return isinstance(rate, (int, float)) and rate == 0


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def _check_decay(name: str, value: Any) -> None:
    check_real(name, value, least=0)
    if not is_traced(value) and float(value) >= 1:
        raise ValueError(f"{name} must be at least 0 and less than 1; got {value!r}.")


def _zeros(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide(p.dtype)), params)


def _times(tree: Any, gain: Any) -> Any:
    """The leaves in float32 at least, times the gains if there are any."""
    tree = jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree)
    return tree if gain is None else jax.tree.map(lambda x, p: x * p.astype(x.dtype), tree, gain)


def _scaled(moves: Any, scale: Any, *, like: Any) -> Any:
    """The leaves times their scale, if there is one, in the types of another tree."""
    if scale is not None:
        if isinstance(scale, jax.Array):
            scale = jax.tree.map(lambda _: scale, moves)
        moves = jax.tree.map(lambda x, s: x * s.astype(x.dtype), moves, scale)
    return jax.tree.map(lambda x, other: x.astype(other.dtype), moves, like)
