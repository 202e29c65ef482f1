"""The signal that a state stands for, at any points, in O(N) per point."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_real, is_traced
from jaxkit._typing import Array, ArrayLike, Float
from jaxkit.ssm.discretize import work_dtype
from jaxkit.ssm.hippo.measures import SCALED_MEASURES, basis_scale, check_measure

__all__ = ["fourier_series", "laguerre_series", "legendre_series", "reconstruct"]


def _operands(x: Any, points: Any, *, name: str) -> tuple[Array, Array, tuple[int, ...], Any]:
    """`x` as `[N, b, 1]`, points as `[1, p]`, the shape of the result and its dtype."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"x must be an array of floating-point numbers; got dtype {x.dtype}.")
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., N] with N at least 1; got shape {tuple(x.shape)}.")
    if not (is_traced(points) or np.issubdtype(np.asarray(points).dtype, np.number)):
        raise TypeError(f"{name} must be real numbers; got {points!r}.")
    work = work_dtype(x.dtype)
    real = jnp.finfo(work).dtype
    points = jnp.asarray(points).astype(real)
    coefficients = jnp.moveaxis(x.astype(work).reshape(-1, x.shape[-1]), -1, 0)[..., None]
    out = jnp.finfo(x.dtype).dtype
    return coefficients, points.reshape(1, -1), (*x.shape[:-1], *points.shape), out


def _clenshaw(coefficients: Array, first: Any, second: Any) -> Array:
    """`Σ c_n p_n` for `p_{n+1} = first(n) p_n − second(n) p_{n−1}`, p_0 = 1, from the top down."""
    N = coefficients.shape[0]

    def body(carry, inputs):
        b1, b2 = carry
        c, n = inputs
        return (c + first(n) * b1 - second(n + 1) * b2, b1), None

    points = first(jnp.zeros((), coefficients.dtype))
    zero = jnp.zeros((coefficients.shape[1], points.shape[1]), coefficients.dtype)
    n = jnp.arange(N, dtype=coefficients.dtype)
    (total, _), _ = jax.lax.scan(body, (zero, zero), (coefficients, n), reverse=True)
    return total


def legendre_series(x: Float[Array, "*batch state"], s: ArrayLike) -> Array:
    """`Σ_n x_n √(2n+1) P_n(2s−1)` by Clenshaw's recurrence.

    Args:
      x: orthonormal coefficients.
      s: points of any shape, in [0, 1] for the projected stretch.

    Returns:
      Values `[..., *s.shape]`, in the dtype of `x`.

    Raises:
      TypeError: `x` or `s` is not real.
      ValueError: `x` has no coefficients.

    Example:
      >>> import jax.numpy as jnp
      >>> legendre_series(jnp.asarray([1.0, 1.0]), jnp.asarray([0.5, 1.0])).round(3).tolist()
      [1.0, 2.732...]

    Source: Clenshaw 1955; post 10114 on kexue.fm.
    """
    c, points, shape, out = _operands(x, s, name="s")
    y = 2 * points - 1
    c = c * jnp.asarray(np.sqrt(2 * np.arange(c.shape[0]) + 1.0), c.dtype)[:, None, None]
    total = _clenshaw(c, lambda n: (2 * n + 1) / (n + 1) * y, lambda n: n / (n + 1))
    return total.reshape(shape).astype(out)


def laguerre_series(
    x: Float[Array, "*batch state"], age: ArrayLike, *, decay: float = 1.0
) -> Array:
    """`Σ_n x_n e^{−(1−β)τ/2} L_n(τ)` by Clenshaw's recurrence.

    Args:
      x: coefficients of `lagt`.
      age: τ ≥ 0, time back from now in units of the window.
      decay: β ∈ [0, 1] of the measure.

    Returns:
      Values `[..., *age.shape]`, in the dtype of `x`.

    Raises:
      TypeError: `x` or `age` is not real.
      ValueError: `x` has no coefficients, or `decay` is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> laguerre_series(jnp.asarray([1.0, 1.0]), jnp.asarray([0.0, 2.0])).round(3).tolist()
      [2.0, 0.0]

    Source: Gu et al. 2020 (arXiv 2008.07669), section 2.3; post 10114 on kexue.fm.
    """
    check_real("decay", decay, least=0.0, most=1.0)
    c, tau, shape, out = _operands(x, age, name="age")
    total = _clenshaw(c, lambda n: (2 * n + 1 - tau) / (n + 1), lambda n: n / (n + 1))
    factor = 0.5 * (1 - jnp.asarray(decay, tau.dtype))
    return (total * jnp.exp(-factor * tau)).reshape(shape).astype(out)


def fourier_series(x: Array, s: ArrayLike) -> Array:
    """`x_0 + √2 Σ_j (x_{2j−1} cos 2πjs + x_{2j} sin 2πjs)`, or `Re Σ_n x_n e^{2πins}` if complex.

    Horner's rule in `e^{2πis}`: Clenshaw's recurrence for cosines and sines loses K² units of
    roundoff near s = 0 and 1, a rotation only K.

    Args:
      x: real coefficients `[..., 2K+1]`, or complex ones in the order n = −K..K.
      s: points of any shape.

    Returns:
      Real values `[..., *s.shape]`, in the real dtype of `x`.

    Raises:
      TypeError: `x` is not of floating-point numbers, or `s` not of real ones.
      ValueError: an even number of coefficients.

    Example:
      >>> import jax.numpy as jnp
      >>> fourier_series(jnp.asarray([1.0, 0.0, 1.0]), jnp.asarray([0.0, 0.25])).round(3).tolist()
      [1.0, 2.414...]

    Source: Gu et al. 2022 (arXiv 2206.12037), section 3; post 10114 on kexue.fm.
    """
    c, points, shape, out = _operands(x, s, name="s")
    N = c.shape[0]
    if N % 2 == 0:
        raise ValueError(f"x must have an odd number 2K + 1 of Fourier coefficients; got {N}.")
    K = (N - 1) // 2
    if jnp.issubdtype(c.dtype, jnp.complexfloating):
        # Re Σ_n x_n e^{inθ} folds onto n ≥ 0: cosines with Re(x_n + x_{−n}), sines with
        # Im(x_{−n} − x_n).
        positive, negative = c[K + 1 :], c[:K][::-1]
        mean, cosines = c[K].real, (positive + negative).real
        sines = (negative - positive).imag
    else:
        root = jnp.asarray(np.sqrt(2.0), c.dtype)
        mean, cosines, sines = c[0], root * c[1::2], root * c[2::2]
    # Turning s into [−½, ½] first keeps the angle's rounding error from growing with s.
    theta = 2 * np.pi * (points - jnp.round(points))
    cos, sin = jnp.cos(theta), jnp.sin(theta)

    # Re Σ_j (c_j − i d_j) e^{ijθ}: real and imaginary part of Horner's partial sums.
    def body(carry, inputs):
        re, im = carry
        c_j, d_j = inputs
        re, im = re + c_j, im - d_j
        return (re * cos - im * sin, re * sin + im * cos), None

    zero = jnp.zeros((c.shape[1], points.shape[1]), points.dtype)
    (total, _), _ = jax.lax.scan(body, (zero, zero), (cosines, sines), reverse=True)
    return (mean + total).reshape(shape).astype(out)


def reconstruct(
    x: Array,
    s: ArrayLike | None = None,
    *,
    measure: str = "legs",
    times: ArrayLike | None = None,
    now: ArrayLike | None = None,
    window: float = 1.0,
    decay: float = 1.0,
    norm: Any = "unit",
) -> Array:
    """The signal `u(t(s)) ≈ Σ x_n φ_n(s)` that a state holds.

    s = 1 is the newest point for every measure: s = t/now for the measures of the whole past
    (`legs`, `fous`), s = 1 − (now − t)/window for the others. s = 0 is the oldest point held, but
    for `lagt`, whose past reaches to s = −∞.

    Args:
      x: states `[..., N]`, real or complex.
      s: points of any shape; or give `times` and `now` instead.
      measure: measure that made the states.
      times: points in units of time, of any shape.
      now: time of the states, a scalar above 0.
      window: window of the measure, in units of time.
      decay: β of `lagt`.
      norm: normalization of the states, as in `transition`.

    Returns:
      Real values `[..., *s.shape]`.

    Raises:
      TypeError: an argument is not numeric.
      ValueError: unknown `measure` or `norm`; an even number of Fourier states; neither or both of
        `s` and `times`; `times` without `now`; `window ≤ 0`, `now ≤ 0`, `decay` outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.asarray([1.0, 0.5])
      >>> reconstruct(x, jnp.asarray([0.0, 0.5, 1.0])).round(3).tolist()
      [0.134..., 1.0, 1.866...]

    Source: Gu et al. 2020 (arXiv 2008.07669), section 2; post 10114 on kexue.fm.
    """
    x = jnp.asarray(x)
    if x.ndim < 1:
        raise ValueError(f"x must be [..., N]; got shape {tuple(x.shape)}.")
    N = check_measure(measure, x.shape[-1])
    scale = basis_scale(measure, N, norm)
    check_real("window", window, above=0.0)
    if (s is None) == (times is None):
        raise ValueError(f"s or times must be given, and not both; got s={s!r}, times={times!r}.")
    if (times is None) != (now is None):
        raise ValueError(f"times and now must be given together; got times={times!r}, now={now!r}.")
    if times is not None and now is not None:
        check_real("now", now, above=0.0)
        if is_traced(times) or is_traced(now):
            real = jnp.finfo(work_dtype(jnp.finfo(x.dtype).dtype)).dtype
            t: Any = jnp.asarray(times).astype(real)
            end: Any = jnp.asarray(now).astype(real)
        else:
            t, end = np.asarray(times, np.float64), float(np.asarray(now))
        s = t / end if measure in SCALED_MEASURES else 1 - (end - t) / window
    if not isinstance(s, jax.Array):
        s = np.asarray(s)
    if measure == "lmu":
        # x_n = (−1)^n √(2n+1) × (unit legt state).
        n = np.arange(N)
        scale = scale * (1.0 - 2.0 * (n % 2)) / np.sqrt(2 * n + 1.0)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        work = work_dtype(x.dtype)
        factor = jnp.expand_dims(jnp.asarray(scale).astype(work), range(x.ndim - 1))
        rescaled = (x.astype(work) * factor).astype(x.dtype)
    else:
        rescaled = x
    if measure in ("legs", "legt", "lmu"):
        return legendre_series(rescaled, s)
    if measure == "lagt":
        return laguerre_series(rescaled, 1 - s, decay=decay)
    return fourier_series(rescaled, s)
