"""Exponentiated gradient: multiplicative updates for non-negative, simplex and signed parameters.

Mirror descent with the entropy as potential: the gradient is that of θ, the step is taken on log θ.
Mixture and expert weights, gates and portfolios stay what they are; linear models with few non-zero
weights among N pay log N where gradient descent pays N.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.checkify import check

from jaxkit._checks import check_choice, check_real, is_traced
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Int
from jaxkit.optim._leaves import flatten, path_name

__all__ = ["EGState", "eg", "exponentiated_gradient"]

Rate: TypeAlias = float | Array | Callable[[Any], Any]
_Logs: TypeAlias = tuple[Array, ...]
_Rule: TypeAlias = Callable[[Array, Array, _Logs], tuple[Array, _Logs, Array]]

# Options that a constraint takes.
_TAKES = {
    "nonneg": ("variant", "log_state"),
    "simplex": ("total", "log_state"),
    "signed": ("total", "beta"),
    "hypentropy": ("beta",),
}


class EGState(NamedTuple):
    """Two scalars and, where the constraint needs them, logarithms as large as the parameters."""

    count: Int[Array, ""]  # type: ignore[assignment]  # hides the tuple's method
    """Steps taken."""
    clipped: Int[Array, ""]
    """Coordinates whose exponent was clipped in the last step."""
    logs: tuple[Any, ...]
    """`(log θ,)` under `log_state`, `(log w⁺, log w⁻)` if signed, else empty."""


def exponentiated_gradient(
    learning_rate: Rate,
    constraint: Literal["nonneg", "simplex", "signed", "hypentropy"] = "nonneg",
    *,
    total: float | None = None,
    beta: float | Array | None = None,
    variant: Literal["mirror", "reparam"] = "mirror",
    log_state: bool = False,
    checkify: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponentiated gradient (EG) updates, by the constraint that the parameters obey.

    With `g` the gradient with respect to θ, not to log θ, and rate η:

    | constraint   | parameters                   | update                                        |
    |--------------|------------------------------|-----------------------------------------------|
    | "nonneg"     | θ ≥ 0 (EGU)                  | θ' = θ exp(-η g)                              |
    | "simplex"    | θ ≥ 0, last axis sums to U   | θ' = U θ exp(-η g) / Σ θ exp(-η g)            |
    | "signed"     | w = w⁺ - w⁻, Σ w⁺ + w⁻ = U   | w± exp(∓η g), over their sum, times U (EG±)   |
    | with `beta`  | w = w⁺ - w⁻                  | w± exp(∓η g) (EGU±)                           |
    | "hypentropy" | any w                        | w' = β sinh(arcsinh(w / β) - η g)             |

    EGU minimises `η <g, x> + Σ x log(x/θ) - x + θ`. The last two rows are the same update, since
    `w⁺ w⁻ = (β/2)²` never changes: with β → ∞ and `η = η₀/β` it is gradient descent at the rate
    η₀, with β → 0 EGU on |w|, the signs frozen.

    A weight of zero is absorbing, and float32 gets there by underflow once `Σ η g` passes 104:
    take `log_state` for long runs. It makes log θ the state and θ its image; whatever else changes
    the parameters is undone by the next update. The signed pair is kept as logarithms always.

    A gradient that is not finite gives NaN, infinities included, for `optax.apply_if_finite` or a
    loss scale to see.

    State, in float32 and for each parameter: none; 4 bytes with `log_state`; 8 bytes if signed.

    Args:
      learning_rate: η > 0, or a schedule of the 0-based step.
      constraint: As in the table. "simplex" holds for every row (last axis), the sum of "signed"
        for a whole leaf, so that `‖w‖₁ <= U`.
      total: U > 0, by default 1.
      beta: β > 0, a number or an array that broadcasts to every leaf. If "signed" it takes the
        place of `total` and leaves w⁺ and w⁻ unnormalised.
      variant: For "nonneg": "mirror" as above, or "reparam", `θ exp(-η θ g)`, which is the gradient
        step on log θ.
      log_state: Whether to keep log θ ("nonneg", "simplex").
      checkify: Parameters that break the constraint raise an error where their values are known;
        under `jit` this adds the same checks for `jax.experimental.checkify.checkify` to find.

    Returns:
      An optax transformation; `update` needs `params` and returns `θ' - θ`, with no learning rate
      to follow. Exponents are clipped at 80 (700 in float64) and counted in `state.clipped`. The
      signed pair starts from the parameters: with `total`, the rest `U - ‖w‖₁` is spread evenly
      over all w⁺ and w⁻ (U / 2N each for w = 0); with `beta`, it is the one pair with
      `w⁺ w⁻ = (β/2)²`. `init` of mere shapes gives shapes where the state holds logarithms.

    Raises:
      ValueError: A rate, `total` or `beta` that is not positive, an unknown choice, an option that
        the constraint does not take; at the call: `params` missing, leaves that are not floating
        point, a negative θ, rows that do not sum to U within 1e-3 (or two units of the dtype's
        last place), `‖w‖₁ > U`, a scalar on the simplex.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = exponentiated_gradient(0.5, "simplex")
      >>> params = jnp.array([0.2, 0.3, 0.5])
      >>> updates, state = optimizer.update(
      ...     jnp.array([1.0, 0.0, -1.0]), optimizer.init(params), params
      ... )
      >>> print(jnp.round(1000 * optax.apply_updates(params, updates)))
      [ 97. 241. 662.]

    Source: Kivinen & Warmuth 1997 (Inf. & Comput. 132); Ghai, Hazan, Singer 2020, hypentropy
    (arXiv 1902.01903); post 8968.
    """
    check_choice("constraint", constraint, _TAKES)
    check_choice("variant", variant, ("mirror", "reparam"))
    options = {
        "total": total,
        "beta": beta,
        "variant": None if variant == "mirror" else variant,
        "log_state": log_state or None,
    }
    for name, value in options.items():
        if value is not None and name not in _TAKES[constraint]:
            raise ValueError(
                f"{name} must be left out under the constraint {constraint!r}, which takes"
                f" {' and '.join(_TAKES[constraint])}; got {value!r}."
            )
    if total is not None and beta is not None:
        raise ValueError("total must be left out where beta is given: that pair has no fixed sum.")
    if constraint == "hypentropy" and beta is None:
        raise ValueError("beta must be given under the constraint 'hypentropy'; got None.")
    if beta is not None and not is_traced(beta) and not np.all(np.asarray(beta) > 0):
        raise ValueError(f"beta must be greater than 0; got {beta!r}.")
    if not callable(learning_rate):
        check_real("learning_rate", learning_rate, above=0)
    mass = check_real("total", 1.0 if total is None else total, above=0)
    normalized = None if beta is not None else mass

    rule: _Rule
    if constraint == "nonneg":
        rule = _nonneg if variant == "mirror" else _reparam
    elif constraint == "simplex":
        rule = partial(_simplex, total=mass)
    elif constraint == "signed":
        rule = partial(_signed, total=normalized)
    else:
        rule = partial(_hypentropy, beta=beta)
    num_logs = 2 if constraint == "signed" else int(log_state)

    def start(theta: Array) -> _Logs:
        x = theta.astype(wide(theta.dtype))
        if constraint == "signed":
            return _pair(x, total=normalized, beta=beta)
        return (jnp.log(x),) if log_state else ()

    def validate(path: tuple[Any, ...], theta: Array, *, starts: bool) -> None:
        name = f"params at {path_name(path)!r}" if path else "params"
        require = partial(_require, checkify=checkify)
        if constraint in ("nonneg", "simplex"):
            lowest = jnp.min(theta, initial=jnp.inf)
            require(~(lowest < 0), f"{name} must not be negative", lowest)
        if constraint == "simplex":
            if theta.ndim == 0:
                raise ValueError(f"{name} must have at least one axis under 'simplex'; got none.")
            dtype = wide(theta.dtype)
            share = jnp.sum(theta, axis=-1, dtype=dtype) / jnp.asarray(mass, dtype)
            room = max(1e-3, 2 * float(jnp.finfo(theta.dtype).eps))
            worst = jnp.max(jnp.abs(share - 1), initial=0)
            require(~(worst > room), f"rows of {name} must sum to {mass} within {room:.1g}", worst)
        if constraint == "signed" and normalized is not None and starts:
            norm = jnp.sum(jnp.abs(theta), dtype=wide(theta.dtype))
            limit = f"{name} must have absolute values whose sum is at most total = {mass}"
            require(~(norm > jnp.asarray(mass * (1 + 1e-3), norm.dtype)), limit, norm)

    def init(params: Any) -> EGState:
        paths, leaves, treedef = flatten(params)
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        if abstract and num_logs:
            return jax.eval_shape(init, params)
        if not abstract:
            for path, leaf in zip(paths, leaves, strict=True):
                validate(path, leaf, starts=True)
        logs = [start(leaf) for leaf in leaves] if num_logs else []
        return EGState(
            count=jnp.zeros([], jnp.int32),
            clipped=jnp.zeros([], jnp.int32),
            logs=tuple(treedef.unflatten(log[k] for log in logs) for k in range(num_logs)),
        )

    def update(
        grads: Any, state: EGState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EGState]:
        del extra_args
        if params is None:
            raise ValueError("params must be given to the update of exponentiated_gradient.")
        paths, thetas, treedef = flatten(params)
        gs = treedef.flatten_up_to(grads)
        logs = [treedef.flatten_up_to(tree) for tree in state.logs]
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        updates, new_logs, clipped = [], [], jnp.zeros([], jnp.int32)
        for path, theta, g, *log in zip(paths, thetas, gs, *logs, strict=True):
            validate(path, theta, starts=False)
            dtype = wide(theta.dtype)
            # An infinite gradient would leave a finite zero, for ever and unseen.
            g = jnp.where(jnp.isfinite(g), g, jnp.nan).astype(dtype)
            x, step = theta.astype(dtype), jnp.asarray(rate, dtype) * g
            change, new_log, is_clipped = rule(x, step, tuple(log))
            updates.append(change.astype(theta.dtype))
            new_logs.append(new_log)
            clipped += jnp.sum(is_clipped, dtype=jnp.int32)
        return treedef.unflatten(updates), EGState(
            count=optax.safe_increment(state.count),
            clipped=clipped,
            logs=tuple(treedef.unflatten(log[k] for log in new_logs) for k in range(num_logs)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


eg = exponentiated_gradient


# The rules: from θ, η g and the logarithms kept to θ' - θ, the new logarithms, and which exponents
# were clipped.


def _nonneg(x: Array, step: Array, logs: _Logs) -> tuple[Array, _Logs, Array]:
    if not logs:
        exponent, clipped = _clip(-step)
        return x * jnp.expm1(exponent), (), clipped  # accurate for small steps
    log = logs[0] - step
    exponent, clipped = _clip(log)
    return jnp.exp(exponent) - x, (log,), clipped


def _reparam(x: Array, step: Array, logs: _Logs) -> tuple[Array, _Logs, Array]:
    return _nonneg(x, step * (jnp.exp(logs[0]) if logs else x), logs)


def _simplex(x: Array, step: Array, logs: _Logs, *, total: Any) -> tuple[Array, _Logs, Array]:
    total, never = jnp.asarray(total, x.dtype), jnp.zeros(x.shape, bool)
    if logs:
        log = jax.nn.log_softmax(logs[0] - step, axis=-1) + jnp.log(total)
        return jnp.exp(log) - x, (log,), never
    # The largest exponent is taken out first. It is no more than a scale, so that the derivative
    # may pass it by, and with it the logarithm of zeros.
    top = jax.lax.stop_gradient(jnp.max(jnp.log(x) - step, axis=-1, keepdims=True))
    weights = x * jnp.exp(_clip(-step - top)[0])
    return total * weights / jnp.sum(weights, axis=-1, keepdims=True) - x, (), never


def _signed(x: Array, step: Array, logs: _Logs, *, total: Any) -> tuple[Array, _Logs, Array]:
    positive, negative = logs[0] - step, logs[1] + step
    if total is not None:
        mass = jax.nn.logsumexp(jnp.logaddexp(positive, negative))
        shift = jnp.log(jnp.asarray(total, x.dtype)) - mass
        positive, negative = positive + shift, negative + shift
    (plus, high), (minus, low) = _clip(positive), _clip(negative)
    return jnp.exp(plus) - jnp.exp(minus) - x, (positive, negative), high | low


def _hypentropy(x: Array, step: Array, logs: _Logs, *, beta: Any) -> tuple[Array, _Logs, Array]:
    beta = jnp.broadcast_to(jnp.asarray(beta, x.dtype), x.shape)
    exponent = jnp.arcsinh(x / beta) - step
    is_far = jnp.abs(exponent) > _limit(x)
    far = beta * jnp.sinh(jnp.where(is_far, jnp.sign(exponent) * _limit(x), exponent)) - x
    # sinh(a - s) by the addition theorem: no rounding of x itself, so that a zero step is one.
    small = jnp.clip(step, -1, 1)
    near = 2 * x * jnp.sinh(small / 2) ** 2 - jnp.hypot(x, beta) * jnp.sinh(small)
    is_near = jnp.abs(step) <= 1
    return jnp.where(is_near, near, far), logs, is_far & ~is_near


def _pair(w: Array, *, total: Any, beta: Any) -> _Logs:
    """Logarithms of w⁺ and w⁻ to start from, `w = w⁺ - w⁻`."""
    if total is None:
        beta = jnp.broadcast_to(jnp.asarray(beta, w.dtype), w.shape)
        turn = jnp.arcsinh(w / beta)
        return jnp.log(beta / 2) + turn, jnp.log(beta / 2) - turn
    rest = jnp.maximum(jnp.asarray(total, w.dtype) - jnp.sum(jnp.abs(w)), 0)
    share = rest / (2 * max(w.size, 1))
    return jnp.log(share + jnp.maximum(w, 0)), jnp.log(share + jnp.maximum(-w, 0))


def _clip(exponent: Array) -> tuple[Array, Array]:
    """The exponent below what `exp` can take, and where it was not.

    Not by `minimum`, which XLA's fused loops on a CPU may compile so that NaN becomes the limit.
    """
    clipped = exponent > _limit(exponent)
    return jnp.where(clipped, _limit(exponent), exponent), clipped


def _limit(exponent: Array) -> float:
    return 700.0 if exponent.dtype == jnp.float64 else 80.0


def _require(holds: Array, rule: str, got: Array, *, checkify: bool) -> None:
    """Raise where the values are known; under a trace leave it to checkify, if asked to."""
    if not is_traced(holds):
        if not holds:
            raise ValueError(f"{rule}; got {got}.")
    elif checkify:
        check(holds, rule.replace("{", "{{").replace("}", "}}") + "; got {got}.", got=got)
