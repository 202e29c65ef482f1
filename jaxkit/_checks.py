"""Argument checks that name the argument, what it got, and what it takes."""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

import jax


def is_traced(value: Any) -> bool:
    """Whether `value` is abstract, so that nothing can be asked of its contents."""
    return isinstance(value, jax.core.Tracer)


def nearest(value: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest choices, or nothing."""
    close = difflib.get_close_matches(str(value), list(choices), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        takes = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {takes}; got {value!r}.{nearest(value, choices)}")


def check_int(name: str, value: Any, *, least: int | None = None) -> int:
    """Return `value` as an `int`, or raise naming `name`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r}.") from None
    if least is not None and result < least:
        raise ValueError(f"{name} must be at least {least}; got {result}.")
    return result


def check_real(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """Check a scalar's range and return it. A traced scalar passes: its value is not known."""
    if is_traced(value):
        return value
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) != 0:
        raise TypeError(f"{name} must be a real number; got {value!r}.")
    number = float(value)
    bounds = [
        f"greater than {above}" if above is not None else "",
        f"at least {least}" if least is not None else "",
        f"at most {most}" if most is not None else "",
    ]
    wanted = " and ".join(bound for bound in bounds if bound) or "finite"
    good = (
        math.isfinite(number)
        and (above is None or number > above)
        and (least is None or number >= least)
        and (most is None or number <= most)
    )
    if not good:
        raise ValueError(f"{name} must be {wanted}; got {value!r}.")
    return value


def check_floating(name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` is an array of real floating-point numbers."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jax.numpy.issubdtype(dtype, jax.numpy.floating):
        got = f"dtype {dtype}" if dtype is not None else repr(value)
        raise TypeError(f"{name} must be an array of real floating-point numbers; got {got}.")


def check_axis(name: str, value: Any, axis: int, size: int, meaning: str) -> None:
    """Raise `ValueError` unless `value.shape[axis] == size`."""
    if value.ndim < (axis + 1 if axis >= 0 else -axis) or value.shape[axis] != size:
        raise ValueError(
            f"{name} must have {size} {meaning} on axis {axis}; got shape {tuple(value.shape)}."
        )
