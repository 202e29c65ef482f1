"""LegS: the whole past on a uniform measure, in O(N) per sample.

`x' = (A x + B u)/t` with `A_nk = −√((2n+1)(2k+1))` below the diagonal and `−(n+1)` on it. Times
enter through ratios alone, so that the sampling step cancels. All functions use orthonormal states
(`norm="unit"`). Source of everything here: Gu, Dao, Ermon, Rudra, Ré 2020 (arXiv 2008.07669) and
posts 10114 and 10137 on kexue.fm; the closed forms follow from integrating the basis.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_choice, check_floating, check_int, check_real, is_traced
from jaxkit._typing import Array, ArrayLike, Float
from jaxkit.ssm.discretize import work_dtype
from jaxkit.ssm.hippo._common import HIGHEST, check_increasing, signal

__all__ = [
    "INPUT_WEIGHTS",
    "LEGS_METHODS",
    "legs_apply",
    "legs_coefficients",
    "legs_propagate",
    "legs_scan",
    "legs_solve",
    "legs_step",
    "legs_transition",
]

LEGS_METHODS = ("bilinear", "exact", "gbt", "gbt_t", "repo", "forward", "backward")
INPUT_WEIGHTS = ("trapezoid", "log", "paper")
_FORMS = ("sequential", "associative")


def _radii(N: int, dtype: Any) -> Array:
    return jnp.asarray(np.sqrt(2 * np.arange(N) + 1.0), dtype)


def _lead(x: Array, like: Array) -> Array:
    """`x`, of the last axes of `like`, with leading axes added."""
    return jnp.expand_dims(x, range(like.ndim - x.ndim))


def _state(name: str, x: Any) -> Array:
    x = jnp.asarray(x)
    check_floating(name, x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"{name} must be [..., N] with N at least 1; got shape {tuple(x.shape)}.")
    return x


def _apply(x: Array) -> Array:
    r = _lead(_radii(x.shape[-1], x.dtype), x)
    n = _lead(jnp.arange(x.shape[-1], dtype=x.dtype), x)
    return n * x - r * jnp.cumsum(r * x, axis=-1)


def legs_apply(x: Float[Array, "*batch state"]) -> Float[Array, "*batch state"]:
    """`A x` of LegS in O(N): `(Ax)_n = n x_n − r_n Σ_{k≤n} r_k x_k`, `r_n = √(2n+1)`.

    Args:
      x: states.

    Returns:
      The product, with the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not an array of real floating-point numbers.
      ValueError: `x` has no states.

    Example:
      >>> import jax.numpy as jnp
      >>> legs_apply(jnp.asarray([1.0, 0.0, 0.0])).round(3).tolist()
      [-1.0, -1.732..., -2.236...]

    Source: Gu et al. 2020 (arXiv 2008.07669), appendix E; post 10137 on kexue.fm.
    """
    x = _state("x", x)
    return _apply(x.astype(work_dtype(x.dtype))).astype(x.dtype)


def _solve(v: Array, lam: Array, form: str) -> Array:
    """`(I − λA)^{-1} v` for `v` `[..., N]` and `lam` `[...]`."""
    N = v.shape[-1]
    r = _radii(N, v.dtype)
    n = jnp.arange(N, dtype=v.dtype)
    if form == "sequential":

        def body(total, inputs):
            v_n, r_n, n_n = inputs
            z = (v_n - lam * (r_n * total)) / (1 + lam * (n_n + 1))
            return total + r_n * z, z

        _, z = jax.lax.scan(body, jnp.zeros_like(v[..., 0]), (jnp.moveaxis(v, -1, 0), r, n))
        return jnp.moveaxis(z, 0, -1)
    lam = lam[..., None]
    r, n = _lead(r, v), _lead(n, v)
    scale = 1 / (1 + lam * (n + 1))

    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    _, totals = jax.lax.associative_scan(
        combine, ((1 - lam * n) * scale, r * v * scale), axis=v.ndim - 1
    )
    before = jnp.concatenate([jnp.zeros_like(totals[..., :1]), totals[..., :-1]], axis=-1)
    return (v - lam * r * before) * scale


def legs_solve(
    v: Float[Array, "*batch state"], lam: ArrayLike, *, form: str = "sequential"
) -> Float[Array, "*batch state"]:
    """`(I − λA)^{-1} v` of LegS in O(N), λ ≥ 0.

    `z_n = (v_n − λ r_n S_{n−1})/(1+λ(n+1))` with `S_n = S_{n−1} + r_n z_n`, in which nothing
    cancels. `S` alone follows `S_n = ((1−λn) S_{n−1} + r_n v_n)/(1+λ(n+1))`: the associative form
    scans that in O(log N) depth.

    Args:
      v: right-hand sides.
      lam: λ ≥ 0, a scalar or one for each right-hand side.
      form: `sequential` or `associative`.

    Returns:
      The solution, with the shape and dtype of `v`.

    Raises:
      TypeError: `v` is not an array of real floating-point numbers.
      ValueError: unknown `form`, a negative `lam`, or one of another shape than `v.shape[:-1]`.

    Example:
      >>> import jax.numpy as jnp
      >>> legs_solve(jnp.asarray([2.0, 0.0]), 1.0).round(4).tolist()
      [1.0, -0.577...]

    Source: post 10137 on kexue.fm (which recurs on S and differences it).
    """
    check_choice("form", form, _FORMS)
    v = _state("v", v)
    if not is_traced(lam) and not np.all(np.asarray(lam) >= 0):
        raise ValueError(f"lam must be at least 0; got {lam}.")
    work = work_dtype(v.dtype)
    factor = jnp.asarray(lam, work)
    if factor.ndim and factor.shape != v.shape[:-1]:
        raise ValueError(
            f"lam must be a scalar or {tuple(v.shape[:-1])}, as the right-hand sides; "
            f"got shape {tuple(factor.shape)}."
        )
    factor = jnp.broadcast_to(factor, v.shape[:-1])
    return _solve(v.astype(work), factor, form).astype(v.dtype)


# --- closed forms ---------------------------------------------------------------------------


def _nodes(N: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N Gauss-Legendre nodes and weights on [0, 1], and φ at the nodes `[nodes, N]`."""
    y, w = np.polynomial.legendre.leggauss(N)
    basis = np.polynomial.legendre.legvander(y, N - 1) * np.sqrt(2 * np.arange(N) + 1.0)
    return (y + 1) / 2, w / 2, basis


def _legendre_rows(y: Array, N: int, visit: Any) -> Array:
    """Stack `visit(P_n(y), (P_{n+1} − P_{n−1})(y))`, n = 0..N−1, without keeping the P_n."""

    def body(carry, n):
        previous, current = carry
        following = ((2 * n + 1) * y * current - n * previous) / (n + 1)
        return (current, following), visit(current, following - previous)

    one = jnp.ones_like(y)
    # P_{−1} is multiplied by n = 0 in the recurrence; as 0·y − 1 it gives Q_0 = s up to the
    # constant that differences drop, since (P_1 − P_{−1})/2 = (y + 1)/2.
    first = (-one, one)
    return jax.lax.scan(body, first, jnp.arange(N, dtype=y.dtype))[1]


def _increments(fractions: Array, u: Array, N: int) -> Array:
    """`r_n Σ_j u_j [Q_n(f_{j+1}) − Q_n(f_j)]`: f `[m, j+1]`, u `[b, j]` -> `[b, m, N]`."""
    scale = jnp.asarray(0.5 / np.sqrt(2 * np.arange(N) + 1.0), u.dtype)

    def visit(_, q):
        return jnp.matmul(u, jnp.diff(q, axis=-1).T, precision=HIGHEST)

    rows = _legendre_rows(2 * fractions - 1, N, visit)
    return jnp.moveaxis(rows, 0, -1) * _lead(scale, rows)


def _propagate(x: Array, inverse: Array) -> Array:
    """`e^{A ln ρ_m} x` for `x` `[b, N]` and 1/ρ `[m]` in (0, 1] -> `[b, m, N]`."""
    N = x.shape[-1]
    y, w, basis = _nodes(N)
    values = jnp.matmul(x, jnp.asarray(basis.T, x.dtype), precision=HIGHEST)
    weighted = values * jnp.asarray(w, x.dtype)[None]
    points = 2 * inverse[:, None] * jnp.asarray(y, x.dtype)[None] - 1

    def visit(p, _):
        return jnp.matmul(weighted, p.T, precision=HIGHEST)

    rows = jnp.moveaxis(_legendre_rows(points, N, visit), 0, -1)
    return rows * _lead(_radii(N, x.dtype), rows) * inverse[None, :, None]


def legs_transition(N: int, ratio: float) -> np.ndarray:
    """`e^{A ln ρ}` of LegS on the host: what a gap from t to ρt makes of a state, without input.

    `(e^{A ln ρ})_nk = ∫_0^{1/ρ} φ_n(s) φ_k(ρs) ds`, to which N Gauss-Legendre nodes are exact. The
    matrix is lower triangular with diagonal ρ^{−(n+1)}: memory decays polynomially in t.

    Args:
      N: number of states.
      ratio: ρ = t_new/t_old ≥ 1.

    Returns:
      Float64 `[N, N]`.

    Raises:
      TypeError: `N` is not an integer or `ratio` not a real number.
      ValueError: `N < 1` or `ratio < 1`.

    Example:
      >>> legs_transition(2, 2.0).round(4).tolist()
      [[0.5, 0.0], [-0.433, 0.25]]

    Source: the definition of the projection; compare Gu et al. 2020 (arXiv 2008.07669), prop. 3.
    """
    N = check_int("N", N, least=1)
    ratio = float(check_real("ratio", ratio, least=1.0))
    y, w, basis = _nodes(N)
    r = np.sqrt(2 * np.arange(N) + 1.0)
    moved = np.polynomial.legendre.legvander(2 * y / ratio - 1, N - 1) * r
    return np.tril((moved * (w / ratio)[:, None]).T @ basis)


def legs_propagate(
    x: Float[Array, "*batch state"], ratio: ArrayLike
) -> Float[Array, "*batch state"]:
    """`e^{A ln ρ} x` of LegS: a state after a gap from t to ρt with zero input, in O(N²).

    The signal of `x` is evaluated at N Gauss-Legendre nodes and projected anew on the longer past;
    no matrix exponential, no eigenvalues. Holding the input at `u` over the gap is
    `legs_propagate(x − u e_0, ρ) + u e_0`, since constants are a fixed point.

    Args:
      x: states.
      ratio: ρ = t_new/t_old ≥ 1, a scalar.

    Returns:
      States, with the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not an array of real floating-point numbers.
      ValueError: `ratio < 1`, or not a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(v, 3) for v in legs_propagate(jnp.asarray([1.0, 0.0]), 2.0).tolist()]
      [0.5, -0.433]

    Source: see `legs_transition`.
    """
    x = _state("x", x)
    if jnp.ndim(ratio) != 0:
        raise ValueError(f"ratio must be a scalar; got shape {tuple(jnp.shape(ratio))}.")
    check_real("ratio", ratio, least=1.0)
    work = work_dtype(x.dtype)
    flat = x.astype(work).reshape(-1, x.shape[-1])
    inverse = 1 / jnp.asarray(ratio, work)[None]
    return _propagate(flat, inverse).reshape(x.shape).astype(x.dtype)


def legs_coefficients(
    u: Float[Array, "*batch length"], N: int, *, times: ArrayLike | None = None
) -> Float[Array, "*batch state"]:
    """Exact LegS coefficients of a held signal at its end, without a recurrence, in O(TN).

    `x_n = r_n Σ_j u_j [Q_n(t_{j+1}/t_T) − Q_n(t_j/t_T)]`, where `Q_n(s) = (P_{n+1} −
    P_{n−1})(2s−1)/(2(2n+1))` integrates `P_n(2s−1)` and `Q_0 = s`.

    Args:
      u: samples; `u[j]` holds from `times[j-1]` (0 for the first) to `times[j]`.
      N: number of states.
      times: ends of the intervals `[length]`, increasing from above 0; default 1, 2, ..., length.

    Returns:
      Coefficients, in the dtype of `u`. `x_0` is the mean of the signal.

    Raises:
      TypeError: `u` or `times` is not real, or `N` not an integer.
      ValueError: `N < 1`, or times that do not increase from above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> legs_coefficients(jnp.asarray([1.0, 2.0, 4.0]), 3).round(4).tolist()
      [2.333..., 1.154..., 0.165...]

    Source: integral of the Legendre polynomials; Gu et al. 2020 (arXiv 2008.07669), section 3.
    """
    u = signal(u)
    N = check_int("N", N, least=1)
    T = u.shape[-1]
    work = work_dtype(u.dtype)
    ends = _ends(times, T, 0.0)
    fractions = jnp.asarray(_from(ends, 0.0) / ends[-1], work)
    flat = u.astype(work).reshape(-1, T)
    x = _increments(fractions[None], flat, N)[:, 0]
    return x.reshape(*u.shape[:-1], N).astype(u.dtype)


# --- steps ----------------------------------------------------------------------------------


def _ends(times: Any, length: int, start: Any) -> Any:
    if times is None:
        return start + np.arange(1.0, length + 1)
    return check_increasing("times", times, length, above=start, meaning="time")


def _from(ends: Any, start: Any) -> Any:
    """`[start, *ends]`, on the host where all of it is known."""
    if is_traced(ends) or is_traced(start):
        ends = jnp.asarray(ends)
        return jnp.concatenate([jnp.asarray(start, ends.dtype)[None], ends])
    return np.concatenate([[float(start)], ends])


def _weights(method: str, t: Any, t_next: Any, alpha: Any, weight: str, xp: Any) -> Any:
    """`(μ, λ, ω)` of the step `(I − λA) x⁺ = (I + μA) x + ωBu`."""
    gap = t_next - t
    if method in ("bilinear", "gbt"):
        delta = xp.log1p(gap / t)
        if method == "bilinear":
            return 0.5 * delta, 0.5 * delta, delta
        return (1 - alpha) * delta, alpha * delta, delta
    if method == "repo":
        return (1 - alpha) * gap / t_next, alpha * gap / t_next, gap / t_next
    if method == "forward":
        return gap / t, 0 * gap, gap / t
    if method == "backward":
        return 0 * gap, gap / t_next, gap / t_next
    mu, lam = (1 - alpha) * gap / t, alpha * gap / t_next
    if weight == "paper":
        return mu, lam, gap / t
    return mu, lam, mu + lam if weight == "trapezoid" else xp.log1p(gap / t)


def _check_method(method: str, N: int, alpha: Any, weight: str, unsafe: bool) -> None:
    check_choice("method", method, LEGS_METHODS)
    check_choice("weight", weight, INPUT_WEIGHTS)
    check_real("alpha", alpha, least=0.0, most=1.0)
    explicit = method == "forward" or (
        method in ("gbt", "gbt_t", "repo") and not is_traced(alpha) and float(alpha) < 0.5
    )
    if explicit and N > 16 and not unsafe:
        # An implicit weight below ½ fails as forward Euler does, only later: on sin 6s at N = 64,
        # max |x| is 1e5 at α = 0.4 and 1e17 at α = 0.25 (measured, `gbt_t`).
        got = "method='forward'" if method == "forward" else f"method={method!r} with alpha={alpha}"
        raise ValueError(
            f"{got} weighs the explicit side more, which LegS cannot take at N > 16 (the first "
            "steps of forward Euler multiply by (k−n−1)/k: 2e18 at N = 32, beyond float32 at 64); "
            f"got N = {N}. Take method='bilinear' or alpha of at least ½, or pass unsafe=True."
        )


def _advance(x: Array, u: Array, weights: Any, form: str) -> Array:
    """One step of `x` `[b, N]` under `u` `[b]`."""
    mu, lam, omega = weights
    v = x + mu * _apply(x) + (omega * u)[:, None] * _radii(x.shape[-1], x.dtype)[None]
    return _solve(v, jnp.broadcast_to(lam, u.shape), form)


def _exact(x: Array, u: Array, inverse: Array) -> Array:
    shift = jnp.zeros_like(x).at[:, 0].set(u)
    return _propagate(x - shift, inverse[None])[:, 0] + shift


def legs_step(
    x: Float[Array, "*batch state"],
    u: Float[Array, "*batch"],
    t: ArrayLike,
    t_next: ArrayLike,
    *,
    method: str = "bilinear",
    alpha: float | Array = 0.5,
    weight: str = "trapezoid",
    form: str = "sequential",
    unsafe: bool = False,
) -> Float[Array, "*batch state"]:
    """One LegS update for an input held on [t, t_next): O(N), or O(N²) with `method="exact"`.

    From t = 0 the equation is singular and its exact result is `u e_0`, whatever the method (but
    `repo`, which starts at zero). Both times may be traced.

    Args:
      x: states at `t`.
      u: inputs over the step.
      t: time already covered, at least 0.
      t_next: end of the step, above `t`.
      method: see `legs_scan`.
      alpha: implicit weight of `gbt`, `gbt_t` and `repo`, in [0, 1].
      weight: input weight of `gbt_t`: `trapezoid`, `log` or `paper`.
      form: how the solve runs over n: `sequential` or `associative`.
      unsafe: allow forward Euler, and `alpha` below ½, above N = 16.

    Returns:
      States at `t_next`, in the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not an array of real floating-point numbers.
      ValueError: unknown names, `t < 0`, `t_next ≤ t`, `alpha` outside [0, 1], inputs that do not
        fit the states, or forward Euler or `alpha` below ½ at N > 16.

    Example:
      >>> import jax.numpy as jnp
      >>> x = legs_step(jnp.zeros(3), jnp.asarray(1.0), 0.0, 1.0)
      >>> legs_step(x, jnp.asarray(1.0), 1.0, 2.0).round(4).tolist()
      [1.0, 0.0, 0.0]

    Source: Gu et al. 2020 (arXiv 2008.07669); post 10137 on kexue.fm.
    """
    x = _state("x", x)
    N = x.shape[-1]
    check_choice("form", form, _FORMS)
    _check_method(method, N, alpha, weight, unsafe)
    u = jnp.asarray(u)
    if u.shape != x.shape[:-1]:
        raise ValueError(
            f"u must be {tuple(x.shape[:-1])}, one for each state; got shape {tuple(u.shape)}."
        )
    check_real("t", t, least=0.0)
    check_real("t_next", t_next, above=None if is_traced(t) else float(np.asarray(t)))
    work = work_dtype(x.dtype)
    flat, inputs = x.astype(work).reshape(-1, N), u.astype(work).reshape(-1)
    t, t_next = jnp.asarray(t, work), jnp.asarray(t_next, work)
    # Where t = 0 the weights are not read; ½ keeps their gradients finite.
    first = t <= 0
    before = jnp.where(first, 0.5 * t_next, t)
    if method == "repo":
        before, first = t, jnp.zeros_like(first)
    if method == "exact":
        new = _exact(flat, inputs, before / t_next)
    else:
        weights = _weights(method, before, t_next, jnp.asarray(alpha, work), weight, jnp)
        new = _advance(flat, inputs, weights, form)
    start = jnp.zeros_like(flat).at[:, 0].set(inputs)
    return jnp.where(first, start, new).reshape(x.shape).astype(x.dtype)


# --- whole sequences ------------------------------------------------------------------------


def _scan_steps(x: Array, u: Array, weights: Any, form: str, last_only: bool) -> Array:
    """Run the steps one after the other; `u` `[b, m]`, weights `[m]` -> `[b, m, N]` or `[b, N]`."""

    def body(state, inputs):
        u_k, *w = inputs
        state = _advance(state, u_k, w, form)
        return state, None if last_only else state

    last, states = jax.lax.scan(body, x, (u.T, *weights))
    return last if last_only else jnp.moveaxis(states, 0, 1)


def _parallel_steps(x: Array, u: Array, weights: Any) -> Array:
    """The same steps with the loop over n outside and associative scans over time inside.

    A is lower triangular: mode n follows a scalar recurrence over time, driven by the input and by
    the sum of the lower modes, which are complete by then.
    """
    N = x.shape[-1]
    mu, lam, omega = (w[None] for w in weights)

    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    def body(total, inputs):
        # `total` is Σ_{m<n} r_m x_m at every time, the start included.
        x_n, r_n, n = inputs
        scale = 1 / (1 + lam * (n + 1))
        decay = jnp.broadcast_to((1 - mu * (n + 1)) * scale, u.shape)
        drive = r_n * (omega * u - mu * total[:, :-1] - lam * total[:, 1:]) * scale
        drive = drive.at[:, 0].add(decay[:, 0] * x_n)
        _, states = jax.lax.associative_scan(combine, (decay, drive), axis=1)
        states = jnp.concatenate([x_n[:, None], states], axis=1)
        return total + r_n * states, states[:, 1:]

    n = jnp.arange(N, dtype=u.dtype)
    total = jnp.zeros((u.shape[0], u.shape[1] + 1), u.dtype)
    _, states = jax.lax.scan(body, total, (x.T, _radii(N, u.dtype), n))
    return jnp.moveaxis(states, 0, -1)


def _exact_chunk(x: Array, u: Array, grid: Array) -> Array:
    """Exact states over one chunk; `grid` `[m+1]` are its times, `grid[0]` the time of `x`."""
    ends = grid[1:]
    # Intervals after the state's own time have both ends at 1 and add nothing.
    fractions = jnp.minimum(grid[None, :] / ends[:, None], 1)
    return _propagate(x, grid[0] / ends) + _increments(fractions, u, x.shape[-1])


def _exact_scan(x: Array, u: Array, grid: Array, chunk: int) -> Array:
    T = u.shape[1]
    head = T % chunk
    pieces = []
    if head:
        pieces.append(_exact_chunk(x, u[:, :head], grid[: head + 1]))
        x = pieces[0][:, -1]
    if head < T:
        starts = head + chunk * jnp.arange((T - head) // chunk)

        def body(state, start):
            states = _exact_chunk(
                state,
                jax.lax.dynamic_slice_in_dim(u, start, chunk, axis=1),
                jax.lax.dynamic_slice_in_dim(grid, start, chunk + 1),
            )
            return states[:, -1], states

        _, states = jax.lax.scan(body, x, starts)
        pieces.append(jnp.moveaxis(states, 0, 1).reshape(u.shape[0], T - head, x.shape[-1]))
    return jnp.concatenate(pieces, axis=1)


def legs_scan(
    u: Float[Array, "*batch length"],
    N: int,
    *,
    method: str = "bilinear",
    times: ArrayLike | None = None,
    state: Float[Array, "*batch state"] | None = None,
    start: ArrayLike | None = None,
    alpha: float | Array = 0.5,
    weight: str = "trapezoid",
    form: str = "sequential",
    chunk: int = 64,
    unsafe: bool = False,
    last_only: bool = False,
) -> Array:
    """LegS states after every sample of a signal, held between its times.

    With `δ_k = ln(t_{k+1}/t_k)`:

    - `bilinear` (default): bilinear in log time, `(I − ½δA)x⁺ = (I + ½δA)x + δBu`. Second order,
      exact on constants.
    - `exact`: zero-order hold, `e^{Aδ}`, by the closed forms in chunks (matrix products only).
    - `gbt`: generalized bilinear in log time.
    - `gbt_t`: `(I − αA/(k+1))^{-1}[(I + (1−α)A/k)x + ωBu]` and ω = `(1−α)/k + α/(k+1)`
      (`trapezoid`, exact on constants), `ln(1+1/k)` (`log`) or `1/k` (`paper`: first order only).
    - `repo`: the first code's, `A/(k+1)` on both sides from a zero start.
    - `forward`, `backward`: Euler; forward is unusable beyond small N and needs `unsafe=True` above
      16.

    The first interval is singular and exact, `x_1 = u_0 e_0`, in every method but `repo`.

    Args:
      u: samples; `u[j]` holds from `times[j-1]` to `times[j]`.
      N: number of states.
      method: one of `LEGS_METHODS`.
      times: ends of the intervals `[length]`, increasing from above `start`; default `start` + 1,
        2, .... Only ratios matter.
      state: states at `start`, to go on from there.
      start: time already covered by `state`, above 0; given together with it.
      alpha: implicit weight of `gbt`, `gbt_t` and `repo`, in [0, 1].
      weight: input weight of `gbt_t`.
      form: `sequential` is a scan over time, O(N) per step; `associative` scans over time in
        O(log T) depth for one mode after the other. `exact` reads `chunk` instead.
      chunk: samples treated at once by `exact`, at least 1. Any value gives the same states.
      unsafe: allow forward Euler, and `alpha` below ½, above N = 16.
      last_only: return the last states alone.

    Returns:
      `[..., length, N]`, or `[..., N]` with `last_only`, in the dtype of `u`.

    Raises:
      TypeError: `u` or `times` is not real, or an integer argument is none.
      ValueError: `N < 1`; unknown names; times that do not increase from above `start` (or 0);
        `state` without `start` or the reverse, or of another shape; `alpha` outside [0, 1]; forward
        Euler at N > 16.

    Example:
      >>> import jax.numpy as jnp
      >>> u = jnp.asarray([1.0, 2.0, 4.0])
      >>> legs_scan(u, 3)[-1].round(4).tolist()
      [2.352..., 1.255..., 0.347...]

    Cost: O(TN) time; O(N) memory beside the output for `sequential` (times T for gradients).
    `exact` takes O(TN(N + chunk)).

    Source: Gu, Dao, Ermon, Rudra, Ré 2020 (arXiv 2008.07669); posts 10114 and 10137 on kexue.fm.
    """
    u = signal(u)
    N = check_int("N", N, least=1)
    chunk = check_int("chunk", chunk, least=1)
    check_choice("form", form, _FORMS)
    _check_method(method, N, alpha, weight, unsafe)
    if (state is None) != (start is None):
        raise ValueError(
            "state and start must be given together (the states, and the time they cover); "
            f"got {'only start' if state is None else 'only state'}."
        )
    work = work_dtype(u.dtype)
    batch, T = u.shape[:-1], u.shape[-1]
    flat = u.astype(work).reshape(-1, T)
    if start is not None:
        check_real("start", start, above=0.0)
        start = start if is_traced(start) else float(np.asarray(start))
        x = _state("state", state)
        if x.shape != (*batch, N):
            raise ValueError(
                f"state must be {(*batch, N)}, as u and N say; got shape {tuple(x.shape)}."
            )
        x = x.astype(work).reshape(-1, N)
    grid = _from(_ends(times, T, 0.0 if start is None else start), 0.0 if start is None else start)

    result: Array | None = None
    if start is None and method == "exact" and last_only:
        return legs_coefficients(u, N, times=times)
    if start is None and method == "repo":
        x = jnp.zeros((flat.shape[0], N), work)
    elif start is None:
        x = jnp.zeros((flat.shape[0], N), work).at[:, 0].set(flat[:, 0])
        result, flat, grid = x[:, None], flat[:, 1:], grid[1:]

    if flat.shape[1]:
        if method == "exact":
            states = _exact_scan(x, flat, jnp.asarray(grid, work), chunk)
            states = states[:, -1] if last_only else states
        else:
            traced = is_traced(grid) or is_traced(alpha)
            xp = jnp if traced else np
            if traced:
                grid, alpha = jnp.asarray(grid, work), jnp.asarray(alpha, work)
            else:
                alpha = float(alpha)
            weights = _weights(method, grid[:-1], grid[1:], alpha, weight, xp)
            weights = [jnp.broadcast_to(jnp.asarray(w, work), flat.shape[1:]) for w in weights]
            if form == "sequential":
                states = _scan_steps(x, flat, weights, "associative", last_only)
            else:
                states = _parallel_steps(x, flat, weights)
                states = states[:, -1] if last_only else states
    else:
        states = x if last_only else jnp.zeros((flat.shape[0], 0, N), work)
    if last_only:
        return states.reshape(*batch, N).astype(u.dtype)
    if result is not None:
        states = jnp.concatenate([result, states], axis=1)
    return states.reshape(*batch, T, N).astype(u.dtype)
