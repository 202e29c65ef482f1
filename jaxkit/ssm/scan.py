"""Diagonal linear recurrences by parallel scan, complex numbers as two real planes.

`x_k = a_k x_{k-1} + b_k` is associative in the pairs (a, b): all states follow from O(L) products
at a depth of O(log L), with transitions that may differ from step to step. A complex value is a
pair `(re, im)` of real arrays; a real recurrence takes single arrays.

Sources: Blelloch 1990 (*Prefix sums and their applications*); Martin, Cundy 2017 (arXiv
1709.04057); Smith, Warrington, Linderman 2022 (2208.04933).
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from jaxkit._checks import check_floating, check_int, is_traced
from jaxkit._typing import Array, Float

__all__ = ["Planes", "diagonal_scan", "zoh_transition"]

Planes: TypeAlias = tuple[Array, Array]
# What comes in as one array, or as a pair of planes, goes out in the same form.
Values = TypeVar("Values", Array, Planes)
_Parts: TypeAlias = tuple[Array, ...]


def _parts(name: str, values: Any) -> _Parts:
    parts = values if isinstance(values, tuple) else (values,)
    if len(parts) not in (1, 2):
        raise ValueError(f"{name} must be an array or a pair (re, im); got {len(parts)} parts.")
    for part in parts:
        check_floating(name, part)
    if len({tuple(part.shape) for part in parts}) != 1:
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"{name} must have planes of one shape; got {shapes}.")
    return parts


def _times(x: _Parts, y: _Parts) -> _Parts:
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _map(function: Callable[..., Array], *parts: _Parts) -> _Parts:
    return tuple(function(*planes) for planes in zip(*parts, strict=True))


def _plus(x: _Parts, y: _Parts) -> _Parts:
    return _map(jnp.add, x, y)


def _associative(decay: _Parts, drive: _Parts, axis: int) -> tuple[_Parts, _Parts]:
    """Products of the transitions, and states from zero, up to every position."""

    def combine(first, second):
        return _times(second[0], first[0]), _plus(_times(second[0], first[1]), second[1])

    return jax.lax.associative_scan(combine, (decay, drive), axis=axis)


def diagonal_scan(
    decay: Values,
    drive: Values,
    *,
    initial: Values | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    axis: int = -2,
) -> Values:
    """All states of `x_k = a_k x_{k-1} + b_k`, elementwise in every axis but that of the steps.

    Without `chunk_size` the whole sequence is one parallel scan: depth O(log L), and for gradients
    O(L log L) memory. With it, chunks of that many steps are scanned in parallel inside and follow
    one another outside; the backward pass recomputes each chunk, so that it keeps one state a chunk
    beside the inputs. Both give the same states up to rounding.

    Args:
      decay: a: like `drive`, or without its leading (batch) axes, or without these and the axis of
        the steps (the same transition at every step). Unit axes broadcast.
      drive: b: `[*batch, length, modes]`, or any shape with the steps on `axis`. An array, or a
        pair of planes (re, im).
      initial: state before the first step (after the last, if `reverse`): the shape of `drive`
        without `axis`. Default: zero.
      reverse: run backwards, `x_k = a_k x_{k+1} + b_k`.
      chunk_size: steps in a chunk; any number from 1 up, not necessarily a divisor of the length.
      axis: of the steps, counted from the end (negative).

    Returns:
      States, in the form, shape and dtype of `drive`. The work is done in float32 at least.

    Raises:
      TypeError: a plane is not an array of real floating-point numbers, or one of decay, drive and
        initial is a pair and another is not.
      ValueError: shapes do not fit, or `chunk_size` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> states = diagonal_scan(jnp.asarray([0.5]), jnp.ones((3, 1)))
      >>> print(states[:, 0])
      [1.   1.5  1.75]

    Source: Smith, Warrington, Linderman 2022 (arXiv 2208.04933), section 3.3 and appendix H.
    """
    a: _Parts = _parts("decay", decay)
    b: _Parts = _parts("drive", drive)
    if len(a) != len(b):
        raise TypeError(
            "decay and drive must both be arrays or both be pairs (re, im); got "
            f"{len(a)} and {len(b)} planes."
        )
    shape = b[0].shape
    axis = check_int("axis", axis)
    if not -len(shape) <= axis < 0:
        raise ValueError(
            f"axis must be from -{len(shape)} to -1 for drive of shape {tuple(shape)}; got {axis}."
        )
    length = shape[axis]
    if length < 1:
        raise ValueError(f"drive must have at least one step; got shape {tuple(shape)}.")
    a = _spread("decay", a, shape, axis)
    outer = shape[:axis] + shape[len(shape) + axis + 1 :]
    dtypes = [part.dtype for part in (*a, *b)]
    if initial is not None:
        x0 = _parts("initial", initial)
        if len(x0) != len(b):
            raise TypeError(
                "initial and drive must both be arrays or both be pairs (re, im); got "
                f"{len(x0)} and {len(b)} planes."
            )
        if tuple(x0[0].shape) != tuple(outer):
            raise ValueError(f"initial must have shape {outer}; got {tuple(x0[0].shape)}.")
        dtypes += [part.dtype for part in x0]
    work = jnp.float64 if jnp.float64 in dtypes else jnp.float32
    a = _map(lambda part: part.astype(work), a)
    wide = _map(lambda part: part.astype(work), b)
    if initial is None:
        start: _Parts = tuple(jnp.zeros(outer, work) for _ in b)
    else:
        start = _map(lambda part: part.astype(work), x0)
    if reverse:
        a = _map(lambda part: jnp.flip(part, axis), a)
        wide = _map(lambda part: jnp.flip(part, axis), wide)
    place = len(shape) + axis
    if chunk_size is None:
        states = _from_state(a, wide, start, place, free=initial is None)[0]
    else:
        chunk_size = check_int("chunk_size", chunk_size, least=1)
        states = _chunked(a, wide, start, place, min(chunk_size, length))
    if reverse:
        states = _map(lambda part: jnp.flip(part, axis), states)
    out = _map(lambda part, like: part.astype(like.dtype), states, b)
    return out[0] if len(out) == 1 else out  # type: ignore[return-value]


def _spread(name: str, parts: _Parts, shape: tuple[int, ...], axis: int) -> _Parts:
    """Bring `parts` to the rank of `shape`, every step spelled out and batch axes of 1 kept."""
    ndim, after = len(shape), -axis - 1
    given = parts[0].ndim
    if given == after:
        parts = _map(lambda part: jnp.expand_dims(part, 0), parts)
    elif given not in (after + 1, ndim):
        raise ValueError(
            f"{name} must have {after}, {after + 1} or {ndim} axes for drive of shape "
            f"{tuple(shape)}; got shape {tuple(parts[0].shape)}."
        )
    parts = _map(lambda part: jnp.expand_dims(part, range(ndim - part.ndim)), parts)
    got = parts[0].shape
    if any(size not in (1, whole) for size, whole in zip(got, shape, strict=True)):
        raise ValueError(
            f"{name} must broadcast to the shape of drive, {tuple(shape)}; got {tuple(got)}."
        )
    # The scan needs one length everywhere; all other unit axes stay as they are, unmultiplied.
    target = (*got[:axis], shape[axis], *got[ndim + axis + 1 :])
    return _map(lambda part: jnp.broadcast_to(part, target), parts)


def _from_state(
    decay: _Parts, drive: _Parts, state: _Parts, axis: int, *, free: bool = False
) -> tuple[_Parts, _Parts]:
    products, states = _associative(decay, drive, axis)
    if not free:
        carried = _map(lambda part: jnp.expand_dims(part, axis), state)
        states = _plus(states, _times(products, carried))
    last = _map(lambda part: jax.lax.index_in_dim(part, -1, axis, keepdims=False), states)
    return states, last


def _chunked(decay: _Parts, drive: _Parts, state: _Parts, axis: int, size: int) -> _Parts:
    length = drive[0].shape[axis]
    count = -(-length // size)

    def cut(part: Array, fill: float) -> Array:
        # A last chunk is filled up with steps that change nothing: a = 1, b = 0.
        pad = [(0, 0, 0)] * part.ndim
        pad[axis] = (0, count * size - length, 0)
        part = jax.lax.pad(part, jnp.asarray(fill, part.dtype), pad)
        part = part.reshape(*part.shape[:axis], count, size, *part.shape[axis + 1 :])
        return jnp.moveaxis(part, axis, 0)

    ones = (1.0, 0.0)[: len(decay)]
    decays = tuple(cut(part, fill) for part, fill in zip(decay, ones, strict=True))
    drives = tuple(cut(part, 0.0) for part in drive)

    @jax.checkpoint
    def body(state: _Parts, chunk: tuple[_Parts, _Parts]) -> tuple[_Parts, _Parts]:
        states, last = _from_state(*chunk, state, axis)
        return last, states

    _, states = jax.lax.scan(body, state, (decays, drives))

    def join(part: Array) -> Array:
        part = jnp.moveaxis(part, 0, axis)
        part = part.reshape(*part.shape[:axis], count * size, *part.shape[axis + 2 :])
        return jax.lax.slice_in_dim(part, 0, length, axis=axis)

    return _map(join, states)


def zoh_transition(
    eigenvalues: Values, steps: Float[Array, "*batch length"]
) -> tuple[Values, Values]:
    """Transition and input gain of a diagonal system whose input is held for `Δ_k` at step k.

    `x' = Λx + v` with v constant for a time Δ: `x ← e^{ΔΛ} x + (e^{ΔΛ} − 1)Λ^{-1} v`, through
    expm1, exact for small ΔΛ and equal to Δ at Λ = 0. Irregular sampling times are then the scan
    with these transitions.

    Args:
      eigenvalues: Λ `[modes]`, or any shape: an array, or a pair of planes (re, im).
      steps: Δ_k, positive, in the unit of time of Λ.

    Returns:
      `(decay, gain)`, each `[*batch, length, modes]` in the form of `eigenvalues`.

    Raises:
      TypeError: an argument is not real and floating-point.
      ValueError: a known step is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> decay, gain = zoh_transition(jnp.asarray([-1.0, 0.0]), jnp.asarray([0.5, 2.0]))
      >>> [[round(float(x), 4) for x in row] for row in gain]
      [[0.3935, 0.5], [0.8647, 2.0]]

    Source: Gu, Gupta, Goel, Ré 2022 (arXiv 2206.11893); Smith et al. 2022 (2208.04933, sec. 6.3).
    """
    parts = _parts("eigenvalues", eigenvalues)
    check_floating("steps", steps)
    if not is_traced(steps) and not bool(jnp.all((steps > 0) & jnp.isfinite(steps))):
        raise ValueError(f"steps must be positive and finite; got {steps}.")
    dtype = parts[0].dtype
    work = jnp.float64 if jnp.float64 in (dtype, steps.dtype) else jnp.float32
    ndim = steps.ndim + parts[0].ndim
    delta = jnp.expand_dims(steps.astype(work), range(steps.ndim, ndim))
    wide = [jnp.expand_dims(part.astype(work), range(steps.ndim)) for part in parts]
    zero = jnp.zeros((), work)
    if len(wide) == 1:
        z = delta * wide[0]
        at_zero = z == zero
        gain = jnp.where(at_zero, delta, delta * jnp.expm1(z) / jnp.where(at_zero, 1, z))
        return jnp.exp(z).astype(dtype), gain.astype(dtype)  # type: ignore[return-value]
    re, im = wide
    x, y = delta * re, delta * im
    size = jnp.exp(x)
    cos, sin = jnp.cos(y), jnp.sin(y)
    # e^z − 1 without cancellation: expm1(x) cos y − 2 sin²(y/2) + i e^x sin y.
    up, side = jnp.expm1(x) * cos - 2 * jnp.sin(0.5 * y) ** 2, size * sin
    square = x * x + y * y
    at_zero = square == zero
    safe = jnp.where(at_zero, 1, square)
    gain_re = jnp.where(at_zero, delta, delta * (up * x + side * y) / safe)
    gain_im = jnp.where(at_zero, zero, delta * (side * x - up * y) / safe)
    decay_planes = (size * cos).astype(dtype), (size * sin).astype(dtype)
    return decay_planes, (gain_re.astype(dtype), gain_im.astype(dtype))  # type: ignore[return-value]
