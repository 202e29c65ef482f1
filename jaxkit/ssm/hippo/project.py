"""One entrance to every measure: a signal in, the states of its memory out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_choice, check_int, check_real, is_traced
from jaxkit._typing import Array, ArrayLike, Float
from jaxkit.ssm.discretize import LTI_METHODS, check_steps, discretize, work_dtype
from jaxkit.ssm.hippo._common import check_increasing, signal
from jaxkit.ssm.hippo.legs import legs_scan
from jaxkit.ssm.hippo.lti import lti_scan, lti_scan_varying
from jaxkit.ssm.hippo.measures import SCALED_MEASURES, basis_scale, check_measure, transition

__all__ = ["project"]

_FOUS_METHODS = ("bilinear", "exact", "gbt", "forward", "backward")


def project(
    u: Float[Array, "*batch length"],
    N: int,
    *,
    measure: str = "legs",
    method: str | None = None,
    dt: ArrayLike | None = None,
    times: ArrayLike | None = None,
    window: float = 1.0,
    decay: float = 1.0,
    norm: Any = "unit",
    complex_form: bool = False,
    alpha: float | Array = 0.5,
    weight: str = "trapezoid",
    parallel: bool = False,
    chunk: int = 64,
    unsafe: bool = False,
    last_only: bool = False,
) -> Array:
    """States of a HiPPO memory after every sample of a signal.

    Args:
      u: samples, each held over its step.
      N: number of states; odd for the Fourier measures.
      measure: one of `MEASURES`; see `transition`.
      method: discretization. `legs`: see `legs_scan` (default `bilinear`). `fous`: `bilinear`
        (default), `exact`, `gbt`, `forward`, `backward`, all in log time from the exact first step.
        The others: `zoh` (default, exact), `bilinear`, `gbt`, `forward`, `backward`.
      dt: step in units of time: a scalar, or `[length]` of varying steps. The measures of the whole
        past do not depend on a constant step and need none; the others need `dt` or `times`.
      times: ends of the steps `[length]` in place of `dt`, increasing from above 0.
      window: window in units of time.
      decay: β of `lagt`.
      norm: normalization of the states, as in `transition`.
      complex_form: complex states for `fout` and `fout_post`.
      alpha: implicit weight of the `gbt` methods.
      weight: input weight of LegS' `gbt_t`.
      parallel: run in parallel over time: associative scans for `legs`, chunks of matrix products
        for fixed steps of the others. The states are the same.
      chunk: samples to a chunk, for `parallel` and for `legs` with `exact`.
      unsafe: allow forward Euler on `legs` above N = 16.
      last_only: return the last states alone.

    Returns:
      `[..., length, N]`, or `[..., N]` with `last_only`, in the dtype of `u`; complex for `fous`
      and with `complex_form`.

    Raises:
      TypeError: an argument is not of the kind asked for.
      ValueError: an argument out of range, by name: unknown `measure`, `method` or `norm`, `N < 1`,
        even `N` for Fourier, `window ≤ 0`, `dt ≤ 0`, times that do not increase from above 0, `dt`
        and `times` both or (where needed) neither, `alpha` outside [0, 1], `parallel` with varying
        steps, forward Euler on `legs` at N > 16.

    Example:
      >>> import jax.numpy as jnp
      >>> u = jnp.ones(8)
      >>> project(u, 3, measure="legs").shape
      (8, 3)
      >>> project(u, 2, measure="legt", dt=0.25, last_only=True).round(3).tolist()
      [1.01..., 0.00...]

    Source: Gu, Dao, Ermon, Rudra, Ré 2020 (arXiv 2008.07669); posts 10114 and 10137 on kexue.fm.
    """
    u = signal(u)
    N = check_measure(measure, N)
    chunk = check_int("chunk", chunk, least=1)
    check_real("alpha", alpha, least=0.0, most=1.0)
    if dt is not None and times is not None:
        raise ValueError("dt and times must not both be given; times fix the steps.")
    T = u.shape[-1]
    if dt is not None:
        check_steps("dt", dt)
        if jnp.ndim(dt) not in (0, 1) or (jnp.ndim(dt) == 1 and jnp.shape(dt) != (T,)):
            raise ValueError(f"dt must be a scalar or [{T}]; got shape {tuple(jnp.shape(dt))}.")
    steps: Any = dt
    ends: Any = times
    if measure in SCALED_MEASURES:
        if steps is not None and jnp.ndim(steps) == 1:
            ends = jnp.cumsum(steps) if isinstance(steps, jax.Array) else np.cumsum(steps)
        if ends is not None:
            ends = check_increasing("times", ends, T, above=0.0, meaning="time")
    if measure == "legs":
        states = legs_scan(
            u,
            N,
            method="bilinear" if method is None else method,
            times=ends,
            alpha=alpha,
            weight=weight,
            form="associative" if parallel else "sequential",
            chunk=chunk,
            unsafe=unsafe,
            last_only=last_only,
        )
        if isinstance(norm, str) and norm == "unit":
            return states
        factor = jnp.asarray(1 / basis_scale(measure, N, norm)).astype(states.dtype)
        return states * jnp.expand_dims(factor, range(states.ndim - 1))
    A, B = transition(measure, N, window=window, decay=decay, norm=norm, complex_form=complex_form)
    if measure == "fous":
        return _fous(u, A, B, norm, method, ends, alpha, last_only)
    method = "zoh" if method is None else method
    check_choice("method", method, LTI_METHODS)
    if ends is not None:
        ends = check_increasing("times", ends, T, above=0.0, meaning="time")
        steps = (
            jnp.diff(ends, prepend=jnp.zeros_like(ends[:1]))
            if is_traced(ends)
            else np.diff(ends, prepend=0.0)
        )
    if steps is None:
        raise ValueError(
            f"dt or times must be given for measure {measure!r}, whose window is a time."
        )
    if jnp.ndim(steps) == 0:
        A_bar, B_bar = discretize(A, B, steps, method=method, alpha=alpha)
        return lti_scan(A_bar, B_bar, u, chunk=chunk if parallel else None, last_only=last_only)
    if parallel:
        raise ValueError("parallel must be False for varying steps: chunks need a fixed step.")
    return lti_scan_varying(A, B, u, steps, method=method, alpha=alpha, last_only=last_only)


def _fous(
    u: Array, A: Any, B: Any, norm: Any, method: str | None, times: Any, alpha: Any, last_only: bool
) -> Array:
    method = "bilinear" if method is None else method
    check_choice("method", method, _FOUS_METHODS)
    N, T = A.shape[0], u.shape[-1]
    ends: Any = np.arange(1.0, T + 1) if times is None else times
    # −A^{-1}B is the constant signal's state, which the singular first interval reaches exactly.
    constant = np.zeros(N, np.complex128)
    constant[(N - 1) // 2] = 1 / basis_scale("fous", N, norm)[(N - 1) // 2]
    work = work_dtype(u.dtype, is_complex=True)
    first = u[..., :1].astype(work) * jnp.expand_dims(
        jnp.asarray(constant, work), range(u.ndim - 1)
    )
    if T == 1:
        return first if last_only else first[..., None, :]
    xp = jnp if is_traced(ends) else np
    states = lti_scan_varying(
        A,
        B,
        u[..., 1:],
        xp.log(ends[1:] / ends[:-1]),
        method="zoh" if method == "exact" else method,
        alpha=alpha,
        state=first,
        last_only=last_only,
    )
    return states if last_only else jnp.concatenate([first[..., None, :], states], axis=-2)
