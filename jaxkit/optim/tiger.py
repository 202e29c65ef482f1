"""Tiger: sign of a momentum, rates relative to each parameter, accumulation without a buffer."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit._checks import check_choice, check_real, is_traced
from jaxkit._typing import Array, DType, Float, Int, Key
from jaxkit.optim._leaves import (
    LabelFn,
    class_of,
    flatten,
    path_name,
    row_masks,
    rows_like,
    wide,
)
from jaxkit.optim.rounding import stochastic_round

__all__ = [
    "TigerState",
    "is_update_step",
    "keras_labels",
    "piecewise_linear",
    "scale_by_tiger",
    "tiger",
    "tiger_keras",
]

Rate: TypeAlias = float | Array | Callable[[Any], Any]


class TigerState(NamedTuple):
    """One buffer as large as the parameters, and a few scalars."""

    count: Int[Array, ""]  # type: ignore[assignment]  # hides the tuple's method
    """Micro-steps taken."""
    updated: Array
    """Whether the last micro-step changed parameters; see `is_update_step`."""
    mu: Any
    """The momentum, which is the gradient accumulator as well."""
    touched: Any
    """Rows touched in this window, for lazy leaves; `None` unless lazy."""


def tiger(
    learning_rate: Rate,
    beta: float = 0.965,
    weight_decay: float = 0.01,
    accumulation_steps: int = 1,
    shrink: float = 0.99,
    *,
    rms_floor: float = 1e-3,
    rate: Literal["rms", "fixed"] = "rms",
    power: Rate = 1.0,
    lazy: Literal["param", "full"] | None = None,
    label_fn: LabelFn | None = None,
    scope: Literal["leaf", "global"] = "leaf",
    mu_dtype: DType | None = None,
    rounding_key: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Tiger: the sign of a momentum, at a rate relative to the size of each parameter.

    Micro-steps `t = 1, 2, ...`, windows of `k = accumulation_steps`, `χ(t) = 1` iff `k` divides
    `t`, from `m_0 = 0`:

        m_t = [1 - (1 - β) χ(t-1)] m_{t-1} + (1 - β)/k g_t
        θ_t = θ_{t-1} - χ(t) η_t [sign(m_t) + λ_t θ_{t-1}]

    so that `m` at the end of a window is the moving average of the windows' mean gradients, and
    accumulation needs no buffer of its own. The class of a leaf decides:

    | class     | leaves                                      | η_t             | λ_t | centre c |
    |-----------|---------------------------------------------|-----------------|-----|----------|
    | vector    | `bias`, `beta`; others of at most one axis  | α_t / 2         | 0   | 0        |
    | gamma     | `scale`, `gamma`                            | α_t / 2         | 0   | 1        |
    | embedding | `embedding`, `embeddings`                   | α_t RMS(row)    | λ   | 0        |
    | matrix    | everything else                             | α_t RMS(leaf)   | λ   | 0        |

    A gradient with NaN or Inf leaves the momentum as it is and shrinks the parameter instead,
    `θ_t = c + s (θ_{t-1} - c)`, on that micro-step, wherever in its window it is. (If it is the
    first of a window, that window's factor β is lost, as in the reference.)

    The momentum is the only state as large as the parameters: 4 bytes a parameter, or 2 with
    `mu_dtype=jnp.bfloat16`.

    Args:
      learning_rate: The relative rate α, some 1e-3; or a schedule of the 0-based micro-step, which
        counts at the window's last one (see `piecewise_linear`).
      beta: Decay β of the momentum in [0, 1): 0.965 for text, 0.945 for images.
      weight_decay: λ.
      accumulation_steps: Micro-steps k to an update.
      shrink: Factor s in (0, 1] for a parameter whose gradient is not finite.
      rms_floor: Least RMS that a rate is relative to, so that a matrix of zeros can move; 0 as in
        the reference.
      rate: "rms" as in the table; "fixed": η = α and decay λ for every leaf, which is Signum with
        decay, and `optax.lion` with both betas equal.
      power: γ in `sign(m)|m|^(1-γ)`, or a schedule of it: 1 is the sign, 0 the momentum itself.
      lazy: Rows of embeddings that no gradient touches in a window stay as they are: "param", the
        parameters alone; "full", their momentum too, to which β is then applied at the row's first
        touch in the window. A row is touched when an element of its gradient is not zero, or, for
        gradients that are dense, as the extra argument `touched_rows={path: bool[rows]}` of
        `update` says, `path` being e.g. `"embed/embedding"`. A gradient that is not finite shrinks
        every row.
      label_fn: Function of (key path, leaf) to a class, or to `None` for the rule above.
      scope: What one non-finite number spoils: its "leaf", or the "global" step.
      mu_dtype: Type of the momentum; float32 by default (float64 for float64 parameters). It is
        computed in float32 at least and stored so.
      rounding_key: If given, float16 and bfloat16 parameters are rounded stochastically: a step
        below half their spacing, such as α < 5e-4 in float16, is else lost to most of them.

    Returns:
      An optax transformation. `update` needs `params`, and its updates are those of the parameters:
      no further scaling by a learning rate.

    Raises:
      ValueError: `beta` outside [0, 1), `accumulation_steps` no positive integer, `shrink` outside
        (0, 1], a negative `weight_decay`, `rms_floor` or rate, an unknown choice; at the call:
        `params` missing, leaves that are not floating point.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.array([[0.5, -0.25], [0.125, 1.0]]), "bias": jnp.zeros(2)}
      >>> optimizer = tiger(1e-2, weight_decay=0.0)
      >>> state = optimizer.init(params)
      >>> grads = {"kernel": jnp.array([[3.0, -1e-6], [0.2, -7.0]]), "bias": jnp.ones(2)}
      >>> updates, state = optimizer.update(grads, state, params)
      >>> print(updates["bias"])
      [-0.005 -0.005]
      >>> print(optax.tree.norm(updates["kernel"]) / optax.tree.norm(params["kernel"]))
      0.01

    Source: Tiger (posts 9512, 8634, 9736; reference code bojone/tiger); Chen et al. 2023, Lion
    (arXiv 2302.06675); Bernstein et al. 2018, Signum (arXiv 1802.04434).
    """
    if not callable(learning_rate):
        check_real("learning_rate", learning_rate, least=0)
    return _transform(
        learning_rate,
        _Options(
            beta,
            weight_decay,
            accumulation_steps,
            shrink,
            rms_floor,
            rate,
            power,
            lazy,
            label_fn,
            scope,
            mu_dtype,
            rounding_key,
        ),
    )


def scale_by_tiger(
    beta: float = 0.965,
    weight_decay: float = 0.01,
    accumulation_steps: int = 1,
    *,
    rms_floor: float = 1e-3,
    rate: Literal["rms", "fixed"] = "rms",
    power: Rate = 1.0,
    lazy: Literal["param", "full"] | None = None,
    label_fn: LabelFn | None = None,
    scope: Literal["leaf", "global"] = "leaf",
    mu_dtype: DType | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of `tiger` at `α = 1`, to be followed by `optax.scale_by_learning_rate`.

    `RMS(θ) [sign(m) + λ θ]` by the class of each leaf; zero between the ends of windows. A gradient
    that is not finite gives a zero update and leaves the momentum: there is no shrinking, which
    would depend on the rate that follows.

    Args:
      beta: As for `tiger`, and so are the others.
      weight_decay: λ.
      accumulation_steps: Micro-steps to an update.
      rms_floor: Least RMS.
      rate: "rms" or "fixed".
      power: 1 for the sign, 0 for the momentum.
      lazy: "param", "full" or `None`.
      label_fn: Classes of leaves.
      scope: "leaf" or "global".
      mu_dtype: Type of the momentum.

    Returns:
      An optax transformation with a `TigerState`.

    Raises:
      ValueError: As for `tiger`.

    Example:
      >>> import optax
      >>> optimizer = optax.chain(scale_by_tiger(), optax.scale_by_learning_rate(1e-3))

    Source: posts 9512, 8634, 9736.
    """
    options = _Options(
        beta,
        weight_decay,
        accumulation_steps,
        1.0,
        rms_floor,
        rate,
        power,
        lazy,
        label_fn,
        scope,
        mu_dtype,
        None,
    )
    return _transform(-1.0, options)


def tiger_keras(
    learning_rate: float = 1e-3,
    beta: float = 0.965,
    weight_decay: float = 0.01,
    grad_accum_steps: int = 1,
    lr_schedule: Mapping[int, float] | None = None,
    shrink_ratio: float = 0.99,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the reference code, step by step, under its own argument names.

    It differs from `tiger`: classes come from names alone (`keras_labels`), a matrix of zeros
    never moves, the rate follows `piecewise_linear`, and only NaN counts as a bad gradient. An Inf
    makes the momentum infinite, which a later Inf of the other sign turns into NaN.

    Args:
      learning_rate: Peak of the relative rate.
      beta: Decay of the momentum.
      weight_decay: λ.
      grad_accum_steps: Micro-steps to an update.
      lr_schedule: Knots of the factor on the rate, `{0: 1}` by default.
      shrink_ratio: Factor on a parameter whose gradient has NaN.

    Returns:
      An optax transformation.

    Raises:
      ValueError: As for `tiger`.

    Example:
      >>> optimizer = tiger_keras(1.76e-3, grad_accum_steps=4, lr_schedule={40000: 1, 160000: 0.5})

    Source: post 9512; reference code bojone/tiger.
    """
    factor = piecewise_linear({0: 1.0} if lr_schedule is None else lr_schedule)
    options = _Options(
        beta,
        weight_decay,
        grad_accum_steps,
        shrink_ratio,
        rms_floor=0.0,
        label_fn=keras_labels,
        is_bad=jnp.isnan,
    )
    check_real("learning_rate", learning_rate, least=0)
    return _transform(lambda count: learning_rate * factor(count), options)


def is_update_step(state: TigerState) -> Array:
    """Whether the update that returned this state is other than zero: a bool scalar.

    True at the end of a window, and wherever a gradient was not finite, since that shrinks its
    parameter. A loop may skip `optax.apply_updates` when it is false.

    Args:
      state: What `update` returned. Under a wrapper it is found by `optax.tree.get(state,
        "updated")`.

    Returns:
      A bool scalar; false for the state of `init`.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer, params = tiger(1e-3, accumulation_steps=2), {"kernel": jnp.ones((2, 2))}
      >>> state = optimizer.init(params)
      >>> for _ in range(4):
      ...     _, state = optimizer.update(params, state, params)
      ...     print(is_update_step(state))
      False
      True
      False
      True

    Source: post 8634.
    """
    return state.updated


def piecewise_linear(knots: Mapping[int, float], *, peak: float = 1.0) -> optax.Schedule:
    """Schedule through the given knots: linear between them, constant after the last.

    From 0 at step 0 unless there is a knot there, so that the first update may be zero.

    Args:
      knots: Factor by 0-based micro-step; `{1000: 1, 2000: 0.1}` warms up for 1000 micro-steps and
        falls to a tenth in the next 1000.
      peak: Factor on all of them.

    Returns:
      A function of the step, in float32.

    Raises:
      ValueError: No knots, or a step that is no integer from 0.

    Example:
      >>> schedule = piecewise_linear({1000: 1, 2000: 0.1}, peak=2e-3)
      >>> print(schedule(0), schedule(500), schedule(1000), schedule(5000))
      0.0 0.001 0.002 0.0002

    Source: reference code of post 9512.
    """
    if not knots:
        raise ValueError(f"knots must have at least one step; got {knots!r}.")
    for step in knots:
        _check_count("a step of knots", step, least=0)
    points = sorted((int(step), float(value) * peak) for step, value in knots.items())
    if points[0][0] != 0:
        points.insert(0, (0, 0.0))
    steps, values = np.asarray(points, np.float32).T

    def schedule(count: Any) -> Array:
        return jnp.interp(jnp.asarray(count, jnp.float32), steps, values)

    return schedule


def keras_labels(path: tuple[Any, ...], leaf: Any) -> str:
    """The class of a parameter as the reference code has it: by names, whatever the axes.

    `bias`, `beta` or `gamma` anywhere in the path, then `embeddings`; everything else is a matrix,
    a vector by another name included. Flax's `scale` and `embedding` count as `gamma` and
    `embeddings`.

    Args:
      path: Key path of the leaf.
      leaf: The parameter; not looked at.

    Returns:
      One of "vector", "gamma", "embedding", "matrix".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(jax.tree_util.tree_map_with_path(keras_labels, {"gain": jnp.ones(3)}))
      {'gain': 'matrix'}

    Source: reference code of post 9512.
    """
    del leaf
    name = path_name(path)
    if "gamma" in name or name.rsplit("/", 1)[-1] == "scale":
        return "gamma"
    if re.search("bias|beta", name):
        return "vector"
    return "embedding" if "embedding" in name else "matrix"


class _Options(NamedTuple):
    beta: Any
    weight_decay: Any
    accumulation_steps: Any
    shrink: Any
    rms_floor: Any = 1e-3
    rate: str = "rms"
    power: Any = 1.0
    lazy: str | None = None
    label_fn: LabelFn | None = None
    scope: str = "leaf"
    mu_dtype: DType | None = None
    rounding_key: Key | None = None
    is_bad: Callable[[Any], Any] = lambda g: ~jnp.isfinite(g)


def _check_count(name: str, value: Any, *, least: int) -> None:
    integral = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if getattr(value, "ndim", None) == 0:
        integral = jnp.issubdtype(value.dtype, jnp.integer)
    if not integral or (not is_traced(value) and int(value) < least):
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")


def _check(options: _Options) -> None:
    beta = options.beta
    check_real("beta", beta, least=0)
    if not is_traced(beta) and float(beta) >= 1:
        raise ValueError(f"beta must be at least 0 and less than 1; got {beta!r}.")
    check_real("weight_decay", options.weight_decay, least=0)
    _check_count("accumulation_steps", options.accumulation_steps, least=1)
    check_real("shrink", options.shrink, above=0, most=1)
    check_real("rms_floor", options.rms_floor, least=0)
    check_choice("rate", options.rate, ("rms", "fixed"))
    if not callable(options.power):
        check_real("power", options.power, least=0, most=1)
    if options.lazy is not None:
        check_choice("lazy", options.lazy, ("param", "full"))
    check_choice("scope", options.scope, ("leaf", "global"))


def _transform(learning_rate: Rate, options: _Options) -> optax.GradientTransformationExtraArgs:
    _check(options)
    accumulates = not (
        isinstance(options.accumulation_steps, int) and options.accumulation_steps == 1
    )

    def labels(paths: list[Any], leaves: list[Any]) -> list[str]:
        return [
            class_of(path, leaf, options.label_fn) for path, leaf in zip(paths, leaves, strict=True)
        ]

    def is_lazy(label: str, leaf: Any) -> bool:
        return options.lazy is not None and label == "embedding" and leaf.ndim > 0

    def init(params: Any) -> TigerState:
        paths, leaves, treedef = flatten(params)
        touched = None
        if options.lazy is not None:
            touched = treedef.unflatten(
                rows_like(leaf) if is_lazy(label, leaf) else optax.MaskedNode()
                for label, leaf in zip(labels(paths, leaves), leaves, strict=True)
            )
        return TigerState(
            count=jnp.zeros([], jnp.int32),
            updated=jnp.zeros([], bool),
            mu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_mu_dtype(p, options)), params),
            touched=touched,
        )

    def update(
        grads: Any,
        state: TigerState,
        params: Any = None,
        *,
        touched_rows: Mapping[Any, Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, TigerState]:
        del extra_args
        if params is None:
            raise ValueError("params must be given to the update of tiger: its steps depend on it.")
        paths, thetas, treedef = flatten(params)
        gs = treedef.flatten_up_to(grads)
        mus = treedef.flatten_up_to(state.mu)
        classes = labels(paths, thetas)
        lazy = [is_lazy(label, theta) for label, theta in zip(classes, thetas, strict=True)]
        rows = row_masks(paths, gs, lazy, touched_rows if any(lazy) else None, params)
        seen = [None] * len(thetas) if not any(lazy) else treedef.flatten_up_to(state.touched)

        count = state.count
        k = jnp.asarray(options.accumulation_steps, count.dtype)
        begins = count % k == 0 if accumulates else True
        ends = (count + 1) % k == 0 if accumulates else True
        alpha = learning_rate(count) if callable(learning_rate) else learning_rate
        power = options.power(count) if callable(options.power) else options.power
        bad = [jnp.any(options.is_bad(g)) for g in gs]
        if options.scope == "global" and bad:
            bad = [jnp.any(jnp.stack(bad))] * len(bad)

        step = _Step(options, begins, ends, alpha, power)
        results = [
            step.leaf(*leaf, number, count)
            for number, leaf in enumerate(
                zip(classes, thetas, gs, mus, bad, rows, seen, strict=True)
            )
        ]
        updates, new_mus, new_seen = zip(*results, strict=True) if results else ((), (), ())
        ended = jnp.asarray(ends)
        return treedef.unflatten(updates), TigerState(
            count=optax.safe_increment(count),
            updated=ended | jnp.any(jnp.stack(bad)) if bad else ended,
            mu=treedef.unflatten(new_mus),
            touched=None if state.touched is None else treedef.unflatten(new_seen),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _mu_dtype(leaf: Any, options: _Options) -> Any:
    if options.mu_dtype is not None:
        return jax.dtypes.canonicalize_dtype(options.mu_dtype)
    return wide(leaf.dtype)


class _Step(NamedTuple):
    """One micro-step of one leaf."""

    options: _Options
    begins: Any
    ends: Any
    alpha: Any
    power: Any

    def leaf(
        self,
        label: str,
        theta: Float[Array, "*shape"],
        g: Float[Array, "*shape"],
        mu: Float[Array, "*shape"],
        bad: Array,
        rows: Array | None,
        seen: Any,
        number: int,
        count: Array,
    ) -> tuple[Array, Array, Any]:
        """The update, the new momentum, and the rows touched so far in the window."""
        opts = self.options
        # β in bfloat16 is another number, and squares overflow in float16: float32 at least.
        dtype = wide(theta.dtype, mu.dtype)
        number_of = lambda value: jnp.asarray(value, dtype)
        x, m, grad = theta.astype(dtype), mu.astype(dtype), g.astype(dtype)
        beta = number_of(opts.beta)
        fresh = number_of(1 - opts.beta) / number_of(opts.accumulation_steps)

        if rows is not None:
            rows = rows & ~bad
        if rows is not None and opts.lazy == "full":
            first = rows & ~seen
            new_m = jnp.where(rows, jnp.where(first, beta, number_of(1)) * m + fresh * grad, m)
        else:
            decay = beta if self.begins is True else jnp.where(self.begins, beta, number_of(1))
            new_m = decay * m + fresh * grad
        new_m = jnp.where(bad, m, new_m)

        direction = self._direction(new_m, dtype)
        if opts.rate == "fixed" or label in ("matrix", "embedding"):
            direction = direction + number_of(opts.weight_decay) * x
        change = -(self._eta(label, x, dtype) * direction)
        if rows is not None:
            rows = rows | seen
            change = jnp.where(rows, change, number_of(0))
            seen = rows & ~jnp.asarray(self.ends)
        if self.ends is not True:
            change = jnp.where(self.ends, change, number_of(0))
        centre = 1.0 if label == "gamma" else 0.0
        shrunk = (number_of(opts.shrink) - number_of(1)) * (x - number_of(centre))
        change = jnp.where(bad, shrunk, change)
        return self._rounded(theta, x, change, number, count), new_m.astype(mu.dtype), seen

    def _direction(self, m: Array, dtype: Any) -> Array:
        if isinstance(self.power, (int, float)) and self.power == 1:
            return jnp.sign(m)
        exponent = jnp.asarray(1 - self.power, dtype)
        return jnp.sign(m) * jnp.abs(m) ** exponent

    def _eta(self, label: str, x: Array, dtype: Any) -> Array:
        alpha = jnp.asarray(self.alpha, dtype)
        if self.options.rate == "fixed":
            return alpha
        if label in ("vector", "gamma"):
            return alpha * jnp.asarray(0.5, dtype)
        if x.size == 0:
            return alpha
        if label == "embedding" and x.ndim:
            mean = jnp.mean(x * x, axis=-1, keepdims=True)
        else:
            mean = jnp.mean(x * x)
        return alpha * jnp.maximum(jnp.sqrt(mean), jnp.asarray(self.options.rms_floor, dtype))

    def _rounded(self, theta: Array, x: Array, change: Array, number: int, count: Array) -> Array:
        key = self.options.rounding_key
        if key is None or x.dtype == theta.dtype:
            return change.astype(theta.dtype)
        key = jax.random.fold_in(jax.random.fold_in(key, count), number)
        target = stochastic_round(x + change, theta.dtype, key=key)
        return (target.astype(x.dtype) - x).astype(theta.dtype)
