"""Scans of `x_{k+1} = Ā_k x_k + B̄_k u_k`: step by step, or in chunks of matrix products."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit._typing import Array, ArrayLike
from jaxkit.ssm.discretize import LTI_METHODS, check_steps, discretize, work_dtype
from jaxkit.ssm.hippo._common import HIGHEST, signal

__all__ = ["lti_scan", "lti_scan_varying"]


def _system(A: Any, B: Any) -> tuple[Any, Any]:
    A = A if isinstance(A, jax.Array) else np.asarray(A)
    B = B if isinstance(B, jax.Array) else np.asarray(B)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape[0] < 1:
        raise ValueError(f"A must be a square matrix [state, state]; got shape {tuple(A.shape)}.")
    if B.shape != A.shape[:1]:
        raise ValueError(f"B must be [{A.shape[0]}], as A; got shape {tuple(B.shape)}.")
    return A, B


def _is_complex(*arrays: Any) -> bool:
    return any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in arrays if x is not None)


def _start(state: Any, shape: tuple[int, ...], work: Any) -> Array:
    if state is None:
        return jnp.zeros((int(np.prod(shape[:-1])), shape[-1]), work)
    state = jnp.asarray(state)
    if state.shape != shape:
        raise ValueError(f"state must be {shape}, as u and A say; got shape {tuple(state.shape)}.")
    return state.astype(work).reshape(-1, shape[-1])


def _step(x: Array, u: Array, A_bar: Array, B_bar: Array) -> Array:
    return jnp.matmul(x, A_bar.T, precision=HIGHEST) + u[:, None] * B_bar[None]


def _sequential(x: Array, u: Array, A_bar: Array, B_bar: Array, last_only: bool) -> Array:
    def body(state, u_k):
        state = _step(state, u_k, A_bar, B_bar)
        return state, None if last_only else state

    last, states = jax.lax.scan(body, x, u.T)
    return last if last_only else jnp.moveaxis(states, 0, 1)


def _chunk_matrices(A_bar: Any, B_bar: Any, chunk: int) -> tuple[Any, Any]:
    """Rows Ā^m B̄, m = 0..chunk−1, and Ā^chunk; in float64 for a system on the host.

    A step so short that Ā rounds to the identity in float32 then costs no accuracy.
    """
    if isinstance(A_bar, np.ndarray) and isinstance(B_bar, np.ndarray):
        rows = np.empty((chunk, len(B_bar)), np.result_type(A_bar, B_bar, np.float64))
        rows[0] = B_bar
        for m in range(1, chunk):
            rows[m] = A_bar @ rows[m - 1]
        return rows, np.linalg.matrix_power(A_bar, chunk)

    def impulse(column, _):
        return jnp.matmul(A_bar, column, precision=HIGHEST), column

    _, rows = jax.lax.scan(impulse, B_bar, length=chunk)
    return rows, _power(A_bar, chunk)


def _chunked(
    x: Array,
    u: Array,
    A_bar: Array,
    B_bar: Array,
    rows: Array,
    jump: Array,
    last_only: bool,
) -> Array:
    """States by chunks of `len(rows)` samples, of which the length of `u` is a multiple."""
    b, T = u.shape
    chunk, N = rows.shape
    blocks = u.reshape(b, T // chunk, chunk)
    # The newest sample of a chunk meets m = 0.
    driven = jnp.matmul(blocks, rows[::-1], precision=HIGHEST)

    def body(state, drive):
        after = jnp.matmul(state, jump.T, precision=HIGHEST) + drive
        return after, None if last_only else state

    last, before = jax.lax.scan(body, x, jnp.moveaxis(driven, 1, 0))
    if last_only:
        return last
    # With the state before every chunk known, all chunks run their steps at the same time.
    before = jnp.moveaxis(before, 0, 1).reshape(-1, N)
    states = _sequential(before, blocks.reshape(-1, chunk), A_bar, B_bar, False)
    return states.reshape(b, T, N)


def _power(A: Array, exponent: int) -> Array:
    result, square = None, A
    while exponent:
        if exponent & 1:
            result = square if result is None else jnp.matmul(result, square, precision=HIGHEST)
        exponent >>= 1
        if exponent:
            square = jnp.matmul(square, square, precision=HIGHEST)
    assert result is not None
    return result


def lti_scan(
    A_bar: ArrayLike,
    B_bar: ArrayLike,
    u: Array,
    *,
    state: Array | None = None,
    chunk: int | None = None,
    last_only: bool = False,
) -> Array:
    """States of `x_{k+1} = Ā x_k + B̄ u_k` after every sample.

    In chunks of M samples, a state moves on by `x ← Ā^M x + Σ_j Ā^{M−1−j} B̄ u_j`, whose sum is one
    product with a matrix `[M, N]`; the states inside all chunks then follow side by side. Depth
    T/M + M instead of T.

    Args:
      A_bar: discrete transition `[state, state]`. Of a NumPy array chunks take powers in float64.
      B_bar: discrete input vector `[state]`.
      u: samples `[..., length]`.
      state: states before the first sample, `[..., state]`; default 0.
      chunk: samples to a chunk, at least 1; None goes step by step. Any value gives the same.
      last_only: return the last states alone (for chunks: matrix products only).

    Returns:
      `[..., length, state]`, or `[..., state]` with `last_only`, in the dtype of `u` (its complex
      dtype for a complex system).

    Raises:
      TypeError: `u` is not real, or `chunk` not an integer.
      ValueError: shapes that do not fit, or `chunk < 1`.

    Example:
      >>> import jax.numpy as jnp
      >>> u = jnp.asarray([1.0, 0.0, 0.0])
      >>> lti_scan(jnp.asarray([[0.5]]), jnp.asarray([2.0]), u)[:, 0].round(3).tolist()
      [2.0, 1.0, 0.5]

    Source: Gu et al. 2020 (arXiv 2008.07669); chunks as in Voelker's LMU, post 10137 on kexue.fm.
    """
    u = signal(u)
    transition, column = _system(A_bar, B_bar)
    N, T = transition.shape[0], u.shape[-1]
    if chunk is not None:
        chunk = min(check_int("chunk", chunk, least=1), T)
    work = work_dtype(u.dtype, is_complex=_is_complex(transition, column, state))
    A = jnp.asarray(transition).astype(work)
    B = jnp.asarray(column).astype(work)
    flat = u.astype(work).reshape(-1, T)
    x = _start(state, (*u.shape[:-1], N), work)
    if chunk is None:
        states = _sequential(x, flat, A, B, last_only)
    else:
        head = T % chunk
        pieces = []
        if head:
            pieces.append(_sequential(x, flat[:, :head], A, B, last_only))
            x = pieces[0] if last_only else pieces[0][:, -1]
        on_host = isinstance(transition, np.ndarray) and isinstance(column, np.ndarray)
        system = (transition, column) if on_host else (A, B)
        matrices = _chunk_matrices(system[0], system[1], chunk)
        rows, jump = (jnp.asarray(matrix).astype(work) for matrix in matrices)
        pieces.append(_chunked(x, flat[:, head:], A, B, rows, jump, last_only))
        states = pieces[-1] if last_only else jnp.concatenate(pieces, axis=1)
    return _finish(states, u, N, work, last_only)


def _finish(states: Array, u: Array, N: int, work: Any, last_only: bool) -> Array:
    out = work if jnp.issubdtype(work, jnp.complexfloating) else u.dtype
    shape = (*u.shape[:-1], N) if last_only else (*u.shape, N)
    return states.reshape(shape).astype(out)


def lti_scan_varying(
    A: ArrayLike,
    B: ArrayLike,
    u: Array,
    dt: ArrayLike,
    *,
    method: str = "zoh",
    alpha: float | Array = 0.5,
    state: Array | None = None,
    last_only: bool = False,
) -> Array:
    """States of `x' = A x + B u` for a step that varies from sample to sample.

    Each step is discretized where it is used, so that memory stays O(N²); steps that are known and
    take few values (a jittered grid, dropped samples) are discretized once per value.

    Args:
      A: continuous transition `[state, state]`.
      B: continuous input vector `[state]`.
      u: samples `[..., length]`; `u[k]` holds for `dt[k]`.
      dt: steps `[length]`, each above 0.
      method: one of `forward`, `bilinear`, `backward`, `gbt`, `zoh`.
      alpha: implicit weight of `gbt`.
      state: states before the first sample; default 0.
      last_only: return the last states alone.

    Returns:
      `[..., length, state]`, or `[..., state]` with `last_only`.

    Raises:
      TypeError: `u` or `dt` is not real.
      ValueError: unknown `method`, shapes that do not fit, or a step that is not positive.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> A, B = np.array([[0.0]]), np.array([1.0])
      >>> dt = np.array([1.0, 2.0, 1.0])
      >>> [round(v, 3) for v in lti_scan_varying(A, B, jnp.ones(3), dt)[:, 0].tolist()]
      [1.0, 3.0, 4.0]

    Cost: O(N³) for every step that is discretized.

    Source: see `jaxkit.ssm.discretize`.
    """
    u = signal(u)
    matrix, column = _system(A, B)
    check_choice("method", method, LTI_METHODS)
    check_real("alpha", alpha, least=0.0, most=1.0)
    check_steps("dt", dt)
    steps: Any = dt if isinstance(dt, jax.Array) else np.asarray(dt)
    N, T = matrix.shape[0], u.shape[-1]
    if steps.shape != (T,):
        raise ValueError(f"dt must be [{T}], one for each sample; got shape {tuple(steps.shape)}.")
    work = work_dtype(u.dtype, is_complex=_is_complex(matrix, column, state))
    flat = u.astype(work).reshape(-1, T)
    x = _start(state, (*u.shape[:-1], N), work)
    on_host = all(isinstance(v, np.ndarray) for v in (matrix, column, steps)) and not isinstance(
        alpha, jax.Array
    )
    values, which = np.unique(steps, return_inverse=True) if on_host else (None, None)
    if values is not None and which is not None and len(values) <= 16:
        table = [
            jnp.asarray(v, work)
            for v in discretize(matrix, column, values, method=method, alpha=alpha)
        ]

        def pick(k):
            return table[0][k], table[1][k]

        steps = jnp.asarray(which.reshape(-1), jnp.int32)
    else:
        matrix, column = jnp.asarray(matrix).astype(work), jnp.asarray(column).astype(work)

        def pick(step):
            return discretize(matrix, column, step, method=method, alpha=alpha)

        steps = jnp.asarray(steps).astype(jnp.finfo(work).dtype)

    def body(carry, inputs):
        u_k, step = inputs
        carry = _step(carry, u_k, *pick(step))
        return carry, None if last_only else carry

    last, states = jax.lax.scan(body, x, (flat.T, steps))
    return _finish(last if last_only else jnp.moveaxis(states, 0, 1), u, N, work, last_only)
