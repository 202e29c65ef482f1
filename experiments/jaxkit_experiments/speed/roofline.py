"""Counted work, and the least time it can take on a named device.

A computation of F operations that must move Q bytes takes at least max(F / peak, Q / bandwidth)
(Williams, Waterman, Patterson 2009, *Roofline*, CACM 52(4)). F is counted from the traced
program itself, Q is its arguments and results: what a perfectly fused kernel still has to move.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxkit import _checks

__all__ = ["DEVICES", "Device", "Work", "count", "least_time"]


@dataclass(frozen=True)
class Device:
    """Peak rates of one chip: operations and bytes per second.

    Example:
        >>> DEVICES["h200"].bandwidth / DEVICES["h100"].bandwidth > 1.4
        True
    """

    name: str
    vector: float
    """Elementwise float32 operations (a fused multiply-add counts as two)."""
    matrix: float
    """Operations of a float32 matrix product at full float32 accuracy."""
    bandwidth: float
    """Bytes per second from and to device memory."""
    source: str
    one_unit: bool = False
    """Whether float32 products run on the elementwise units, so that the two times add up."""


def _tpu(name: str, clock: float, bf16: float, bandwidth: float, clock_source: str) -> Device:
    # 8 x 128 lanes with 4 ALUs each and no fused multiply-add; a float32 product is six bf16
    # passes through the matrix unit.
    return Device(
        name=name,
        vector=8 * 128 * 4 * clock,
        matrix=bf16 / 6,
        bandwidth=bandwidth,
        source=(
            "bf16 peak and bandwidth: Cloud TPU documentation; vector rate: 8x128 lanes x 4 ALUs "
            f"(Austin et al. 2025, How to Scale Your Model) x {clock / 1e9:g} GHz ({clock_source})"
        ),
    )


DEVICES: dict[str, Device] = {
    "tpu-v5e": _tpu("TPU v5e", 1.5e9, 197e12, 819e9, "from 4 MXUs of 128x128 at 197 TFLOP/s"),
    # 918 TFLOP/s from two 256x256 units would be 3.5 GHz; half of it is the plausible core clock.
    "tpu-v6e": _tpu("TPU v6e", 1.75e9, 918e12, 1640e9, "not published: assumed"),
    "h100": Device(
        "H100 SXM", 66.9e12, 66.9e12, 3.35e12, "NVIDIA H100 data sheet, float32 without TF32", True
    ),
    "h200": Device(
        "H200 SXM", 66.9e12, 66.9e12, 4.8e12, "NVIDIA H200 data sheet, float32 without TF32", True
    ),
}


@dataclass(frozen=True)
class Work:
    """Operations (elementwise and in matrix products) and bytes that must move.

    Example:
        >>> (Work(1.0, 2.0, 3.0) + Work(1.0, 0.0, 0.0)).vector
        2.0
    """

    vector: float
    matrix: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.vector + other.vector, self.matrix + other.matrix, self.bytes + other.bytes
        )

    @property
    def flops(self) -> float:
        """All operations."""
        return self.vector + self.matrix


# Primitives that move, select or relabel data without arithmetic.
_FREE = frozenset(
    {
        "and",
        "argmax",
        "argmin",
        "bitcast_convert_type",
        "broadcast_in_dim",
        "complex",
        "concatenate",
        "conj",
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "dynamic_slice",
        "dynamic_update_slice",
        "eq",
        "expand_dims",
        "gather",
        "ge",
        "gt",
        "imag",
        "iota",
        "is_finite",
        "le",
        "lt",
        "ne",
        "not",
        "optimization_barrier",
        "or",
        "pad",
        "platform_index",
        "real",
        "reduce_and",
        "reduce_or",
        "reshape",
        "rev",
        "select_n",
        "sharding_constraint",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
        "xor",
    }
)
# Real operations of one complex operation.
_COMPLEX = {"mul": 6, "div": 11, "add": 2, "sub": 2, "add_any": 2, "neg": 2, "exp": 4}
_REDUCE = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum", "cumprod"})


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _is_complex(variable: Any) -> bool:
    return np.issubdtype(variable.aval.dtype, np.complexfloating)


def _equation(equation: Any) -> Work:
    name = equation.primitive.name
    parameters = equation.params
    if name in _FREE:
        return Work(0.0, 0.0, 0.0)
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        each = 8 if _is_complex(equation.outvars[0]) else 2
        return Work(0.0, float(each * depth * _size(equation.outvars[0])), 0.0)
    if name == "fft":
        points = math.prod(parameters["fft_lengths"])
        real = parameters["fft_type"] in (jax.lax.FftType.RFFT, jax.lax.FftType.IRFFT)
        # The transformed axes are whole on the longer side (a real FFT keeps half of one).
        total = max(_size(equation.invars[0]), _size(equation.outvars[0]))
        # The split-radix leading term, halved for real data.
        per_number = (2 if real else 4) * math.log2(max(points, 2))
        return Work(total * per_number, 0.0, 0.0)
    if name in _REDUCE:
        each = 2 if _is_complex(equation.invars[0]) else 1
        return Work(float(each * _size(equation.invars[0])), 0.0, 0.0)
    if name == "integer_pow":
        power = abs(int(parameters["y"]))
        multiplications = max(power.bit_length() + power.bit_count() - 2, 1)
        return Work(float(multiplications * _size(equation.outvars[0])), 0.0, 0.0)
    if name == "while":
        raise NotImplementedError(
            "count cannot know the trip count of a while loop; use scan or a static fori_loop."
        )
    if name == "cond":
        branches = [_jaxpr(branch.jaxpr) for branch in parameters["branches"]]
        return max(branches, key=lambda work: work.flops)
    inner = [
        value
        for key, value in parameters.items()
        if key in ("jaxpr", "call_jaxpr", "fun_jaxpr") and value is not None
    ]
    if inner:
        work = _jaxpr(getattr(inner[0], "jaxpr", inner[0]))
        times = float(parameters["length"]) if name == "scan" else 1.0
        return Work(times * work.vector, times * work.matrix, 0.0)
    if name == "pallas_call":
        raise NotImplementedError("count does not look into Pallas kernels; count the XLA form.")
    output = equation.outvars[0]
    if not np.issubdtype(output.aval.dtype, np.inexact):
        return Work(0.0, 0.0, 0.0)
    each = _COMPLEX.get(name, 6) if _is_complex(output) else 1
    return Work(float(each * _size(output)), 0.0, 0.0)


def _jaxpr(jaxpr: Any) -> Work:
    total = Work(0.0, 0.0, 0.0)
    for equation in jaxpr.eqns:
        total = total + _equation(equation)
    return total


def count(function: Callable[..., Any], *args: Any) -> Work:
    """Count the floating-point work of a traced function and the bytes it must move.

    An elementwise operation on n numbers counts n (transcendentals too: a lower bound), a matrix
    product 2mnk, a real FFT 2n log2 n per row, a complex product 6, a loop its trip count times
    its body. Data movement and integer work count nothing; the bytes are those of the arguments
    and results.

    Args:
        function: any traceable function without Pallas calls and open-ended loops.
        *args: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The counted work.

    Raises:
        NotImplementedError: the program has a while loop or a Pallas call.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
        >>> work = count(lambda x: jnp.sum((x @ x.T) ** 2), x)
        >>> work.matrix, work.vector, work.bytes
        (256.0, 32.0, 132.0)
    """
    closed = jax.make_jaxpr(function)(*args)
    moved = [*closed.in_avals, *closed.out_avals]
    traffic = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in moved)
    work = _jaxpr(closed.jaxpr)
    return Work(work.vector, work.matrix, float(traffic))


def least_time(work: Work, device: str) -> tuple[float, str]:
    """Least seconds for `work` on a named device, and what bounds it.

    On a TPU vector and matrix units run side by side, so the longest of the three times counts;
    on a GPU float32 products share the units of elementwise work ("compute").

    Args:
        work: counted work.
        device: a key of `DEVICES`.

    Returns:
        Seconds, and "vector", "matrix", "compute" or "memory".

    Raises:
        ValueError: unknown device.

    Example:
        >>> least_time(Work(vector=0.0, matrix=0.0, bytes=4.8e9), "h200")
        (0.001, 'memory')
    """
    _checks.check_choice("device", device, DEVICES)
    peak = DEVICES[device]
    vector, matrix = work.vector / peak.vector, work.matrix / peak.matrix
    times = {"compute": vector + matrix} if peak.one_unit else {"vector": vector, "matrix": matrix}
    times["memory"] = work.bytes / peak.bandwidth
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound
