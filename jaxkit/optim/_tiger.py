"""Tiger: sign of a momentum, rates relative to each parameter, accumulation without a buffer."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxkit._checks import check_choice, check_real, is_traced
from jaxkit._dtypes import wide
from jaxkit._typing import Array, DType, Int, Key
from jaxkit.optim._leaves import (
    LabelFn,
    check_count,
    check_decay,
    class_of,
    flatten,
    row_masks,
    rows_like,
)
from jaxkit.optim.rounding import stochastic_round

__all__ = ["TigerState", "is_update_step", "scale_by_tiger", "tiger"]

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

    A gradient with NaN, Inf or a number beyond the range of the momentum's type leaves the momentum
    as it is and shrinks the parameter instead, `θ_t = c + s (θ_{t-1} - c)`, on that micro-step,
    wherever in its window it is. (If it is the first of a window, that window's factor β is lost,
    as in the reference.)

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
      power: γ in `sign(m)|m|^(1-γ)`, or a schedule of it, such as `(α_t/α_0)^p`: 1 is the sign, 0
        the momentum itself.
      lazy: Rows of embeddings that no gradient touches in a window stay as they are: "param", the
        parameters alone; "full", their momentum too, to which β is then applied at the row's first
        touch in the window. A row is touched when an element of its gradient is not zero, or, for
        gradients that are dense, as the extra argument `touched_rows={path: bool[rows]}` of
        `update` says, `path` being e.g. `"embed/embedding"`. A gradient that is not finite shrinks
        every row.
      label_fn: Function of (key path, leaf) to a class, or to `None` for the rule above.
      scope: What one non-finite number spoils: its "leaf", or the "global" step.
      mu_dtype: Type of the momentum; float32 by default (float64 for float64 parameters). It is
        computed in float32 at least and stored so. In bfloat16 the decay of a β above 0.996 is
        rounded away.
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
    return _Tiger(
        learning_rate=learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        accumulation_steps=accumulation_steps,
        shrink=shrink,
        rms_floor=rms_floor,
        rate=rate,
        power=power,
        lazy=lazy,
        label_fn=label_fn,
        scope=scope,
        mu_dtype=mu_dtype,
        rounding_key=rounding_key,
    ).transformation()


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
    return _Tiger(
        learning_rate=-1.0,
        beta=beta,
        weight_decay=weight_decay,
        accumulation_steps=accumulation_steps,
        shrink=1.0,
        rms_floor=rms_floor,
        rate=rate,
        power=power,
        lazy=lazy,
        label_fn=label_fn,
        scope=scope,
        mu_dtype=mu_dtype,
    ).transformation()


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiger:
    """The optimizer itself; the options are those of `tiger`."""

    learning_rate: Rate
    beta: Any
    weight_decay: Any
    accumulation_steps: Any
    shrink: Any
    rms_floor: Any
    rate: str = "rms"
    power: Any = 1.0
    lazy: str | None = None
    label_fn: LabelFn | None = None
    scope: str = "leaf"
    mu_dtype: DType | None = None
    rounding_key: Key | None = None
    is_bad: Callable[[Array], Array] = lambda g: ~jnp.isfinite(g)

    def __post_init__(self) -> None:
        check_decay("beta", self.beta)
        check_real("weight_decay", self.weight_decay, least=0)
        check_count("accumulation_steps", self.accumulation_steps)
        check_real("shrink", self.shrink, above=0, most=1)
        check_real("rms_floor", self.rms_floor, least=0)
        check_choice("rate", self.rate, ("rms", "fixed"))
        if not callable(self.power):
            check_real("power", self.power, least=0, most=1)
        if self.lazy is not None:
            check_choice("lazy", self.lazy, ("param", "full"))
        check_choice("scope", self.scope, ("leaf", "global"))
        if self.mu_dtype is not None and not jnp.issubdtype(self.mu_dtype, jnp.floating):
            raise ValueError(f"mu_dtype must be a floating-point type; got {self.mu_dtype!r}.")

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(self.init, self.update)

    def init(self, params: Any) -> TigerState:
        paths, leaves, treedef = flatten(params)
        touched = [
            rows_like(leaf) if self._is_lazy(path, leaf) else optax.MaskedNode()
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        return TigerState(
            count=jnp.zeros([], jnp.int32),
            updated=jnp.zeros([], bool),
            mu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=self._mu_dtype(p)), params),
            touched=None if self.lazy is None else treedef.unflatten(touched),
        )

    def update(
        self,
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
        lazy = [self._is_lazy(path, theta) for path, theta in zip(paths, thetas, strict=True)]
        rows = row_masks(paths, gs, lazy, touched_rows if any(lazy) else None, params)
        seen = rows if self.lazy is None else treedef.flatten_up_to(state.touched)
        mus = treedef.flatten_up_to(state.mu)
        # What the momentum cannot hold would make it infinite for ever.
        bad = [jnp.any(self.is_bad(g.astype(mu.dtype))) for g, mu in zip(gs, mus, strict=True)]
        if self.scope == "global" and bad:
            bad = [jnp.any(jnp.stack(bad))] * len(bad)

        leaves = zip(paths, thetas, gs, mus, bad, rows, seen, strict=True)
        steps = [self._step(state.count, number, *leaf) for number, leaf in enumerate(leaves)]
        _, last = self._window(state.count)
        return treedef.unflatten([change for change, _, _ in steps]), TigerState(
            count=optax.safe_increment(state.count),
            updated=functools.reduce(jnp.logical_or, bad, last),
            mu=treedef.unflatten([mu for _, mu, _ in steps]),
            touched=None if self.lazy is None else treedef.unflatten([s for _, _, s in steps]),
        )

    def _step(
        self,
        count: Array,
        number: int,
        path: tuple[Any, ...],
        theta: Array,
        g: Array,
        mu: Array,
        bad: Array,
        rows: Array | None,
        seen: Any,
    ) -> tuple[Array, Array, Any]:
        """One micro-step of one leaf: its update, momentum, and the rows seen in the window."""
        # β in bfloat16 is another number, and squares overflow in float16: float32 at least.
        dtype = wide(theta.dtype, mu.dtype)
        to = lambda value: jnp.asarray(value, dtype)
        at = lambda value: to(value(count) if callable(value) else value)
        label = class_of(path, theta, self.label_fn)
        x, m = theta.astype(dtype), mu.astype(dtype)

        # Where β is applied, where the momentum stays as it is, and where the parameter moves: one
        # truth value for the leaf, or one a row for lazy leaves.
        begins, last = self._window(count)
        stays, moves = bad, last
        if rows is not None:
            rows = rows & ~bad
            moves = last & (rows | seen)
            if self.lazy == "full":
                begins, stays = rows & ~seen, ~rows
            seen = (rows | seen) & ~last

        fresh = to(1 - self.beta) / to(self.accumulation_steps)
        m = jnp.where(stays, m, jnp.where(begins, to(self.beta), to(1)) * m + fresh * to(g))
        direction = jnp.sign(m)
        if callable(self.power) or is_traced(self.power) or self.power != 1:
            direction = direction * jnp.abs(m) ** (to(1) - at(self.power))
        if self.rate == "fixed" or label in ("embedding", "matrix"):
            direction = direction + to(self.weight_decay) * x
        change = jnp.where(
            moves, -at(self.learning_rate) * self._scale(label, x) * direction, to(0)
        )
        centre = to(1 if label == "gamma" else 0)
        change = jnp.where(bad, (to(self.shrink) - to(1)) * (x - centre), change)

        if self.rounding_key is not None and dtype != theta.dtype:
            key = jax.random.fold_in(jax.random.fold_in(self.rounding_key, count), number)
            change = stochastic_round(x + change, theta.dtype, key=key).astype(dtype) - x
        return change.astype(theta.dtype), m.astype(mu.dtype), seen

    def _window(self, count: Array) -> tuple[Array, Array]:
        """Whether this micro-step is the first and the last of its window."""
        k = jnp.asarray(self.accumulation_steps, count.dtype)
        return count % k == 0, (count + 1) % k == 0

    def _scale(self, label: str, x: Array) -> Array:
        """η / α for a leaf of this class."""
        if self.rate == "fixed":
            return jnp.ones([], x.dtype)
        if label in ("vector", "gamma"):
            return jnp.full([], 0.5, x.dtype)
        by_row = label == "embedding" and x.ndim > 0
        axes, n = (-1, x.shape[-1]) if by_row else (None, x.size)
        mean = jnp.sum(x * x, axis=axes, keepdims=by_row) / jnp.asarray(max(n, 1), x.dtype)
        return jnp.maximum(jnp.sqrt(mean), jnp.asarray(self.rms_floor, x.dtype))

    def _is_lazy(self, path: tuple[Any, ...], leaf: Any) -> bool:
        if self.lazy is None or leaf.ndim == 0:
            return False
        return class_of(path, leaf, self.label_fn) == "embedding"

    def _mu_dtype(self, leaf: Any) -> Any:
        dtype = wide(leaf.dtype) if self.mu_dtype is None else self.mu_dtype
        return jax.dtypes.canonicalize_dtype(dtype)
