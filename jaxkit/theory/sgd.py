r"""The average loss of projected SGD on convex losses: bounds before a run, a certificate after it.

θ_{t+1} = Π(θ_t - η_t g_t), t = 1..T, with g_t a subgradient of a convex loss L_t at θ_t and Π the
projection onto a closed convex Θ. For every θ* in Θ, from ||Π(a) - θ*|| <= ||a - θ*||,

    d_{t+1}² <= d_t² - 2 η_t g_t·(θ_t - θ*) + η_t² ||g_t||²,    d_t = ||θ_t - θ*||,

and from convexity, L_t(θ_t) - L_t(θ*) <= g_t·(θ_t - θ*). Divided by 2 η_t and summed,

    T gap <= Σ_t (1/(2η_t) - 1/(2η_{t-1})) d_t² - d_{T+1}²/(2η_T) + Σ_t η_t ||g_t||²/2,   1/η_0 = 0,

where gap = (1/T) Σ_t [L_t(θ_t) - L_t(θ*)] is the regret a step: the *a-posteriori* bound. If η does
not increase, d_t <= D and ||g_t|| <= G, it is at most the bound known beforehand,

    gap <= D²/(2 T η_T) + G²/(2T) Σ_t η_t.

Both hold for every sequence of losses, path by path: no independence, no expectation.

Source: Zinkevich 2003 (ICML); post 9902.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_choice, check_real, is_traced
from jaxkit._typing import Array, ArrayLike, Bool, Float, Int
from jaxkit.theory.convex import convexity_slack
from jaxkit.theory.domains import Domain, norm, subtract

__all__ = ["Certificate", "RegretState", "RegretTracker", "certify"]


_SUMS = (
    "loss",
    "eta",
    "eta2",
    "eta_loss",
    "eta_grad2",
    "comparator",
    "eta_comparator",
    "telescope",
)


class RegretState(NamedTuple):
    """What a certificate needs of a run: some thirty scalars, whatever T and the parameters are."""

    steps: Int[Array, ""]
    """T."""
    sums: Float[Array, "sums"]
    """Of L_t, η_t, η_t², η_t L_t, η_t ||g_t||², L_t(θ*), η_t L_t(θ*) and the telescoping terms."""
    carry: Float[Array, "sums"]
    """What rounding has left out of them."""
    eta_last: Float[Array, ""]
    grad_max: Float[Array, ""]
    """max ||g_t||."""
    distance_first: Float[Array, ""]
    """d_1; NaN, as all that follows from θ*, without a comparator."""
    distance_max: Float[Array, ""]
    distance_next: Float[Array, ""]
    """d_{T+1}, or NaN if the last step came without `next_params`."""
    slack_min: Float[Array, ""]
    """Least convexity slack towards θ*, relative to the terms in it."""
    monotone: Bool[Array, ""]
    """η_t <= η_{t-1} all along, and η_t > 0 before T."""
    inside: Bool[Array, ""]
    """θ_t in Θ all along."""
    diameter: Float[Array, ""]
    """Of Θ."""
    exact: Bool[Array, ""]
    """Whether the projection onto Θ is."""
    finite: Bool[Array, ""]
    eps: Float[Array, ""]
    """Of the narrowest type among losses, gradients and parameters."""
    plain_sgd: Bool[Array, ""]
    """Every step of which `next_params` was given was Π(θ_t - η_t g_t), up to rounding."""
    steps_seen: Int[Array, ""]
    """How many those are."""


@dataclasses.dataclass(frozen=True)
class RegretTracker:
    """Follows a run of projected SGD with O(1) memory, inside `jit` and `scan`.

    Sums are compensated for rounding, in float64 where JAX has it and in float32 elsewhere.

    Attributes:
      domain: Θ.
      comparator: θ*, if known.

    Raises:
      ValueError: `comparator` is outside `domain`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxkit.theory import ball, certify, closed_form
      >>> domain, T = ball(1.0), 400
      >>> eta, _ = closed_form("constant", T, D=2.0, G=1.0)
      >>> tracker = RegretTracker(domain, comparator=jnp.array(0.0))
      >>> def step(carry, t):
      ...     theta, state = carry
      ...     target = jnp.where(t % 2 == 0, 1.0, -1.0)
      ...     loss, grad = jax.value_and_grad(lambda x: jnp.abs(x - target))(theta)
      ...     new = domain.project(theta - eta * grad)
      ...     state = tracker.update(
      ...         state, loss, grad, eta, theta, comparator_loss=jnp.abs(target), next_params=new
      ...     )
      ...     return (new, state), None
      >>> (_, state), _ = jax.lax.scan(step, (jnp.array(0.7), tracker.init()), jnp.arange(T))
      >>> print(certify(state, domain, G=1.0, convex="declared"))
      certified: gap 0.05 <= bound 0.1
        average loss 1.05, comparator 1; T = 400, D = 2, G = 1 (a priori)
        bounds: average 0.1, weighted 0.05613, a_posteriori 0.05613, a_posteriori_final 0.05
    """

    domain: Domain
    comparator: Any = None

    def __post_init__(self) -> None:
        if self.comparator is not None:
            _check_inside("comparator", self.comparator, self.domain)

    def init(self) -> RegretState:
        """The state before the first step."""
        dtype = jnp.result_type(float)
        zero, nan = (lambda: jnp.zeros((), dtype)), (lambda: jnp.full((), jnp.nan, dtype))
        flag, count = (lambda: jnp.ones((), bool)), (lambda: jnp.zeros((), jnp.int32))
        known = self.comparator is not None
        return RegretState(
            steps=count(),
            sums=jnp.zeros(len(_SUMS), dtype),
            carry=jnp.zeros(len(_SUMS), dtype),
            eta_last=jnp.full((), jnp.inf, dtype),
            grad_max=zero(),
            distance_first=nan(),
            distance_max=zero() if known else nan(),
            distance_next=nan(),
            slack_min=jnp.full((), jnp.inf if known else jnp.nan, dtype),
            monotone=flag(),
            inside=flag(),
            diameter=jnp.full((), self.domain.diameter, dtype),
            exact=jnp.full((), self.domain.exact),
            finite=flag(),
            eps=zero(),
            plain_sgd=flag(),
            steps_seen=count(),
        )

    def update(
        self,
        state: RegretState,
        loss: ArrayLike,
        grads: Any,
        step_size: ArrayLike,
        params: Any,
        *,
        comparator_loss: ArrayLike | None = None,
        next_params: Any = None,
    ) -> RegretState:
        """One step more.

        Args:
          state: Before it.
          loss: L_t(θ_t), taken before the step.
          grads: g_t at θ_t, of the same batch; raw, not clipped.
          step_size: η_t.
          params: θ_t.
          comparator_loss: L_t(θ*), on the same batch; with a comparator.
          next_params: θ_{t+1}; if given, it is checked to be Π(θ_t - η_t g_t).

        Returns:
          The state after it.

        Raises:
          ValueError: `comparator_loss` is missing, or given without a comparator.
        """
        if (comparator_loss is None) != (self.comparator is None):
            raise ValueError(
                "comparator_loss must be given with a comparator, and only then;"
                f" got {comparator_loss!r} with comparator {self.comparator!r}."
            )
        dtype = state.sums.dtype
        eps = _eps((loss, grads, params))
        cast = lambda x: jnp.asarray(x).astype(dtype)
        loss, eta, size = cast(loss), cast(step_size), cast(norm(grads))
        distance = slack = other = cast(jnp.nan)
        distance_next = cast(jnp.nan)
        if self.comparator is not None:
            other = cast(comparator_loss)
            distance = cast(norm(subtract(params, self.comparator)))
            scale = jnp.abs(loss) + jnp.abs(other) + size * distance
            slack = convexity_slack(loss, grads, params, other, self.comparator)
            slack = slack.astype(dtype) / jnp.where(scale > 0, scale, 1)
            if next_params is not None:
                distance_next = cast(norm(subtract(next_params, self.comparator)))

        inverse = lambda x: 1 / (2 * x)
        terms = {
            "loss": loss,
            "eta": eta,
            "eta2": eta**2,
            "eta_loss": eta * loss,
            "eta_grad2": eta * size**2,
            "comparator": other,
            "eta_comparator": eta * other,
            # At θ* itself nothing is added, η_T = 0 included.
            "telescope": jnp.where(
                distance == 0, 0, (inverse(eta) - inverse(state.eta_last)) * distance**2
            ),
        }
        sums, carry = _add(state.sums, state.carry, jnp.stack([terms[name] for name in _SUMS]))
        plain_sgd, seen = state.plain_sgd, state.steps_seen
        if next_params is not None:
            plain_sgd &= _is_sgd_step(self.domain, params, grads, step_size, next_params)
            seen += 1
        return RegretState(
            steps=state.steps + 1,
            sums=sums,
            carry=carry,
            eta_last=eta,
            grad_max=jnp.maximum(state.grad_max, size),
            distance_first=jnp.where(state.steps == 0, distance, state.distance_first),
            distance_max=jnp.maximum(state.distance_max, distance),
            distance_next=distance_next,
            slack_min=jnp.minimum(state.slack_min, slack),
            monotone=state.monotone & (eta <= state.eta_last) & (state.eta_last > 0) & (eta >= 0),
            inside=state.inside & self.domain.contains(params),
            diameter=state.diameter,
            exact=state.exact,
            finite=state.finite & jnp.isfinite(loss) & jnp.isfinite(size) & jnp.isfinite(eta),
            eps=jnp.maximum(state.eps, eps),
            plain_sgd=plain_sgd,
            steps_seen=seen,
        )


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was measured, what was bounded, and what was assumed.

    Attributes:
      status: "certified"; "not certified", for the `reasons` given; or "invalid", if a loss, a
        gradient or a step was not finite.
      reasons: Assumptions that are violated or undeclared; empty if certified.
      assumptions: Each with True, False, None for undeclared, or how it is known.
      kind: "a posteriori" if D or G are the largest observed, else "a priori".
      steps: T.
      average_loss: Mean of L_t(θ_t).
      comparator_loss: Mean of L_t(θ*), or None.
      gap: Their difference, or None.
      weighted_gap: Its η-weighted mean, or None.
      bounds: By form, those that apply: "average" and the a-posteriori ones bound `gap`, "weighted"
        bounds `weighted_gap`.
      D: Bound of ||θ_t - θ*||.
      G: Bound of ||g_t||.
    """

    status: str
    reasons: tuple[str, ...]
    assumptions: dict[str, bool | str | None]
    kind: str
    steps: int
    average_loss: float
    comparator_loss: float | None
    gap: float | None
    weighted_gap: float | None
    bounds: dict[str, float]
    D: float
    G: float

    @property
    def gap_lower_bound(self) -> float | None:
        """`gap` again: what the regret against the best point is at least. None without θ*."""
        return self.gap

    @property
    def bound(self) -> float:
        """The bound known beforehand; infinite where it does not apply."""
        return self.bounds.get("average", math.inf)

    @property
    def ratio(self) -> float | None:
        """gap / bound, or None without θ*."""
        return None if self.gap is None else self.gap / self.bound

    def __str__(self) -> str:
        head = self.status + (": " + ", ".join(self.reasons) if self.reasons else "")
        if self.status == "certified":
            gap = "gap" if self.gap is None else f"gap {self.gap:.4g}"
            head += f": {gap} <= bound {self.bound:.4g}"
        other = "" if self.comparator_loss is None else f", comparator {self.comparator_loss:.4g}"
        bounds = ", ".join(f"{name} {value:.4g}" for name, value in self.bounds.items())
        return (
            f"{head}\n  average loss {self.average_loss:.4g}{other}; T = {self.steps}, "
            f"D = {self.D:.4g}, G = {self.G:.4g} ({self.kind})\n  bounds: {bounds or 'none'}"
        )


def certify(
    state: RegretState,
    domain: Domain,
    G: float | None = None,
    theta_star: Any = None,
    *,
    D: float | None = None,
    convex: str | bool | None = None,
    plain_sgd: bool | None = None,
) -> Certificate:
    """Hold a run against the bounds, and say which assumption fails if one does.

    Not for `jit`: the answer is text and numbers.

    Args:
      state: Of a `RegretTracker`.
      domain: Θ, the tracker's.
      G: Bound of ||g_t||; by default the largest seen, which makes the certificate "a posteriori".
      theta_star: θ*, to check that it is in `domain` (a tracker has checked its own).
      D: Bound of ||θ_t - θ*||; by default the diameter of `domain`, or the largest distance seen if
        that is infinite.
      convex: How it is known that all losses are convex: "declared" (or True), "checked by sampled
        inequality" (see `sampled_convexity`), None if it is not. What the tracker saw overrides it.
      plain_sgd: Whether the steps were Π(θ - ηg), where the tracker did not see `next_params`; what
        it saw overrides this. Adam's or clipped steps are not.

    Returns:
      The certificate. It is never "certified" if an assumption is violated or undeclared, or if the
      gap exceeds a bound.

    Raises:
      ValueError: No steps, D or G not positive, another `domain` than the tracker's, `theta_star`
        outside it, `convex` unknown.

    Example: see `RegretTracker`.
    """
    if int(state.steps) < 1:
        raise ValueError("state must have seen at least one step; got 0.")
    if convex not in (None, True, False):
        check_choice("convex", convex, ("declared", "checked by sampled inequality"))
    tracked, given = np.asarray(state.diameter), np.float64(domain.diameter)
    if tracked != given.astype(tracked.dtype) or bool(state.exact) != domain.exact:
        raise ValueError(
            f"domain must be the tracker's, of diameter {tracked:g}; got the {domain.name}, of"
            f" diameter {given:g}."
        )
    if theta_star is not None:
        _check_inside("theta_star", theta_star, domain)
    sums = np.asarray(state.sums, np.float64) + np.asarray(state.carry, np.float64)
    total = dict(zip(_SUMS, sums.tolist(), strict=True))
    T, eta_last = int(state.steps), float(state.eta_last)
    known = not math.isnan(float(state.distance_max))
    monotone = bool(state.monotone)

    seen = float(state.grad_max), float(state.distance_max)
    observed = (G is None, D is None and math.isinf(domain.diameter))
    G = seen[0] if G is None else float(check_real("G", G, above=0))
    if D is None:
        D = domain.diameter if math.isfinite(domain.diameter) else seen[1] if known else math.inf
    else:
        D = float(check_real("D", D, above=0))

    bounds, D2, G2 = {}, D * D, G * G  # a power of a float raises where a product is infinite
    if monotone and math.isfinite(D):
        bounds["average"] = _ratio(D2, 2 * T * eta_last) + G2 / (2 * T) * total["eta"]
    gap = weighted_gap = None
    if known:
        gap = (total["loss"] - total["comparator"]) / T
        weighted_gap = _ratio(total["eta_loss"] - total["eta_comparator"], total["eta"])
        first, after = float(state.distance_first), float(state.distance_next)
        bounds["weighted"] = _ratio(first * first + G2 * total["eta2"], 2 * total["eta"])
        bounds["a_posteriori"] = (total["telescope"] + total["eta_grad2"] / 2) / T
        if not math.isnan(after):
            final = bounds["a_posteriori"] - _ratio(after * after, 2 * eta_last) / T
            bounds["a_posteriori_final"] = final

    slack, all_seen = float(state.slack_min), int(state.steps_seen) == T
    eps = float(state.eps)
    if slack < -max(1e-5, 8 * eps):  # relative to the terms, far above their rounding
        convex = False
    elif convex is True:
        convex = "declared"
    tolerance = max(1e-6 if state.sums.dtype == jnp.float64 else 1e-4, 8 * eps)
    assumptions: dict[str, bool | str | None] = {
        "convex": convex,
        "monotone_steps": monotone,
        "gradient_bound": seen[0] <= G * (1 + tolerance),
        "in_domain": bool(state.inside),
        "bounded_D": math.isfinite(D) and not (known and seen[1] > D * (1 + tolerance)),
        "plain_sgd": False if not bool(state.plain_sgd) else True if all_seen else plain_sgd,
        "exact_projection": domain.exact,
    }
    names = {
        "convex": "convexity",
        "monotone_steps": "steps that do not increase",
        "gradient_bound": "max ||g|| <= G",
        "in_domain": "iterates in the domain",
        "bounded_D": "bounded D",
        "plain_sgd": "plain SGD",
        "exact_projection": "exact projection",
    }
    reasons = [
        names[name] + (" (undeclared)" if value is None else "")
        for name, value in assumptions.items()
        if not value
    ]
    if gap is not None and not reasons:
        room = tolerance * (abs(total["loss"]) / T + 1e-30)
        reasons = [
            f"gap above its {name} bound"
            for name, value in bounds.items()
            if name != "weighted" and not gap <= value + room
        ]
    status = "not certified" if reasons else "certified"
    if not bool(state.finite):
        status, reasons = "invalid", ["loss, gradient or step not finite"]
    return Certificate(
        status=status,
        reasons=tuple(reasons),
        assumptions=assumptions,
        kind="a posteriori" if any(observed) else "a priori",
        steps=T,
        average_loss=total["loss"] / T,
        comparator_loss=total["comparator"] / T if known else None,
        gap=gap,
        weighted_gap=weighted_gap,
        bounds=bounds,
        D=D,
        G=G,
    )


def _add(sums: Array, carry: Array, terms: Array) -> tuple[Array, Array]:
    """Sums to twice the precision: what the first addition loses is carried on."""
    new, lost = _two_sum(sums, terms)
    new, rest = _two_sum(new, carry + lost)
    return new, jnp.where(jnp.isfinite(rest), rest, 0)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and the rounding error (Knuth)."""
    new = a + b
    part = new - a
    return new, (a - (new - part)) + (b - part)


def _is_sgd_step(domain: Domain, params: Any, grads: Any, step_size: Any, after: Any) -> Array:
    rate = jnp.asarray(step_size)
    move = lambda p, g: p - rate.astype(p.dtype) * g.astype(p.dtype)
    aim = domain.project(jax.tree.map(move, params, grads))
    size = norm(params)
    return norm(subtract(after, aim)) <= 8 * _eps(params) * (
        size + rate.astype(size.dtype) * norm(grads).astype(size.dtype)
    )


def _eps(tree: Any) -> float:
    """Rounding of the narrowest floating-point type in a tree."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree)]
    floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floating), default=0.0)


def _ratio(x: float, y: float) -> float:
    return x / y if y > 0 else math.inf


def _check_inside(name: str, point: Any, domain: Domain) -> None:
    inside = domain.contains(jax.tree.map(jnp.asarray, point))
    if not is_traced(inside) and not bool(inside):
        raise ValueError(f"{name} must be in the {domain.name}; it is not.")
