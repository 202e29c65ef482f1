"""What SGD's loss is at most, computed from its schedule alone.

Source: Zinkevich 2003 (ICML); posts 9902, 11469, 11480 and 11494; Orabona 2020; Defazio et al. 2023
(arXiv 2310.07831).
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxkit._checks import check_choice, check_int, check_real, is_traced
from jaxkit._dtypes import wide
from jaxkit._typing import Array, ArrayLike, Float

__all__ = ["FORMS", "bound", "closed_form"]

FORMS = ("average", "expected", "weighted", "last", "last_refined")


def bound(
    schedule: Float[Array, "steps"] | Callable[[Array], Array],
    T: int,
    D: ArrayLike,
    G: ArrayLike,
    form: str = "average",
) -> Array:
    r"""A bound on the loss of T steps above that of θ*, for any schedule; differentiable in it.

    | form           | bounds                        | value                                     |
    |----------------|-------------------------------|-------------------------------------------|
    | `average`      | mean of L_t(θ_t) - L_t(θ*)    | D²/(2Tη_T) + G²/(2T) Σ η_t                |
    | `expected`     | its expectation, Θ unbounded  | D²/(2Tη_T) + G²/(2T) Σ η_t²/η_T           |
    | `weighted`     | its η-weighted mean           | (D² + G² Σ η_t²) / (2 Σ η_t)              |
    | `last`         | E[L(θ_T) - L(θ*)]             | D²/(2Tη_T) + G²/2 Σ η_t²/(η_T max(1,T-t)) |
    | `last_refined` | the same                      | D²/(2Ση_t) + G²/2 Σ η_t²/η_{min(t+1,T):T} |

    with η_{k:T} = Σ_{j>=k} η_j. D bounds all ||θ_t - θ*|| in `average`, and is ||θ_1 - θ*|| in the
    others. Expectations are over independent, identically distributed losses. `average`, `expected`
    and `last` hold for steps that do not increase, and say nothing for others; the value is not a
    bound then. By Jensen's inequality `expected` bounds the mean iterate too, and `weighted` the
    η-weighted mean iterate.

    A schedule that goes to 0 makes D²/(2Tη_T) large: use `weighted` or `last_refined` there.

    Args:
      schedule: η_1..η_T; or an optax schedule, which counts from 0: η_t = schedule(t - 1).
      T: Steps.
      D: See above.
      G: Bound of all ||g_t||. For a batch that of its mean gradient.
      form: One of `FORMS`.

    Returns:
      The bound; infinite if η_T = 0 stands in a denominator.

    Raises:
      ValueError: T < 1, D or G not positive, the schedule has another length, or it is not positive
        before T; an unknown form.

    Example:
      >>> import jax.numpy as jnp
      >>> t = jnp.arange(1, 101)
      >>> print(f"{bound(2 / (3 * 2**0.5 * jnp.sqrt(t)), 100, 2.0, 3.0):.6f}")
      0.818609
      >>> print(f"{bound(lambda count: 0.1 * (1 - (count + 1) / 101), 100, 2.0, 3.0):.3f}")
      20.425
    """
    check_choice("form", form, FORMS)
    eta = _step_sizes(schedule, T)
    check_real("D", D, above=0)
    check_real("G", G, above=0)
    D2, G2 = (jnp.asarray(x).astype(eta.dtype) ** 2 for x in (D, G))
    if form == "weighted":
        return (D2 + G2 * _sum(eta**2)) / (2 * _sum(eta))
    last = eta[-1]
    moving = jnp.where(last > 0, last, 1)
    start = D2 / (2 * T * moving)
    if form == "average":
        value = start + G2 / (2 * T) * _sum(eta)
    elif form == "expected":
        value = start + G2 / (2 * T) * _sum(eta**2) / moving
    elif form == "last":
        left = jnp.maximum(1, T - jnp.arange(1, T + 1)).astype(eta.dtype)
        value = start + G2 / 2 * _sum(eta**2 / left) / moving
    else:
        tails = jnp.cumsum(jnp.append(eta[:-1], moving)[::-1])[::-1]
        value = D2 / (2 * _sum(eta)) + G2 / 2 * _sum(eta**2 / jnp.append(tails[1:], moving))
    return jnp.where(last > 0, value, jnp.inf)


def closed_form(
    kind: str, T: int, D: float, G: float, *, scale: float | None = None
) -> tuple[float, float]:
    r"""The best scale α of a common schedule, and its bound as a formula.

    | kind           | η_t             | bound              | best α     | there     |
    |----------------|-----------------|--------------------|------------|-----------|
    | `constant`     | α               | D²/(2Tα) + G²α/2   | D/(G√T)    | DG/√T     |
    | `inverse_sqrt` | α/√t            | (D²/(2α) + G²α)/√T | D/(G√2)    | √2 DG/√T  |
    | `linear_decay` | α (1 - t/(T+1)) | D²/(αT) + 2G²α     | D/(G√(2T)) | 2√2 DG/√T |

    The first two bound the average loss; `bound(..., "average")` is tighter for `inverse_sqrt`,
    summing Σ 1/√t instead of bounding it by 2√T - 1. The third bounds the last iterate's expected
    loss, with D = ||θ_1 - θ*||.

    Args:
      kind: One of the three.
      T: Steps.
      D: As for `bound`.
      G: As for `bound`.
      scale: α; by default the best.

    Returns:
      α and the bound.

    Raises:
      ValueError: Unknown kind, or a number out of range.

    Example:
      >>> alpha, value = closed_form("constant", 100, 2.0, 3.0)
      >>> print(f"{alpha:.6f} {value:.3f}")
      0.066667 0.600
    """
    T = check_int("T", T, least=1)
    for name, number in (("D", D), ("G", G)):
        check_real(name, number, above=0)
    kinds = {
        "constant": (D**2 / (2 * T), G**2 / 2),
        "inverse_sqrt": (D**2 / (2 * math.sqrt(T)), G**2 / math.sqrt(T)),
        "linear_decay": (D**2 / T, 2 * G**2),
    }
    check_choice("kind", kind, kinds)
    a, b = kinds[kind]
    alpha = math.sqrt(a / b) if scale is None else check_real("scale", scale, above=0)
    return alpha, a / alpha + b * alpha


def _step_sizes(schedule: Any, T: int) -> Array:
    """η_1..η_T as an array, positive up to the last but one."""
    T = check_int("T", T, least=1)
    if callable(schedule):
        eta = jnp.broadcast_to(jnp.asarray(schedule(jnp.arange(T))), (T,))
    else:
        eta = jnp.asarray(schedule)
    if eta.shape != (T,):
        raise ValueError(f"schedule must have {T} steps; got shape {eta.shape}.")
    if not jnp.issubdtype(eta.dtype, jnp.floating):
        eta = eta.astype(jnp.result_type(float))
    eta = eta.astype(wide(eta.dtype))
    if not is_traced(eta):
        if not bool(jnp.all(jnp.isfinite(eta))):
            raise ValueError(
                "schedule must be finite (a function is read at 0..T-1, as optax does: write"
                f" α/sqrt(count + 1) for α/√t); got {eta}."
            )
        if not bool(jnp.all(eta[:-1] > 0) & (eta[-1] >= 0)):
            raise ValueError(
                f"schedule must be positive before step T, and not below 0; got {eta}."
            )
    return eta


def _sum(x: Array) -> Array:
    """A sum of sums of √T terms: rounding grows with √T, not with T."""
    side = math.isqrt(x.size - 1) + 1
    return jnp.sum(jnp.sum(jnp.pad(x, (0, side**2 - x.size)).reshape(side, side), axis=1))
