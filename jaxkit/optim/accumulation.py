"""Gradient accumulation hidden in an optimizer's moments: no buffer of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxkit._checks import check_real
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Int
from jaxkit.optim._leaves import check_count, check_decay, flatten

__all__ = [
    "AccumulationState",
    "accumulated_adam",
    "accumulated_sgd",
    "at_window_ends",
    "micro_step_beta",
    "scale_by_accumulated_adam",
    "scale_by_accumulated_momentum",
]

Rate: TypeAlias = float | Array | Callable[[Any], Any]


class AccumulationState(NamedTuple):
    """The moments, in which the gradients of a window are summed."""

    count: Int[Array, ""]  # type: ignore[assignment]  # hides the tuple's method
    """Micro-steps taken."""
    mu: Any
    """First moment."""
    nu: Any
    """Second moment, or `None`."""


def scale_by_accumulated_momentum(
    beta: float = 0.9, accumulation_steps: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Momentum over the mean gradients of windows of micro-steps, from one buffer.

    At the micro-steps `t = 1, 2, ...`, with `χ(t) = 1` iff `k` divides `t`,

        m_t = [1 - (1 - β) χ(t-1)] m_{t-1} + (1 - β)/k g_t

    and the update is `χ(t) m_t`. At the ends of windows `m` is exactly the moving average of their
    mean gradients, as of `optax.MultiSteps(optax.ema(beta, debias=False), k)`, which holds a second
    buffer.

    Args:
      beta: Decay β in [0, 1).
      accumulation_steps: Micro-steps k to a window.

    Returns:
      An optax transformation with an `AccumulationState`.

    Raises:
      ValueError: `beta` outside [0, 1), `accumulation_steps` no positive integer, leaves that are
        not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = scale_by_accumulated_momentum(0.5, accumulation_steps=2)
      >>> state = optimizer.init(jnp.zeros(1))
      >>> for gradient in (1.0, 3.0, 2.0, 2.0):
      ...     update, state = optimizer.update(jnp.array([gradient]), state)
      ...     print(update)
      [0.]
      [1.]
      [0.]
      [1.5]

    Source: post 8634.
    """
    check_decay("beta", beta)
    check_count("accumulation_steps", accumulation_steps)

    def init(params: Any) -> AccumulationState:
        return AccumulationState(jnp.zeros([], jnp.int32), _zeros(params), None)

    def update(
        grads: Any, state: AccumulationState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AccumulationState]:
        del params, extra_args
        ends = (state.count + 1) % accumulation_steps == 0
        mu = _accumulate(state.mu, grads, beta, accumulation_steps, state.count)
        updates = jax.tree.map(
            lambda m, g: jnp.where(ends, m, jnp.zeros_like(m)).astype(g.dtype), mu, grads
        )
        return updates, AccumulationState(optax.safe_increment(state.count), mu, None)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_accumulated_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, accumulation_steps: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Adam over windows of micro-steps, from its own two buffers; approximate for `k > 1`.

    The first moment is that of `scale_by_accumulated_momentum`, and the second is

        v_t = [1 - (1 - b2) χ(t-1)] v_{t-1} + (1 - b2)/k g_t²

    with bias corrections of exponent `t/k`, and an update `m̂ / (√v̂ + eps)` where `χ(t) = 1`. A
    window's mean of squares stands for the square of its mean, which overestimates the second
    moment by `(1 - 1/k) Var(g)`; for `k = 1` this is Adam.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root.
      accumulation_steps: Micro-steps k to a window.

    Returns:
      An optax transformation with an `AccumulationState`.

    Raises:
      ValueError: A decay outside [0, 1), a negative `eps`, `accumulation_steps` no positive
        integer, leaves that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = scale_by_accumulated_adam(accumulation_steps=2)
      >>> state = optimizer.init(jnp.zeros(1))
      >>> for gradient in (2.0, 2.0):
      ...     update, state = optimizer.update(jnp.array([gradient]), state)
      ...     print(update.round(4))
      [0.]
      [1.]

    Source: post 8634; Kingma and Ba 2015, Adam (arXiv 1412.6980).
    """
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_real("eps", eps, least=0)
    check_count("accumulation_steps", accumulation_steps)

    def init(params: Any) -> AccumulationState:
        return AccumulationState(jnp.zeros([], jnp.int32), _zeros(params), _zeros(params))

    def update(
        grads: Any, state: AccumulationState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AccumulationState]:
        del params, extra_args
        window, over = jnp.divmod(state.count + 1, accumulation_steps)
        squares = jax.tree.map(lambda g: jnp.square(g.astype(wide(g.dtype))), grads)
        mu = _accumulate(state.mu, grads, b1, accumulation_steps, state.count)
        nu = _accumulate(state.nu, squares, b2, accumulation_steps, state.count)

        def direction(m: Array, v: Array, g: Array) -> Array:
            to = lambda value: jnp.asarray(value, m.dtype)
            # Before the first window ends its exponent is 0 and the correction would divide by 0.
            exponent = to(jnp.maximum(window, 1))
            m = m / (to(1) - to(b1) ** exponent)
            v = v / (to(1) - to(b2) ** exponent)
            return jnp.where(over == 0, m / (jnp.sqrt(v) + to(eps)), to(0)).astype(g.dtype)

        updates = jax.tree.map(direction, mu, nu, grads)
        return updates, AccumulationState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def accumulated_sgd(
    learning_rate: Rate, beta: float = 0.9, accumulation_steps: int = 1
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum over windows of micro-steps, from one buffer.

    Args:
      learning_rate: Number, or schedule of the 0-based micro-step.
      beta: As for `scale_by_accumulated_momentum`; the gradient enters with the factor `1 - beta`.
      accumulation_steps: Micro-steps to a window.

    Returns:
      An optax transformation; its updates are zero but at the ends of windows.

    Raises:
      ValueError: As for `scale_by_accumulated_momentum`.

    Example:
      >>> optimizer = accumulated_sgd(0.1, accumulation_steps=4)

    Source: post 8634.
    """
    return optax.with_extra_args_support(
        optax.chain(
            scale_by_accumulated_momentum(beta, accumulation_steps),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def accumulated_adam(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    accumulation_steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Adam over windows of micro-steps, without a third buffer; see `scale_by_accumulated_adam`.

    Args:
      learning_rate: Number, or schedule of the 0-based micro-step.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root.
      accumulation_steps: Micro-steps to a window.

    Returns:
      An optax transformation; its updates are zero but at the ends of windows.

    Raises:
      ValueError: As for `scale_by_accumulated_adam`.

    Example:
      >>> optimizer = accumulated_adam(1e-3, accumulation_steps=4)

    Source: post 8634.
    """
    return optax.with_extra_args_support(
        optax.chain(
            scale_by_accumulated_adam(b1, b2, eps, accumulation_steps),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def micro_step_beta(beta: float, accumulation_steps: int) -> float:
    """`β̃ = 1 - (1 - β)/k`: the decay of a micro-step for which k of them decay as one step by β.

    With it any optimizer with moments accumulates without a buffer, approximately, if its rate is
    zero but at the ends of windows (`at_window_ends`). `β̃^k` is a little above β.

    Args:
      beta: Decay of a step, in [0, 1).
      accumulation_steps: Micro-steps k to a step.

    Returns:
      β̃.

    Raises:
      ValueError: `beta` outside [0, 1), `accumulation_steps` no positive integer.

    Example:
      >>> print(round(micro_step_beta(0.9, 4) ** 4, 10))
      0.9036878906

    Source: post 8634.
    """
    check_decay("beta", beta)
    check_count("accumulation_steps", accumulation_steps)
    return 1 - (1 - beta) / accumulation_steps


def at_window_ends(learning_rate: Rate, accumulation_steps: int) -> optax.Schedule:
    """The rate `χ(t) α`: that of the last micro-step of every window, zero at the others.

    Args:
      learning_rate: Number, or schedule of the 0-based micro-step.
      accumulation_steps: Micro-steps to a window.

    Returns:
      A schedule of the 0-based micro-step.

    Raises:
      ValueError: `accumulation_steps` no positive integer.

    Example:
      >>> import optax
      >>> b1 = micro_step_beta(0.9, 4)
      >>> optimizer = optax.lion(at_window_ends(1e-4, 4), b1=b1, b2=b1, weight_decay=0.1)

    Source: post 8634.
    """
    check_count("accumulation_steps", accumulation_steps)

    def schedule(count: Any) -> Any:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(rate, jnp.result_type(float))
        return jnp.where((count + 1) % accumulation_steps == 0, rate, jnp.zeros_like(rate))

    return schedule


def _zeros(params: Any) -> Any:
    flatten(params)  # raises for a leaf that cannot be trained
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide(p.dtype)), params)


def _accumulate(moments: Any, terms: Any, beta: Any, k: Any, count: Array) -> Any:
    """`[1 - (1 - β) χ(t-1)] m + (1 - β)/k x` for every leaf."""
    begins = count % k == 0

    def moment(m: Array, x: Array) -> Array:
        to = lambda value: jnp.asarray(value, m.dtype)
        return jnp.where(begins, to(beta), to(1)) * m + to(1 - beta) / to(k) * to(x)

    return jax.tree.map(moment, moments, terms)
