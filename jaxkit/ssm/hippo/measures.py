"""HiPPO transition matrices, one for each measure of the past, on the host in float64.

The sign is that of `x' = A x + B u` with a stable A (the HiPPO paper's A is minus ours).
"""

from typing import Any

import numpy as np

from jaxkit._checks import check_choice, check_int, check_real

__all__ = ["MEASURES", "SCALED_MEASURES", "basis_scale", "transition"]

MEASURES = ("legt", "lmu", "legs", "lagt", "fout", "fous", "fout_post")
SCALED_MEASURES = ("legs", "fous")
"""Measures of the whole past, whose equation is `x' = (A x + B u) / t`."""

_LEGENDRE = ("legt", "legs")
_FOURIER = ("fout", "fous", "fout_post")
_NORMS = ("unit", "post", "lmu")


def check_measure(measure: str, N: int) -> int:
    """The checked state size of a known measure."""
    check_choice("measure", measure, MEASURES)
    N = check_int("N", N, least=1)
    if measure in _FOURIER and N % 2 == 0:
        raise ValueError(
            f"N must be odd for measure {measure!r} (frequencies −K..K make N = 2K + 1 states); "
            f"got {N}. Take {N - 1} or {N + 1}."
        )
    return N


def basis_scale(measure: str, N: int, norm: Any = "unit") -> np.ndarray:
    """λ of a normalization: states are the orthonormal coefficients divided by λ.

    `c_n = λ_n c̃_n` maps `A_nk → A_nk λ_k/λ_n` and `B_n → B_n/λ_n`. `unit` is λ = 1; `post` (basis
    orthonormal on [−1, 1]) is λ = 1/√2; `lmu` is λ = 1/√(2n+1). Post 10114 counts λ from its own
    basis, which gives √2 times these numbers.

    Args:
      measure: one of `MEASURES`; `post` and `lmu` are for the Legendre measures. The measure `lmu`
        has its own scaling already, on top of which an array acts.
      N: number of states.
      norm: `unit`, `post`, `lmu`, or an array `[N]` of nonzero λ.

    Returns:
      λ, float64 `[N]`.

    Raises:
      TypeError: `norm` is neither a name nor real numbers.
      ValueError: unknown `norm`, one that the measure does not have, or λ of the wrong shape or
        with a zero.

    Example:
      >>> basis_scale("legt", 3, "post").round(4).tolist()
      [0.7071, 0.7071, 0.7071]

    Source: post 10114 on kexue.fm, with its λ for the LMU corrected.
    """
    N = check_measure(measure, N)
    if isinstance(norm, str):
        check_choice("norm", norm, _NORMS)
        if norm == "unit" or (measure == "lmu" and norm == "lmu"):
            return np.ones(N)
        if measure not in _LEGENDRE:
            raise ValueError(
                f"norm must be 'unit' or an array of {N} numbers for measure {measure!r}; "
                f"got {norm!r}, which rescales Legendre polynomials."
            )
        return np.full(N, np.sqrt(0.5)) if norm == "post" else 1 / np.sqrt(2 * np.arange(N) + 1.0)
    scale = np.asarray(norm)
    if not (np.issubdtype(scale.dtype, np.floating) or np.issubdtype(scale.dtype, np.integer)):
        raise TypeError(f"norm must be one of {_NORMS} or real numbers; got {norm!r}.")
    scale = scale.astype(np.float64)
    if scale.shape != (N,) or not np.all(np.isfinite(scale) & (scale != 0)):
        raise ValueError(
            f"norm must be one of {_NORMS} or {N} nonzero finite numbers; got {norm!r}."
        )
    return scale


def _legt(N: int) -> tuple[np.ndarray, np.ndarray]:
    n = np.arange(N)
    r = np.sqrt(2 * n + 1.0)
    row, column = n[:, None], n[None, :]
    sign = np.where(column < row, 1.0, 1.0 - 2.0 * ((row - column) % 2))
    return -np.outer(r, r) * sign, r


def _lmu(N: int) -> tuple[np.ndarray, np.ndarray]:
    n = np.arange(N)
    row, column = n[:, None], n[None, :]
    sign = np.where(row < column, -1.0, 1.0 - 2.0 * ((row - column + 1) % 2))
    return (2 * row + 1.0) * sign, (2 * n + 1.0) * (1.0 - 2.0 * (n % 2))


def _legs(N: int) -> tuple[np.ndarray, np.ndarray]:
    n = np.arange(N)
    r = np.sqrt(2 * n + 1.0)
    return np.tril(-np.outer(r, r), -1) + np.diag(-(n + 1.0)), r


def _lagt(N: int, decay: float) -> tuple[np.ndarray, np.ndarray]:
    return 0.5 * (1 - decay) * np.eye(N) - np.tril(np.ones((N, N))), np.ones(N)


def _fout(N: int, gain: float, complex_form: bool) -> tuple[np.ndarray, np.ndarray]:
    K = (N - 1) // 2
    if complex_form:
        n = np.arange(-K, K + 1)
        return np.diag(2j * np.pi * n) - gain, np.full(N, gain, np.complex128)
    p = np.zeros(N)
    p[0] = 1.0
    p[1::2] = np.sqrt(2.0)
    rotation = np.zeros((N, N))
    j = np.arange(1, K + 1)
    rotation[2 * j - 1, 2 * j] = 2 * np.pi * j
    rotation[2 * j, 2 * j - 1] = -2 * np.pi * j
    return rotation - gain * np.outer(p, p), gain * p


def _fous(N: int) -> tuple[np.ndarray, np.ndarray]:
    n = np.arange(N) - (N - 1) // 2
    row, column = n[:, None], n[None, :]
    difference = np.where(row == column, 1, row - column)
    A = np.where(row == column, 1j * np.pi * row - 1, -row / difference)
    return A, np.ones(N, np.complex128)


def transition(
    measure: str,
    N: int,
    *,
    window: float = 1.0,
    decay: float = 1.0,
    norm: Any = "unit",
    complex_form: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """`(A, B)` of the memory `x' = A x + B u`, or `x' = (A x + B u)/t` for `legs` and `fous`.

    With s ∈ [0, 1] and s = 1 the newest point, `x_n = ∫ u(t(s)) φ_n(s) ds`:

    - `legt`: the last `window`, in `φ_n = √(2n+1) P_n(2s−1)`;
    - `lmu`: the same system with argument 1−s (the delay) and states `(−1)^n √(2n+1) x_n`;
    - `legs`: the whole past [0, t], in the basis of `legt`; eigenvalues exactly −1..−N;
    - `lagt`: the past under `e^{−(1+β)τ/2w}`, in Laguerre polynomials of τ/w, τ the age;
    - `fout`: the last `window`, in `[1, √2 cos 2πs, √2 sin 2πs, ...]`, or in `e^{2πins}`,
      n = −K..K, with `complex_form`;
    - `fous`: the whole past, in `e^{2πins}`, n = −K..K (complex);
    - `fout_post`: `fout` with the gain 1 of post 10114, kept for comparison. Its memory is no
      window: the m-th window back still counts (2/3)(1/3)^m.

    LegT and LegS are far from normal: numerical eigenvalues of LegT are wrong from N = 64 on in
    float64. Neither diagonalize them nor test stability that way.

    Args:
      measure: one of `MEASURES`.
      N: number of states; odd for the Fourier measures.
      window: length w of the window, or scale of the exponential, in units of time. `legs` and
        `fous` have none and do not read it.
      decay: β ∈ [0, 1] of `lagt`: 1 is the paper's, 0 is orthonormal in plain L².
      norm: `unit` (orthonormal), `post`, `lmu`, or λ `[N]`; see `basis_scale`.
      complex_form: complex Fourier basis, for `fout` and `fout_post`.

    Returns:
      `A` `[N, N]` and `B` `[N]`, NumPy float64 (complex128 for a complex basis).

    Raises:
      TypeError: `N` is not an integer, or `window` or `decay` not a real number.
      ValueError: unknown `measure`; `N < 1`, or even for a Fourier measure; `window ≤ 0`; `decay`
        outside [0, 1]; a `norm` that the measure does not have; `complex_form` for a measure
        without one.

    Example:
      >>> A, B = transition("legs", 3)
      >>> print(A.round(3), B.round(3))
      [[-1.     0.     0.   ]
       [-1.732 -2.     0.   ]
       [-2.236 -3.873 -3.   ]] [1.    1.732 2.236]

    Source: Gu, Dao, Ermon, Rudra, Ré 2020 (arXiv 2008.07669); Voelker, Kajić, Eliasmith 2019
    (NeurIPS) for `lmu`; Gu et al. 2022 (arXiv 2206.12037) for `fout`, with the gain 2 that the
    mean at a jump demands; posts 10114 and 10137 on kexue.fm.
    """
    N = check_measure(measure, N)
    window = float(check_real("window", window, above=0.0))
    decay = float(check_real("decay", decay, least=0.0, most=1.0))
    scale = basis_scale(measure, N, norm)
    if complex_form and measure not in _FOURIER:
        raise ValueError(
            f"complex_form must be False for measure {measure!r}; the Fourier measures {_FOURIER} "
            "have a complex form."
        )
    if measure == "legt":
        A, B = _legt(N)
    elif measure == "lmu":
        A, B = _lmu(N)
    elif measure == "legs":
        A, B = _legs(N)
    elif measure == "lagt":
        A, B = _lagt(N, decay)
    elif measure == "fous":
        A, B = _fous(N)
    else:
        A, B = _fout(N, 1.0 if measure == "fout_post" else 2.0, complex_form)
    if measure not in SCALED_MEASURES:
        A, B = A / window, B / window
    return A * (scale[None, :] / scale[:, None]), B / scale
