"""Discretization of `x' = A x + B u` with the input held constant over each step.

`x_{k+1} = Ā x_k + B̄ u_k` for a step Δ, which may differ from step to step. With NumPy arguments the
work is done in float64 on the host; as soon as one argument is a JAX array it is done in JAX, in
the dtype of the JAX arguments (float32 at least), and can be differentiated in A, B and Δ.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxkit._checks import check_choice, check_real, is_traced
from jaxkit._typing import Array, ArrayLike

__all__ = ["LTI_METHODS", "discretize", "gbt", "zoh"]

LTI_METHODS = ("forward", "bilinear", "backward", "gbt", "zoh")
_ALPHA = {"forward": 0.0, "bilinear": 0.5, "backward": 1.0}


def _prepare(A: Any, B: Any, dt: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Checked `(A, B, dt)` in one namespace and dtype, with that namespace and the output dtype."""
    on_device = [x for x in (A, B, dt) if isinstance(x, jax.Array)]
    if on_device:
        out, work = _dtypes([x.dtype for x in on_device], np.iscomplexobj(A) or np.iscomplexobj(B))
        np_like: Any = jnp
    else:
        A, B = np.asarray(A), np.asarray(B)
        work = out = np.result_type(A.dtype, B.dtype, np.float64)
        np_like = np
    real = np.finfo(work).dtype
    A = np_like.asarray(A).astype(work)
    B = np_like.asarray(B).astype(work)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape[0] < 1:
        raise ValueError(f"A must be a square matrix [state, state]; got shape {tuple(A.shape)}.")
    if B.ndim not in (1, 2) or B.shape[0] != A.shape[0]:
        raise ValueError(
            f"B must be [state] or [state, inputs] with the {A.shape[0]} states of A; "
            f"got shape {tuple(B.shape)}."
        )
    check_steps("dt", dt)
    return A, B, np_like.asarray(dt).astype(real), np_like, out


def work_dtype(dtype: Any, *, is_complex: bool = False) -> Any:
    """Dtype of the arithmetic: float32 at least, complex where the system is."""
    wide = jnp.finfo(dtype).bits == 64
    if is_complex or jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(jnp.complex128 if wide else jnp.complex64)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _dtypes(dtypes: list[Any], is_complex: bool) -> tuple[Any, Any]:
    """Output and working dtype for the dtypes of the JAX arguments."""
    floats = {jnp.dtype(x) for x in dtypes if jnp.issubdtype(x, jnp.inexact)}
    widest = max(floats, key=lambda x: jnp.finfo(x).bits, default=jnp.dtype(jnp.float32))
    work = work_dtype(widest, is_complex=is_complex)
    return work if is_complex or len(floats) > 1 else widest, work


def check_steps(name: str, dt: Any) -> None:
    """Raise `ValueError` unless every step is positive and finite. Traced steps pass."""
    if is_traced(dt):
        return
    steps = np.asarray(dt)
    if not (np.issubdtype(steps.dtype, np.integer) or jnp.issubdtype(steps.dtype, jnp.floating)):
        raise TypeError(f"{name} must be real numbers; got {dt!r}.")
    good = np.isfinite(steps) & (steps > 0)
    if not good.all():
        raise ValueError(
            f"{name} must be greater than 0 and finite; got {steps[~good].ravel()[0]}."
        )


def gbt(
    A: ArrayLike, B: ArrayLike, dt: ArrayLike, *, alpha: float | Array = 0.5
) -> tuple[Any, Any]:
    """Generalized bilinear transform.

    `Ā = (I − αΔA)^{-1} (I + (1−α)ΔA)` and `B̄ = (I − αΔA)^{-1} ΔB`: α = 0 is forward Euler, ½
    bilinear (Tustin), 1 backward Euler. α weighs the implicit side, as in the HiPPO paper and in
    SciPy; in post 10137 it weighs the explicit side.

    Args:
      A: state matrix, `[state, state]`.
      B: input vector `[state]`, or matrix `[state, inputs]`.
      dt: step Δ > 0 in units of time; a scalar, or an array `[*steps]` of varying steps.
      alpha: weight of the implicit side, in [0, 1].

    Returns:
      `(Ā, B̄)` of shapes `[*steps, state, state]` and `[*steps, *B.shape]`.

    Raises:
      TypeError: `dt` or `alpha` is not a real number.
      ValueError: `A` is not square, `B` does not fit it, a step is not positive, or `alpha` is
        outside [0, 1].

    Example:
      >>> import numpy as np
      >>> A_bar, B_bar = gbt(np.array([[-1.0]]), np.array([1.0]), 0.5)
      >>> print(A_bar.round(3), B_bar.round(3))
      [[0.6]] [0.4]

    Cost: one LU decomposition a step, O(N³).

    Source: Zhang, Chen, Chou 2007; Gu et al. 2020 (arXiv 2008.07669), appendix B.3; post 10137 on
    kexue.fm.
    """
    check_real("alpha", alpha, least=0.0, most=1.0)
    a, b, delta, xp, out = _prepare(A, B, dt)
    weight = xp.asarray(alpha).astype(delta.dtype)
    identity = xp.eye(a.shape[0], dtype=a.dtype)[None]
    columns = b.reshape(a.shape[0], -1)
    # One right-hand side [I + (1−α)ΔA, ΔB] for both, so that each step factorizes once.
    steps = delta.reshape(-1, 1, 1)
    implicit = identity - (weight * steps).astype(a.dtype) * a[None]
    explicit = identity + ((1 - weight) * steps).astype(a.dtype) * a[None]
    scaled = steps.astype(a.dtype) * columns[None]
    both = xp.linalg.solve(implicit, xp.concatenate([explicit, scaled], axis=-1))
    return _split(both, a, b, delta, out)


def _split(both: Any, A: Any, B: Any, dt: Any, out: Any) -> tuple[Any, Any]:
    size = A.shape[0]
    A_bar = both[:, :size, :size].reshape(*dt.shape, size, size)
    B_bar = both[:, :size, size:].reshape(*dt.shape, *B.shape)
    return A_bar.astype(out), B_bar.astype(out)


def zoh(A: ArrayLike, B: ArrayLike, dt: ArrayLike) -> tuple[Any, Any]:
    """Zero-order hold: the exact step for an input that is constant over it.

    `Ā = e^{ΔA}` and `B̄ = ∫_0^Δ e^{sA} ds B`, both from one exponential, of `[[A, B], [0, 0]]Δ`:
    `A^{-1}(e^{ΔA} − I)B` would fail for a singular A and cancel for a small Δ.

    Args:
      A: state matrix, `[state, state]`.
      B: input vector `[state]`, or matrix `[state, inputs]`.
      dt: step Δ > 0 in units of time; a scalar, or an array `[*steps]` of varying steps.

    Returns:
      `(Ā, B̄)` of shapes `[*steps, state, state]` and `[*steps, *B.shape]`.

    Raises:
      TypeError: `dt` is not a real number.
      ValueError: `A` is not square, `B` does not fit it, or a step is not positive.

    Example:
      >>> import numpy as np
      >>> A_bar, B_bar = zoh(np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([0.0, 1.0]), 0.5)
      >>> print(A_bar.tolist(), B_bar.tolist())
      [[1.0, 0.5], [0.0, 1.0]] [0.125, 0.5]

    Source: Van Loan 1978, "Computing integrals involving the matrix exponential".
    """
    a, b, delta, xp, out = _prepare(A, B, dt)
    size = a.shape[0]
    columns = b.reshape(size, -1)
    total = size + columns.shape[1]
    block = xp.concatenate(
        [
            xp.concatenate([a, columns], axis=1),
            xp.zeros((total - size, total), a.dtype),
        ],
        axis=0,
    )
    steps = delta.reshape(-1, 1, 1).astype(a.dtype)
    scaled = steps * block[None]
    if xp is np:
        both = scipy.linalg.expm(scaled)
    else:
        # 16 squarings, JAX's default, turn the stiff steps of large states into NaN.
        both = jax.vmap(lambda M: jax.scipy.linalg.expm(M, max_squarings=32))(scaled)
    return _split(both, a, b, delta, out)


def discretize(
    A: ArrayLike,
    B: ArrayLike,
    dt: ArrayLike,
    *,
    method: str = "bilinear",
    alpha: float | Array = 0.5,
) -> tuple[Any, Any]:
    """Discretize by name: `forward`, `bilinear`, `backward`, `gbt` (with `alpha`) or `zoh`.

    Args:
      A: state matrix, `[state, state]`.
      B: input vector `[state]`, or matrix `[state, inputs]`.
      dt: step Δ > 0 in units of time; a scalar, or an array `[*steps]` of varying steps.
      method: one of `LTI_METHODS`.
      alpha: weight of the implicit side in [0, 1], read by `gbt` alone.

    Returns:
      `(Ā, B̄)` of shapes `[*steps, state, state]` and `[*steps, *B.shape]`.

    Raises:
      TypeError: `dt` or `alpha` is not a real number.
      ValueError: unknown `method`, or an argument out of range (see `gbt`).

    Example:
      >>> import numpy as np
      >>> A_bar, _ = discretize(np.array([[-1.0]]), np.array([1.0]), 0.5, method="backward")
      >>> print(A_bar.round(4))
      [[0.6667]]

    Source: Gu et al. 2020 (arXiv 2008.07669), appendix B.3; post 10137 on kexue.fm.
    """
    check_choice("method", method, LTI_METHODS)
    if method == "zoh":
        return zoh(A, B, dt)
    return gbt(A, B, dt, alpha=_ALPHA.get(method, alpha))
