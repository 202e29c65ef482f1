r"""How the best learning rate, the decrease of a step and the number of steps follow the batch.

For a step θ - η u whose direction u depends on a batch of B examples, the expected loss is, to
second order in η,

    E L(θ - η u) = L - η E[u]·g + η²/2 tr(E[u uᵀ] H),

so that the best rate and the decrease that it gives are

    η* = E[u]·g / tr(E[u uᵀ] H),    ΔL = (E[u]·g)² / (2 tr(E[u uᵀ] H)).

For a batch gradient (SGD) and for its sign (a model of Adam) both are laws of B with few constants:
`SGDLaw` and `SignLaw`. B counts independent examples, and the loss is their mean.

Source: posts 10542, 11260 and 11280; McCandlish et al. 2018 (arXiv 1812.06162); Malladi et al. 2022
(arXiv 2205.10287); Li et al. 2024 (arXiv 2405.14578).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_choice, check_int, check_real, is_traced
from jaxkit._dtypes import wide
from jaxkit._typing import Array, ArrayLike, Float, Key

__all__ = [
    "RULES",
    "BestStep",
    "SGDLaw",
    "SignLaw",
    "StepsDataFit",
    "adam_rule",
    "fit_steps_data",
    "lr_rule",
    "mean_sign",
    "optimal_lr_quadratic",
    "sgd_law",
    "sgd_law_matrix_free",
    "sign_law",
]

RULES = ("linear", "sqrt", "power", "sgd", "sign", "surge")


def lr_rule(
    B: ArrayLike,
    B0: ArrayLike,
    lr0: ArrayLike,
    rule: str,
    *,
    noise_scale: ArrayLike | None = None,
    kappa2: ArrayLike | None = None,
    beta_n: ArrayLike | None = None,
    power: ArrayLike | None = None,
) -> Array:
    r"""The learning rate for batches of B, given the best one for batches of B0.

    | rule     | lr / lr0         | f(B)                                                        |
    |----------|------------------|-------------------------------------------------------------|
    | `linear` | B / B0           |                                                             |
    | `sqrt`   | √(B / B0)        |                                                             |
    | `power`  | (f(B) / f(B0))^a | 1/(1 + B_noise/B); B itself, its small-B limit, without one |
    | `sgd`    | f(B) / f(B0)     | 1/(1 + B_noise/B)                                           |
    | `sign`   | f(B) / f(B0)     | β(B) = (1 + c/B)^(-1/2)                                     |
    | `surge`  | f(B) / f(B0)     | 1/(β_n/β(B) + β(B)/β_n)                                     |

    with c = π κ²/2, or c = B_simple in the mean-field approximation. SGD follows `sgd` (`linear`
    while B ≪ B_noise); Adam and sign methods `sign` or `surge` (`sqrt` while B ≪ c). `power` with
    1/2 < a < 1 is McCandlish et al.'s guess for Adam. B = inf gives the largest rate of a rule that
    has one, such as η_max from one small-B sweep.

    Args:
      B: New batch sizes, of any shape.
      B0: Batch size at which `lr0` is best.
      lr0: That rate.
      rule: One of `RULES`.
      noise_scale: B_noise or B_simple, in the unit of B.
      kappa2: κ² = σ²/g² of one component, for `sign` and `surge`, in place of `noise_scale`.
      beta_n: β_n = √(D/O) of `SignLaw`, for `surge`.
      power: a, for `power`.

    Returns:
      Rates, of the shape of B.

    Raises:
      ValueError: Unknown rule; a number out of range; an argument that the rule needs is missing,
        or one that it has no use for is given.

    Example:
      >>> print(f"{lr_rule(256, 32, 0.1, 'linear'):.3f} {lr_rule(256, 32, 0.1, 'sqrt'):.3f}")
      0.800 0.283
      >>> print(f"{lr_rule(256, 32, 0.1, 'sgd', noise_scale=64.0):.3f}")
      0.240
      >>> print(f"{lr_rule(jnp.inf, 32, 0.1, 'sgd', noise_scale=64.0):.3f}")  # η_max
      0.300

    Source: post 10542; Krizhevsky 2014 (arXiv 1404.5997); Goyal et al. 2017 (arXiv 1706.02677).
    """
    check_choice("rule", rule, RULES)
    given = {"noise_scale": noise_scale, "kappa2": kappa2, "beta_n": beta_n, "power": power}
    _check_options(rule, given)
    B, B0, lr0 = _positive("B", B), _positive("B0", B0), _positive("lr0", lr0)
    number = lambda value: jnp.asarray(value).astype(B.dtype)
    if rule == "linear":
        shape = lambda B: B
    elif rule == "sqrt":
        shape = jnp.sqrt
    elif rule in ("sgd", "power"):
        exponent = 1.0 if rule == "sgd" else power
        base = (lambda B: B) if noise_scale is None else lambda B: 1 / (1 + number(noise_scale) / B)
        shape = lambda B: base(B) ** number(exponent)
    else:
        c = noise_scale if kappa2 is None else 0.5 * math.pi * number(kappa2)
        beta = lambda B: (1 + number(c) / B) ** -0.5
        if rule == "sign":
            shape = beta
        else:
            shape = lambda B: 1 / (number(beta_n) / beta(B) + beta(B) / number(beta_n))
    return number(lr0) * (shape(B) / shape(number(B0)))


def _check_options(rule: str, given: dict[str, Any]) -> None:
    """Raise unless the options of a rule are there, in range, and no others."""
    takes = {
        "sgd": ("noise_scale",),
        "power": ("power", "noise_scale"),
        "sign": ("kappa2", "noise_scale"),
        "surge": ("kappa2", "noise_scale", "beta_n"),
    }.get(rule, ())
    there = {name for name, value in given.items() if value is not None}
    for name in sorted(there - set(takes)):
        raise ValueError(f"{name} must be left out for rule {rule!r}; got {given[name]!r}.")
    for name in takes:
        either = name in ("kappa2", "noise_scale") and rule in ("sign", "surge")
        optional = rule == "power" and name == "noise_scale"
        if name not in there and not optional and not either:
            raise ValueError(f"{name} must be given for rule {rule!r}; got None.")
        if name in there:
            least = {"least": 0} if name in ("kappa2", "noise_scale") else {"above": 0}
            check_real(name, given[name], **least)
    if rule in ("sign", "surge") and len(there & {"kappa2", "noise_scale"}) != 1:
        raise ValueError(f"rule {rule!r} must be given kappa2 or noise_scale, one of them.")


def adam_rule(
    B: float, B0: float, lr0: float, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> dict[str, float]:
    r"""All of Adam's settings for another batch size: the square-root rule of its SDE.

        r = B/B0:    lr = √r lr0,    1 - b → r (1 - b),    eps → eps/√r

    Time per example is what it was, so that both averages span as many examples. Holds while noise
    dominates the gradient.

    Args:
      B: New batch size.
      B0: Batch size of the settings given.
      lr0: Learning rate.
      b1: Decay of the momentum.
      b2: Decay of the squares.
      eps: Added to the root of the squares.

    Returns:
      Keyword arguments of `optax.adam`.

    Raises:
      ValueError: A number is out of range, or r (1 - b) > 1: the rule ends there.

    Example:
      >>> settings = adam_rule(1024, 256, 1e-3, b2=0.99)
      >>> print({name: round(value, 10) for name, value in settings.items()})
      {'learning_rate': 0.002, 'b1': 0.6, 'b2': 0.96, 'eps': 5e-09}

    Source: Malladi et al. 2022 (arXiv 2205.10287).
    """
    for name, value in (("B", B), ("B0", B0), ("lr0", lr0)):
        check_real(name, value, above=0)
    check_real("eps", eps, least=0)
    ratio = B / B0
    betas = {}
    for name, b in (("b1", b1), ("b2", b2)):
        check_real(name, b, least=0, most=1)
        betas[name] = 1 - ratio * (1 - b)
        if betas[name] < 0:
            raise ValueError(f"{name} must be at least 1 - B0/B = {1 - 1 / ratio}; got {b}.")
    return {"learning_rate": math.sqrt(ratio) * lr0, **betas, "eps": eps / math.sqrt(ratio)}


class BestStep(NamedTuple):
    """The best learning rate and the expected decrease of the loss at it."""

    lr: Array
    decrease: Array


def mean_sign(
    g: Float[Array, "dim"],
    sigma: Float[Array, "dim"],
    B: ArrayLike,
    *,
    law: str = "erf",
) -> Float[Array, "dim"]:
    r"""E[sign] of the mean of B independent Gaussians of mean g and standard deviation σ.

    | law          | value, with x = (g/σ) √(B/2)  | largest error        |
    |--------------|-------------------------------|----------------------|
    | `erf`        | erf(x), exact                 |                      |
    | `algebraic`  | x/√(x² + π/4)                 | 0.1078 at x = 1.330  |
    | `mean_field` | g/√(g² + σ²/B)                | 0.0644 at 0.523 = √2 x |

    Args:
      g: Means.
      sigma: Standard deviations, at least 0; where 0 the sign is certain.
      B: Batch size, a scalar.
      law: One of the three.

    Returns:
      Values in [-1, 1].

    Raises:
      ValueError: Unknown law, or B is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{mean_sign(jnp.array([0.2]), jnp.array([3.0]), 16)[0]:.4f}")
      0.2103

    Source: Balles, Hennig 2018 (arXiv 1705.07774); posts 10542 and 11280.
    """
    check_choice("law", law, ("erf", "algebraic", "mean_field"))
    root = jnp.sqrt(_positive("B", B).astype(g.dtype))
    if law == "erf":
        noisy = sigma > 0
        x = g * root / (jnp.where(noisy, sigma, 1) * math.sqrt(2))
        return jnp.where(noisy, jax.scipy.special.erf(x), jnp.sign(g))
    factor = math.sqrt(math.pi / 2) if law == "algebraic" else 1.0
    return _over_norm(g, factor * sigma / root)


def optimal_lr_quadratic(
    g: Float[Array, "dim"],
    H: Float[Array, "dim dim"],
    Sigma: Float[Array, "dim dim"] | Float[Array, "dim"],
    B: ArrayLike,
    kind: str = "sgd",
    *,
    law: str = "erf",
    eps: float = 0.0,
) -> BestStep:
    r"""The best step of a quadratic loss, for batches of B.

    | kind        | direction u      | E[u]        | E[u uᵀ]                                    |
    |-------------|------------------|-------------|--------------------------------------------|
    | `sgd`       | G                | g           | g gᵀ + Σ/B                                 |
    | `sign`      | sign(G)          | μ           | μ μᵀ, with ones on its diagonal            |
    | `soft_sign` | G/√(G² + ε²)     | μ           | μ μᵀ, with s/(s + ε²) on it, s = g² + σ²/B |

    G ~ N(g, Σ/B), its components independent for the last two: of Σ they use the diagonal σ². μ is
    `mean_sign`; for `soft_sign` the mean-field g/√(s + ε²). Exact for `sgd`, and for `sign` with
    `law="erf"`; with it ΔL itself can fall as B grows, where σ/g differs between components.

    Args:
      g: Gradient.
      H: Hessian, symmetric.
      Sigma: Covariance of one example's gradient, or its diagonal.
      B: Batch sizes, of any shape.
      kind: "sgd", "sign" or "soft_sign".
      law: How `sign` computes μ: "erf", "algebraic" or "mean_field".
      eps: ε of `soft_sign`.

    Returns:
      Best rate and decrease, each of the shape of B; infinite where tr(E[u uᵀ] H) ≤ 0, for the
      quadratic then falls without end.

    Raises:
      ValueError: H is not square, not symmetric or does not fit g; Sigma does not fit; B ≤ 0, ε < 0
        or an unknown name.

    Example:
      >>> import jax.numpy as jnp
      >>> g = jnp.array([1.0, -2.0, 0.5])
      >>> H = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]])
      >>> best = optimal_lr_quadratic(g, H, jnp.array([4.0, 9.0, 1.0]), 4)
      >>> print(f"{best.lr:.5f}")
      0.66456

    Source: posts 10542, 11260 and 11280.
    """
    check_choice("kind", kind, ("sgd", "sign", "soft_sign"))
    check_real("eps", eps, least=0)
    if kind == "sgd":
        law_of_B = sgd_law(g, H, Sigma)
        return BestStep(law_of_B.lr(B), law_of_B.decrease(B))
    g, H, Sigma = _check_quadratic(g, H, Sigma)
    variance = jnp.diagonal(Sigma) if Sigma.ndim == 2 else Sigma
    B = _positive("B", B).astype(g.dtype)

    def best(B: Array) -> BestStep:
        if kind == "sign":
            mu, square = mean_sign(g, jnp.sqrt(variance), B, law=law), jnp.ones_like(g)
        else:
            noise = variance / B + eps**2
            mu = _over_norm(g, jnp.sqrt(noise))
            square = jnp.where(g**2 + noise > 0, 1 - eps**2 / _not_zero(g**2 + noise), 0)
        curvature = mu @ H @ mu + jnp.sum((square - mu**2) * jnp.diagonal(H))
        return _best_step(mu @ g, curvature)

    flat = jax.vmap(best)(B.reshape(-1))
    return BestStep(*(x.reshape(B.shape) for x in flat))


class SGDLaw(NamedTuple):
    """η*(B) = η_max/(1 + B_noise/B) and ΔL(B) = ΔL_max/(1 + B_noise/B)."""

    lr_max: Array
    """η_max = g·g / gᵀHg."""
    noise_scale: Array
    """B_noise = tr(ΣH) / gᵀHg."""
    decrease_max: Array
    """ΔL_max = (g·g)² / (2 gᵀHg)."""

    def lr(self, B: ArrayLike) -> Array:
        """η*(B)."""
        return self._scale(self.lr_max, B)

    def decrease(self, B: ArrayLike) -> Array:
        """ΔL(B), the expected decrease of the loss in a step at η*(B)."""
        return self._scale(self.decrease_max, B)

    def _scale(self, most: Array, B: ArrayLike) -> Array:
        slower = 1 + self.noise_scale / _positive("B", B).astype(most.dtype)
        return jnp.where(jnp.isinf(most), most, most / slower)


def sgd_law(
    g: Float[Array, "dim"],
    H: Float[Array, "dim dim"],
    Sigma: Float[Array, "dim dim"] | Float[Array, "dim"],
) -> SGDLaw:
    """The constants of SGD's law from gradient, Hessian and covariance.

    Args:
      g: Gradient.
      H: Hessian, symmetric.
      Sigma: Covariance of one example's gradient, or its diagonal.

    Returns:
      The law; infinite constants where gᵀHg ≤ 0.

    Raises:
      ValueError: H is not square, not symmetric or does not fit g; Sigma does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> H = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]])
      >>> law = sgd_law(jnp.array([1.0, -2.0, 0.5]), H, jnp.array([4.0, 9.0, 1.0]))
      >>> print(f"{law.lr_max:.4f} {law.noise_scale:.4f} {law.lr(16):.4f}")
      1.4894 4.9645 1.1367

    Source: McCandlish et al. 2018 (arXiv 1812.06162, sec. 2.2).
    """
    g, H, Sigma = _check_quadratic(g, H, Sigma)
    noise = jnp.sum(Sigma * H) if Sigma.ndim == 2 else jnp.sum(Sigma * jnp.diagonal(H))
    return _sgd_law(g @ g, g @ H @ g, noise)


def sgd_law_matrix_free(
    loss: Callable[[Any, Any], Array], params: Any, examples: Any, *, chunk: int = 64
) -> SGDLaw:
    r"""The constants of SGD's law for any loss, by products with the Hessian.

        gᵀHg by one product,    tr(ΣH) = mean_i v_iᵀ H v_i,    v_i = ∇ℓ_i - g

    The n examples are taken as the whole distribution: g is their mean gradient, H the Hessian of
    their mean loss. Each costs one gradient and one product with H, O(n²) evaluations in all; what
    H needs of a forward and backward pass over the examples stays in memory.

    Args:
      loss: Of parameters and one example, a scalar.
      params: A pytree.
      examples: A pytree with a leading axis n.
      chunk: Directions v_i to hold at a time.

    Returns:
      The law; infinite constants where gᵀHg ≤ 0.

    Raises:
      ValueError: No leading axis, or `chunk` below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> law = sgd_law_matrix_free(loss, jnp.zeros(2), jnp.array([[1.0, 0.0], [1.0, 4.0]]))
      >>> print(f"{law.lr_max:.1f} {law.noise_scale:.2f}")  # H = I: tr Σ / |g|²
      1.0 0.80

    Source: McCandlish et al. 2018 (arXiv 1812.06162); post 10542.
    """
    check_int("chunk", chunk, least=1)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(examples)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"examples must share one leading axis; got {sizes or 'no leaves'}.")
    gradient = jax.grad(lambda p: jnp.mean(jax.vmap(lambda x: loss(p, x))(examples)))
    g, hessian = jax.linearize(gradient, params)

    dtype = wide(*(leaf.dtype for leaf in jax.tree.leaves(g)))

    def dot(a: Any, b: Any) -> Array:
        product = lambda x, y: jnp.vdot(x.astype(dtype), y.astype(dtype))
        return sum(jax.tree.leaves(jax.tree.map(product, a, b)), jnp.zeros((), dtype))

    def curvature(example: Any) -> Array:
        v = jax.tree.map(jnp.subtract, jax.grad(loss)(params, example), g)
        return dot(v, hessian(v))

    noise = jnp.mean(jax.lax.map(curvature, examples, batch_size=chunk))
    return _sgd_law(dot(g, g), dot(g, hessian(g)), noise)


class SignLaw(NamedTuple):
    r"""Law of sign updates when σ/g is one κ for all components: μ_i = β(B) sign(g_i).

        β(B) = (1 + c/B)^(-1/2),    η* = A β / (D + O β²),    ΔL = ΔL_max/(1 + B_2/B)

    With O > 0 the rate is 2 η_max/(β_n/β + β/β_n); for β_n < 1 it surges: it peaks at B_peak and
    falls to A/(D + O). With O ≤ 0, or β_n ≥ 1, it only grows.

    c = π κ²/2 by the algebraic approximation; B_simple by the mean-field one.
    """

    D: Array
    """tr H."""
    O: Array
    """Σ_{i≠j} sign(g_i g_j) H_ij."""
    A: Array
    """Σ |g_i|."""
    c: Array
    """Batch size at which β² = 1/2."""

    @property
    def beta_n(self) -> Array:
        """√(D/O), the β at which η* peaks; NaN for O ≤ 0, where it is not defined."""
        return jnp.where(self.O > 0, jnp.sqrt(self.D / jnp.where(self.O > 0, self.O, 1)), jnp.nan)

    @property
    def lr_max(self) -> Array:
        """Largest η* over all B: A/(2 √(DO)) at the peak, A/(D + O) at B = ∞ if there is none."""
        peak = self.A / (2 * jnp.sqrt(jnp.where(self._surges, self.D * self.O, 1)))
        return jnp.where(self._surges, peak, self.lr(jnp.inf))

    @property
    def peak(self) -> Array:
        """B_peak = c β_n²/(1 - β_n²), infinite without a surge."""
        apart = jnp.where(self._surges, self.O - self.D, 1)
        return jnp.where(self._surges, self.c * self.D / apart, jnp.inf)

    @property
    def half(self) -> Array:
        """B_2 = c β_n²/(1 + β_n²) = c D/(D + O), at which ΔL is half of ΔL_max.

        Infinite for D + O ≤ 0.
        """
        total = self.D + self.O
        return jnp.where(total > 0, self.c * self.D / _not_zero(total), jnp.inf)

    @property
    def decrease_max(self) -> Array:
        """ΔL_max = A²/(2 (D + O)); infinite for D + O ≤ 0."""
        return self.decrease(jnp.inf)

    @property
    def _surges(self) -> Array:
        return (self.D > 0) & (self.O > self.D)

    def lr(self, B: ArrayLike) -> Array:
        """η*(B); infinite where D + O β² ≤ 0."""
        return self._best(B).lr

    def decrease(self, B: ArrayLike) -> Array:
        """ΔL(B), the expected decrease of the loss in a step at η*(B)."""
        return self._best(B).decrease

    def _best(self, B: ArrayLike) -> BestStep:
        beta = (1 + self.c / _positive("B", B).astype(self.A.dtype)) ** -0.5
        return _best_step(beta * self.A, self.D + self.O * beta**2)


def sign_law(
    g: Float[Array, "dim"],
    H: Float[Array, "dim dim"],
    *,
    kappa2: ArrayLike | None = None,
    noise_scale: ArrayLike | None = None,
) -> SignLaw:
    """The constants of the sign law from gradient, Hessian and one noise-to-signal ratio.

    Args:
      g: Gradient.
      H: Hessian, symmetric.
      kappa2: κ² = σ²/g² of every component (algebraic approximation), or
      noise_scale: B_simple (mean field).

    Returns:
      The law.

    Raises:
      ValueError: H is not square, not symmetric or does not fit g; not exactly one of the two
        numbers is given, or it is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> g, H = jnp.array([1.0, 2.0, 0.5, 1.5]), 0.2 * jnp.eye(4) + 0.8
      >>> law = sign_law(g, H, kappa2=40.0)
      >>> print(f"{law.peak:.2f} {law.lr_max:.5f} {law.lr(10):.5f} {law.lr(1000):.5f}")
      44.88 0.40344 0.34838 0.37214

    Source: Li et al. 2024 (arXiv 2405.14578); posts 10542 and 11280.
    """
    if (kappa2 is None) == (noise_scale is None):
        raise ValueError("sign_law must be given kappa2 or noise_scale, one of them.")
    check_real("kappa2", 0 if kappa2 is None else kappa2, least=0)
    check_real("noise_scale", 0 if noise_scale is None else noise_scale, least=0)
    g, H, _ = _check_quadratic(g, H, None)
    c = jnp.asarray(noise_scale if kappa2 is None else kappa2).astype(g.dtype)
    c = c if kappa2 is None else 0.5 * math.pi * c
    signs = jnp.sign(g)
    # Zero components of g count in D but not in O: μ is 0 there, and u is ±1.
    diagonal = jnp.diagonal(H)
    O = signs @ H @ signs - jnp.sum(signs**2 * diagonal)
    return SignLaw(jnp.sum(diagonal), O, jnp.sum(jnp.abs(g)), c)


class StepsDataFit(NamedTuple):
    r"""Steps and examples to a target: S = S_min + E_min/B and E = B S.

    Equivalently `(S/S_min - 1)(E/E_min - 1) = 1`: half of the steps that B = 1 would save are saved
    at B_crit = E_min/S_min, for twice the least number of examples.
    """

    S_min: Array
    """Steps that no batch size undercuts."""
    E_min: Array
    """Examples likewise."""
    B_crit: Array
    """E_min / S_min."""
    residuals: Float[Array, "batch"]
    """Of log S, observed less fitted."""
    interval: Float[Array, "2"]
    """Bootstrap interval of B_crit."""

    def steps(self, B: ArrayLike) -> Array:
        """S(B) = S_min (1 + B_crit/B)."""
        return self.S_min * (1 + self.B_crit / _positive("B", B).astype(self.S_min.dtype))

    def examples(self, B: ArrayLike) -> Array:
        """E(B) = S_min (B + B_crit)."""
        return self.S_min * (_positive("B", B).astype(self.S_min.dtype) + self.B_crit)


def fit_steps_data(
    B: Float[Array, "batch"],
    S: Float[Array, "batch"],
    *,
    key: Key | None = None,
    bootstrap: int = 1000,
    confidence: float = 0.9,
) -> StepsDataFit:
    """Fit S = S_min + E_min/B to measured steps, by least squares of log S.

    The interval is a residual bootstrap: fits to the fitted steps times resampled exp(residuals).

    Args:
      B: Batch sizes, three or more.
      S: Steps to the target, each at its best learning rate.
      key: Of the bootstrap; `jax.random.key(0)` by default.
      bootstrap: Resamples; 0 leaves the interval NaN.
      confidence: Probability inside the interval.

    Returns:
      The fit. Steps that do not fall with B drive B_crit to 0, steps proportional to 1/B drive it
      to infinity.

    Raises:
      ValueError: Shapes differ or are too short, or a value is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> B = jnp.array([1.0, 4.0, 16.0, 64.0])
      >>> fit = fit_steps_data(B, 30 * (1 + 16 / B))
      >>> print(f"{fit.S_min:.1f} {fit.E_min:.0f} {fit.B_crit:.1f}")
      30.0 480 16.0

    Source: McCandlish et al. 2018 (arXiv 1812.06162, sec. 2.3).
    """
    check_int("bootstrap", bootstrap, least=0)
    check_real("confidence", confidence, above=0, most=1)
    B, S = _positive("B", B), _positive("S", S)
    if B.ndim != 1 or B.shape != S.shape or B.size < 3:
        raise ValueError(
            f"B and S must be vectors of one length, 3 at least; got shapes {B.shape}, {S.shape}."
        )
    for name, values in (("B", B), ("S", S)):
        if not is_traced(values) and not bool(jnp.isfinite(values).all()):
            raise ValueError(f"{name} must be finite; got {values}.")
    x, y = jnp.log(B), jnp.log(S)
    p = _fit_logs(x, y)
    residuals = y - _log_steps(p, x)
    interval = jnp.full(2, jnp.nan, y.dtype)
    if bootstrap:
        key = jax.random.key(0) if key is None else key
        noise = jax.random.choice(key, residuals, (bootstrap, B.size))
        fits = jax.vmap(lambda e: _fit_logs(x, _log_steps(p, x) + e))(noise)
        tail = (1 - confidence) / 2
        at = jnp.asarray([tail, 1 - tail], y.dtype)
        interval = jnp.exp(jnp.quantile(fits[:, 1] - fits[:, 0], at))
    S_min, E_min = jnp.exp(p)
    return StepsDataFit(S_min, E_min, jnp.exp(p[1] - p[0]), residuals, interval)


def _log_steps(p: Array, x: Array) -> Array:
    """log(S_min + E_min/B), from the logarithms of all three."""
    return jnp.logaddexp(p[0], p[1] - x)


def _fit_logs(x: Array, y: Array, iterations: int = 100) -> Array:
    """Levenberg-Marquardt on (log S_min, log E_min), from the largest values that data allow."""

    def step(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        p, damping = carry
        share = jax.nn.sigmoid(p[0] - p[1] + x)  # of S_min in S, which is the derivative
        J = jnp.stack([share, 1 - share], axis=1)
        r = y - _log_steps(p, x)
        (a, b), (_, d) = J.T @ J + damping * jnp.eye(2, dtype=y.dtype)
        u, v = J.T @ r
        moved = p + jnp.stack([d * u - b * v, a * v - b * u]) / (a * d - b**2)
        better = jnp.sum((y - _log_steps(moved, x)) ** 2) <= jnp.sum(r**2)
        floor = jnp.finfo(y.dtype).eps
        damping = jnp.clip(jnp.where(better, damping / 4, damping * 4), floor, 1e6)
        return jnp.where(better, moved, p), damping

    start = jnp.stack([jnp.min(y), jnp.min(x + y)])
    return jax.lax.fori_loop(0, iterations, step, (start, jnp.asarray(1e-2, y.dtype)))[0]


def _sgd_law(gg: Array, gHg: Array, noise: Array) -> SGDLaw:
    best = _best_step(gg, gHg)
    return SGDLaw(best.lr, jnp.where(gHg > 0, noise / _not_zero(gHg), jnp.inf), best.decrease)


def _best_step(slope: Array, curvature: Array) -> BestStep:
    """Of the parabola -η slope + η²/2 curvature."""
    bounded = curvature > 0
    safe = jnp.where(bounded, curvature, 1)
    return BestStep(
        jnp.where(bounded, slope / safe, jnp.inf),
        jnp.where(bounded, slope**2 / (2 * safe), jnp.inf),
    )


def _over_norm(x: Array, y: Array) -> Array:
    """x/√(x² + y²), and the sign of x for y = 0; no square over- or underflows."""
    neither = (x == 0) & (y == 0)
    return jnp.where(neither, 0, x / jnp.hypot(jnp.where(neither, 1, x), y))


def _not_zero(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)


def _positive(name: str, value: ArrayLike) -> Array:
    """An array of real numbers above 0 (infinity included), in a floating-point type."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.result_type(float))
    if not is_traced(array) and not bool(jnp.all(array > 0)):
        raise ValueError(f"{name} must be greater than 0; got {value!r}.")
    return array


def _check_quadratic(g: Any, H: Any, Sigma: Any) -> tuple[Array, Array, Any]:
    """Check shapes and symmetry; compute in float32 at least."""
    g, H = jnp.asarray(g), jnp.asarray(H)
    if g.ndim != 1 or H.shape != (g.size, g.size):
        raise ValueError(
            f"H must be square, of the size of the vector g; got {H.shape} for g {g.shape}."
        )
    if not is_traced(H):
        values = np.asarray(H, np.float64)
        eps = float(jnp.finfo(H.dtype).eps) if jnp.issubdtype(H.dtype, jnp.floating) else 0.0
        if not np.allclose(values, values.T, rtol=0, atol=16 * eps * np.abs(values).max(initial=0)):
            raise ValueError(f"H must be symmetric; it differs from its transpose: got {H}.")
    dtype = wide(g.dtype, H.dtype)
    if Sigma is not None:
        Sigma = jnp.asarray(Sigma).astype(dtype)
        if Sigma.shape not in (g.shape, H.shape):
            raise ValueError(
                f"Sigma must have shape {H.shape}, or {g.shape} for a diagonal; got {Sigma.shape}."
            )
    return g.astype(dtype), H.astype(dtype), Sigma
