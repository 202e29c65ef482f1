"""Closed convex sets of parameters, and projection onto them as an optax wrapper.

Π(x) is the point of the set nearest to x. For b in the set ||Π(a) - b|| <= ||a - b||, which is all
that the bounds of `jaxkit.theory.sgd` ask of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit._checks import check_int, check_real
from jaxkit._dtypes import wide
from jaxkit._typing import Array, ArrayLike, Bool, Float

__all__ = [
    "Domain",
    "affine",
    "ball",
    "box",
    "half_space",
    "intersection",
    "l1_ball",
    "norm",
    "projected",
    "simplex",
    "unbounded",
]


@dataclasses.dataclass(frozen=True)
class Domain:
    """A closed convex set of parameters, a pytree of which is one vector.

    Attributes:
      name: For messages.
      project: Π, of a pytree; keeps shapes and dtypes.
      diameter: Largest distance of two points, or more; infinite for unbounded sets.
      exact: Whether `project` is Π up to rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> print(ball(1.0).project(jnp.array([3.0, 4.0])), ball(1.0).diameter)
      [0.6 0.8] 2.0
    """

    name: str
    project: Callable[[Any], Any]
    diameter: float
    exact: bool = True

    def contains(self, params: Any) -> Bool[Array, ""]:
        """Whether `params` is within 1e-6 of the set (relative; rounding in narrow dtypes more)."""
        eps = max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)), default=0.0)
        return norm(subtract(params, self.project(params))) <= max(1e-6, 4 * eps) * jnp.maximum(
            norm(params), 1
        )


def norm(tree: Any) -> Float[Array, ""]:
    """||tree||, in float32 at least, without overflow or underflow of the squares.

    Args:
      tree: Arrays.

    Returns:
      The Euclidean norm of all entries.

    Example:
      >>> import jax.numpy as jnp
      >>> print(norm({"w": jnp.array([3e30, 4e30])}))
      5e+30
    """
    dtype = _wide(tree)
    leaves = [x.astype(dtype) for x in jax.tree.leaves(tree)]
    largest = functools.reduce(
        jnp.maximum, (jnp.max(jnp.abs(x), initial=0) for x in leaves), jnp.zeros((), dtype)
    )
    largest = jax.lax.stop_gradient(largest)  # the norm is the same for any scale
    usable = (largest > 0) & jnp.isfinite(largest)
    scale = jnp.where(usable, largest, 1)
    square = sum((jnp.sum((x / scale) ** 2) for x in leaves), jnp.zeros((), dtype))
    # The root has no slope at 0.
    return jnp.where(usable, largest * jnp.sqrt(jnp.where(usable, square, 1)), largest)


def unbounded() -> Domain:
    """All of R^d; the projection changes nothing.

    Example:
      >>> unbounded().diameter
      inf
    """
    return Domain("unbounded", lambda x: x, math.inf)


def ball(radius: float, *, center: Any = None) -> Domain:
    """{x: ||x - c|| <= r}.

    Args:
      radius: r.
      center: c, a pytree like the parameters; the origin by default.

    Returns:
      The set, of diameter 2r.

    Raises:
      ValueError: `radius` is not positive; at the call: `center` does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(ball(5.0).project(jnp.array([3.0, 4.0])))
      [3. 4.]
    """
    check_real("radius", radius, above=0)

    def project(x: Any) -> Any:
        if center is not None:
            _check_like("center", center, x)
        away = jax.tree.map(_widen, x)
        start = jax.tree.map(jnp.zeros_like, away)
        if center is not None:
            start = jax.tree.map(lambda c, d: jnp.asarray(c).astype(d.dtype), center, away)
            away = jax.tree.map(jnp.subtract, away, start)
        distance = norm(away)
        outside = distance > radius  # a point inside stays as it is, to the last bit
        factor = radius / jnp.where(outside, distance, 1)

        def leaf(a: Array, c: Array, d: Array) -> Array:
            return jnp.where(outside, (c + factor.astype(d.dtype) * d).astype(a.dtype), a)

        return jax.tree.map(leaf, x, start, away)

    return Domain(f"ball of radius {radius:g}", project, 2 * float(radius))


def box(low: Any, high: Any) -> Domain:
    """{x: low <= x <= high}, entry by entry.

    Args:
      low: Pytree like the parameters.
      high: Likewise, nowhere below `low`.

    Returns:
      The set, of diameter ||high - low||.

    Raises:
      ValueError: `low` exceeds `high`, or they differ in shape; at the call: they do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> domain = box(-1.0, 1.0)
      >>> print(domain.project(jnp.array(2.5)), domain.diameter)
      1.0 2.0
    """
    _check_like("low", low, high)
    widths = jax.tree.map(lambda h, l: np.asarray(h, float) - np.asarray(l, float), high, low)
    flat = np.concatenate([np.ravel(w) for w in jax.tree.leaves(widths)] or [np.zeros(0)])
    if not (flat >= 0).all():
        raise ValueError(f"low must be at most high everywhere; got high - low = {widths}.")

    def project(x: Any) -> Any:
        _check_like("low", low, x)
        cast = lambda bound, a: jnp.asarray(bound).astype(a.dtype)
        return jax.tree.map(lambda a, l, h: jnp.clip(a, cast(l, a), cast(h, a)), x, low, high)

    return Domain("box", project, float(np.linalg.norm(flat)))


def simplex(total: float = 1.0) -> Domain:
    """{x: x >= 0, Σx = s}; O(d log d).

    Args:
      total: s.

    Returns:
      The set, of diameter s √2.

    Raises:
      ValueError: `total` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> x = simplex().project(jnp.array([0.5, 0.3, -0.2, 1.4]))
      >>> print(jnp.round(x, 6))
      [0.05 0.   0.   0.95]
    """
    check_real("total", total, above=0)
    project = lambda x: _unravel(_onto_simplex(_ravel(x), total), x)
    return Domain(f"simplex of sum {total:g}", project, math.sqrt(2) * float(total))


def l1_ball(radius: float) -> Domain:
    """{x: Σ|x| <= r}; O(d log d).

    Args:
      radius: r.

    Returns:
      The set, of diameter 2r.

    Raises:
      ValueError: `radius` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> print(l1_ball(2.0).project(jnp.array([3.0, -1.0, 0.5])))
      [ 2. -0.  0.]
    """
    check_real("radius", radius, above=0)

    def project(tree: Any) -> Any:
        x = _ravel(tree)
        size = jnp.abs(x)
        inside = jnp.sum(size) <= radius
        moved = _unravel(jnp.sign(x) * _onto_simplex(size, radius), tree)
        return jax.tree.map(lambda a, b: jnp.where(inside, a, b), tree, moved)

    return Domain(f"l1 ball of radius {radius:g}", project, 2 * float(radius))


def half_space(normal: Any, offset: ArrayLike) -> Domain:
    """{x: a·x <= b}.

    Args:
      normal: a, a pytree like the parameters, not zero.
      offset: b.

    Returns:
      The set, unbounded.

    Raises:
      ValueError: a is zero; at the call: a does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(half_space(jnp.array([1.0, 1.0]), 0.0).project(jnp.array([2.0, 0.0])))
      [ 1. -1.]
    """
    if not any(np.any(np.asarray(x, float)) for x in jax.tree.leaves(normal)):
        raise ValueError("normal must not be zero; got zeros.")

    def project(x: Any) -> Any:
        _check_like("normal", normal, x)
        flat = _ravel(x)
        a = _ravel(jax.tree.map(jnp.asarray, normal)).astype(flat.dtype)
        excess = (jnp.vdot(a, flat) - jnp.asarray(offset).astype(a.dtype)) / jnp.vdot(a, a)
        return _unravel(flat - jnp.maximum(excess, 0) * a, x)

    return Domain("half-space", project, math.inf)


def affine(matrix: Any, offset: Any) -> Domain:
    """{x: A x = b}, with x the parameters as one vector.

    Args:
      matrix: A, of shape [constraints, size]; of any rank. Not traced: its pseudo-inverse is
        computed once, in float64.
      offset: b, in the range of A.

    Returns:
      The set, unbounded.

    Raises:
      ValueError: Shapes differ, or no point satisfies A x = b; at the call: A does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(affine([[1.0, 1.0]], [1.0]).project(jnp.array([2.0, 0.0])))
      [ 1.5 -0.5]
    """
    A, b = np.asarray(matrix, np.float64), np.asarray(offset, np.float64)
    if A.ndim != 2 or b.shape != A.shape[:1]:
        raise ValueError(f"offset must have one entry a row of matrix {A.shape}; got {b.shape}.")
    inverse = np.linalg.pinv(A)
    if not np.allclose(A @ (inverse @ b), b):
        raise ValueError("offset must be in the range of matrix: no x has A x = b.")
    onto, shift = np.eye(A.shape[1]) - inverse @ A, inverse @ b

    def project(x: Any) -> Any:
        flat = _ravel(x)
        if flat.size != A.shape[1]:
            raise ValueError(f"matrix must have {flat.size} columns, as parameters; got {A.shape}.")
        matrix, vector = jnp.asarray(onto, flat.dtype), jnp.asarray(shift, flat.dtype)
        return _unravel(jnp.dot(matrix, flat, precision="highest") + vector, x)

    return Domain("affine", project, math.inf)


def intersection(*domains: Domain, iterations: int = 100) -> Domain:
    """The points that are in all of some sets, by Dykstra's alternating projections.

    The projection is approximate, so that no certificate is given on it.

    Args:
      domains: Two or more; their intersection must not be empty (it is not checked).
      iterations: Rounds of projections.

    Returns:
      The set; `exact` is False.

    Raises:
      ValueError: Fewer than two sets, or `iterations` below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> domain = intersection(ball(1.0), half_space(jnp.array([1.0, 0.0]), 0.5))
      >>> print(jnp.round(domain.project(jnp.array([2.0, 0.0])), 4))
      [0.5 0. ]

    Source: Boyle, Dykstra 1986.
    """
    check_int("iterations", iterations, least=1)
    if len(domains) < 2:
        raise ValueError(f"domains must be at least two; got {len(domains)}.")
    add = lambda a, b: jax.tree.map(jnp.add, a, b)

    def project(x: Any) -> Any:
        def rounds(_: Any, carry: Any) -> Any:
            point, corrections = carry
            kept = []
            for domain, correction in zip(domains, corrections, strict=True):
                moved = add(point, correction)
                point = domain.project(moved)
                kept.append(subtract(moved, point))
            return point, kept

        start = jax.tree.map(_widen, x)
        corrections = [jax.tree.map(jnp.zeros_like, start) for _ in domains]
        point, _ = jax.lax.fori_loop(0, iterations, rounds, (start, corrections))
        return jax.tree.map(lambda a, b: b.astype(a.dtype), x, point)

    name = "intersection of " + ", ".join(domain.name for domain in domains)
    return Domain(name, project, min(domain.diameter for domain in domains), exact=False)


def projected(
    inner: optax.GradientTransformation, projection: Domain | Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose steps end in a convex set: θ ← Π(θ + u).

    With `optax.sgd` inside this is projected SGD, to which the bounds of `jaxkit.theory.sgd` apply.

    Args:
      inner: Any optimizer, learning rate included: its update u is projected as a whole.
      projection: A `Domain`, or a function from parameters to parameters.

    Returns:
      An optax transformation with the state of `inner`.

    Raises:
      ValueError: At the call: `params` missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = projected(optax.sgd(1.0), ball(1.0))
      >>> params = jnp.zeros(2)
      >>> updates, _ = optimizer.update(jnp.array([-3.0, -4.0]), optimizer.init(params), params)
      >>> print(params + updates)
      [0.6 0.8]

    Source: Zinkevich 2003 (ICML); post 9902.
    """
    inner = optax.with_extra_args_support(inner)
    project = projection.project if isinstance(projection, Domain) else projection

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        if params is None:
            raise ValueError("params must be given to a projected optimizer; got None.")
        updates, state = inner.update(updates, state, params, **extra_args)
        aim = project(jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates))
        return jax.tree.map(jnp.subtract, aim, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def subtract(a: Any, b: Any) -> Any:
    """The tree a - b, in float32 at least."""

    def leaf(x: Any, y: Any) -> Array:
        x = _widen(x)
        return x - jnp.asarray(y).astype(x.dtype)

    return jax.tree.map(leaf, a, b)


def _onto_simplex(x: Array, total: float) -> Array:
    """max(x - τ, 0), with τ = max_k (sum of the k largest entries - total) / k."""
    x = x - jnp.max(x, initial=-jnp.inf)  # a common shift changes nothing; near 0 nothing cancels
    ordered = jnp.sort(x, descending=True)
    counts = jnp.arange(1, x.size + 1).astype(x.dtype)
    taus = (jnp.cumsum(ordered) - total) / counts
    return jnp.maximum(x - jnp.max(taus, initial=-jnp.inf), 0)


def _widen(x: Any) -> Array:
    x = jnp.asarray(x)
    return x.astype(wide(x.dtype))


def _wide(tree: Any) -> Any:
    """float64 if any leaf is, else float32."""
    return wide(*(x.dtype for x in jax.tree.leaves(tree)))


def _ravel(tree: Any) -> Array:
    """All entries as one vector, in float32 at least."""
    dtype = _wide(tree)
    leaves = [x.astype(dtype).reshape(-1) for x in jax.tree.leaves(tree)]
    return jnp.concatenate([jnp.zeros(0, dtype), *leaves])


def _unravel(vector: Array, like: Any) -> Any:
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves])
    parts = [
        vector[end - x.size : end].reshape(x.shape).astype(x.dtype)
        for x, end in zip(leaves, ends, strict=True)
    ]
    return jax.tree.unflatten(treedef, parts)


def _check_like(name: str, tree: Any, params: Any) -> None:
    """Raise unless `tree` has the structure and the shapes of `params`."""
    got: Any = [jax.tree.structure(tree), *map(jnp.shape, jax.tree.leaves(tree))]
    takes: Any = [jax.tree.structure(params), *map(jnp.shape, jax.tree.leaves(params))]
    if got != takes:
        raise ValueError(f"{name} must have the structure and shapes {takes}; got {got}.")
