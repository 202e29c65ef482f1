"""`jaxkit bench ssm`: the state-space kernels against tutorial forms and against the device.

Five parts, all in one process: time of the DPLR kernel against the broadcast complex form, its
temporary memory, two-level against direct Vandermonde, time per training step against length,
and the roofline of each kernel. A target is judged only at the size it is stated for.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxkit_experiments.speed import measure, peers, roofline
from jaxkit_experiments.speed.bench import Line, Part, command, milliseconds, roofline_rows, run

__all__ = ["Line", "Sizes", "bench", "main"]


@dataclass(frozen=True)
class Sizes:
    """Problem sizes of one run of the benchmark.

    Example:
        >>> FULL.heads, QUICK.judged
        (64, False)
    """

    heads: int = 64
    state: int = 64
    length: int = 4096
    memory_length: int = 16384
    vandermonde_length: int = 16384
    step_heads: int = 16
    step_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    repeats: int = 9
    budget: float = 40.0
    judged: bool = True
    """Whether these are the sizes that the targets are stated for."""


FULL = Sizes()
QUICK = Sizes(
    heads=4,
    state=16,
    length=512,
    memory_length=1024,
    vandermonde_length=2048,
    step_heads=4,
    step_lengths=(256, 512, 1024),
    repeats=3,
    budget=5.0,
    judged=False,
)


def _with_vjp(form: Callable[..., Any]) -> Callable[..., Any]:
    def both(params: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(form, params)
        return out, pull(cotangent)

    return both


def _difference(one: Any, other: Any) -> float:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.max(np.abs(one - other)) / np.max(np.abs(other)))


def _race(
    forms: Mapping[str, Callable[..., Any]], params: Any, shape: tuple[int, int], sizes: Sizes
) -> dict[str, dict[str, measure.Timing]]:
    """Forward, and forward with VJP, of several forms on the same parameters."""
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    forward = {name: partial(jax.jit(form), params) for name, form in forms.items()}
    backward = {
        name: partial(jax.jit(_with_vjp(form)), params, cotangent) for name, form in forms.items()
    }
    return {
        "forward": measure.compare(forward, repeats=sizes.repeats, budget=sizes.budget),
        "forward+vjp": measure.compare(backward, repeats=sizes.repeats, budget=sizes.budget),
    }


def _kernel_params(params: dict[str, Any]) -> dict[str, Any]:
    # What the kernels are functions of; the real-basis output map is power iteration's.
    return {name: params[name] for name in ("lam_re", "lam_im", "p", "b", "ct", "log_step")}


def dplr_speed(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """Our DPLR kernel against the jitted broadcast complex form, forward and with VJP."""
    problem = peers.s4_problem(sizes.heads, sizes.state, sizes.length)
    params = _kernel_params(peers.cast(problem))
    forms = {
        "broadcast": partial(peers.dplr_broadcast, length=sizes.length),
        "fused": partial(peers.dplr_fused, length=sizes.length),
        "tutorial": partial(peers.dplr_broadcast, length=sizes.length, half=False),
    }
    difference = _difference(forms["broadcast"](params), jax.jit(forms["fused"])(params))
    timings = _race(forms, params, (sizes.heads, sizes.length), sizes)
    size = f"H={sizes.heads} N={sizes.state} L={sizes.length}"
    lines = []
    for part, least in (("forward", 6.0), ("forward+vjp", 4.0)):
        race = timings[part]
        lines.append(
            Line(
                f"DPLR {part}, {size}",
                measure.speedup(race["broadcast"], race["fused"]),
                "x",
                milliseconds(race),
                least=least,
            )
        )
        lines.append(
            Line(
                f"DPLR {part} against the tutorial's L nodes",
                measure.speedup(race["tutorial"], race["fused"]),
                "x",
                "all L nodes and a complex inverse transform",
            )
        )
    lines.append(
        Line("DPLR forms, largest difference", difference, "", "of the largest |K|", most=1e-2)
    )
    return lines, timings


def dplr_memory(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """Temporary bytes of the compiled DPLR kernel against one tenth of an [H, N, L] array."""
    length = sizes.memory_length
    problem = peers.s4_problem(sizes.heads, sizes.state, length, derive_c_tilde=False)
    params = _kernel_params(peers.cast(problem))
    cotangent = jax.ShapeDtypeStruct((sizes.heads, length), jnp.float32)
    limit = sizes.heads * sizes.state * length * 4 / 10
    lines, record = [], {}
    forms = {
        "fused": partial(peers.dplr_fused, length=length),
        "broadcast": partial(peers.dplr_broadcast, length=length),
    }
    for name, form in forms.items():
        plans = {
            "forward": measure.measure_memory(form, params),
            "forward+vjp": measure.measure_memory(_with_vjp(form), params, cotangent),
        }
        record[name] = plans
        for part, plan in plans.items():
            if plan is None:
                continue
            target = limit / 1e6 if name == "fused" else None
            lines.append(
                Line(
                    f"DPLR {name} {part} temporaries, H={sizes.heads} N={sizes.state} L={length}",
                    plan.temp / 1e6,
                    "MB",
                    f"{plan.temp / (10 * limit):.3f} of an [H, N, L] array",
                    most=target,
                )
            )
    return lines, record


def vandermonde_speed(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """The two-level Vandermonde kernel against the direct broadcast."""
    length = sizes.vandermonde_length
    problem = peers.s4_problem(sizes.heads, sizes.state, length, derive_c_tilde=False)
    params = peers.vandermonde_operands(problem)
    forms = {
        "direct": partial(peers.vandermonde_direct, length=length),
        "two-level": partial(peers.vandermonde_two_level, length=length),
    }
    difference = _difference(jax.jit(forms["direct"])(params), jax.jit(forms["two-level"])(params))
    timings = _race(forms, params, (sizes.heads, length), sizes)
    size = f"H={sizes.heads} N={sizes.state} L={length}"
    lines = [
        Line(
            f"Vandermonde {part}, {size}",
            measure.speedup(race["direct"], race["two-level"]),
            "x",
            milliseconds(race),
            least=3.0 if part == "forward" else None,
        )
        for part, race in timings.items()
    ]
    lines.append(
        Line(
            "Vandermonde forms, largest difference", difference, "", "of the largest |K|", most=1e-3
        )
    )
    return lines, timings


def _training_step(heads: int, state: int, length: int) -> Callable[[], Any]:
    """A jitted step (loss, gradients, Adam) of one S4 layer on one sequence."""
    import optax
    from flax import nnx

    from jaxkit.ssm.layers import S4

    layer = S4(heads, state_size=state, l_max=length, rngs=nnx.Rngs(0))
    parts: Any = nnx.split(layer, nnx.Param, ...)
    graph, params, rest = parts
    optimizer = optax.adam(1e-3)
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((1, length, heads)), jnp.float32)
    targets = jnp.asarray(rng.standard_normal((1, length, heads)), jnp.float32)

    def loss(params: Any) -> Any:
        outputs = nnx.merge(graph, params, rest)(inputs)
        return jnp.mean((outputs - targets) ** 2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    return partial(step, params, optimizer.init(params))


def step_scaling(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """Seconds per training step of the S4 layer against the sequence length."""
    steps = {
        str(length): _training_step(sizes.step_heads, sizes.state, length)
        for length in sizes.step_lengths
    }
    timings = measure.compare(steps, repeats=max(3, sizes.repeats // 2 + 1), budget=sizes.budget)
    slope = measure.fit_slope(
        sizes.step_lengths, [timings[str(length)].median for length in sizes.step_lengths]
    )
    lines = [
        Line(
            f"S4 training step, slope of log time in log L, H={sizes.step_heads} N={sizes.state}",
            slope,
            "",
            milliseconds({f"L={name}": timing for name, timing in timings.items()}),
            most=1.15,
        )
    ]
    return lines, {"lengths": list(sizes.step_lengths), "slope": slope, **timings}


def kernel_work(sizes: Sizes) -> dict[str, roofline.Work]:
    """Counted work of each kernel, forward and with VJP, from its XLA form."""
    problem = peers.s4_problem(sizes.heads, sizes.state, 1, derive_c_tilde=False)
    forms: dict[str, tuple[Callable[..., Any], Any, int]] = {
        "DPLR": (peers.dplr_fused, _kernel_params(peers.cast(problem)), sizes.length),
        "Vandermonde": (
            peers.vandermonde_two_level,
            peers.vandermonde_operands(problem),
            sizes.vandermonde_length,
        ),
    }
    work = {}
    for name, (form, params, length) in forms.items():
        cotangent = jax.ShapeDtypeStruct((sizes.heads, length), jnp.float32)
        form = partial(form, length=length, implementation="xla")
        work[f"{name} forward"] = roofline.count(form, params)
        work[f"{name} forward+vjp"] = roofline.count(_with_vjp(form), params, cotangent)
    return work


PARTS: dict[str, Part] = {
    "dplr": dplr_speed,
    "memory": dplr_memory,
    "vandermonde": vandermonde_speed,
    "step": step_scaling,
}


def _rooflines(sizes: Sizes, details: Mapping[str, Any]) -> list[dict[str, Any]]:
    measured: dict[str, float] = {}
    for label, part, form in (
        ("DPLR", "dplr", "fused"),
        ("Vandermonde", "vandermonde", "two-level"),
    ):
        for direction, race in details.get(part, {}).items():
            measured[f"{label} {direction}"] = race[form].median
    return roofline_rows(kernel_work(sizes), measured)


def bench(
    sizes: Sizes = FULL,
    *,
    parts: Sequence[str] = (*PARTS, "roofline"),
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the benchmark and print its tables.

    Args:
        sizes: problem sizes; targets count only where `sizes.judged`.
        parts: which of "dplr", "memory", "vandermonde", "step", "roofline".
        console: where to print; standard output by default.

    Returns:
        The record that `main` writes as JSON: environment, sizes, lines, timings, roofline.

    Example:
        >>> import io
        >>> record = bench(QUICK, parts=(), console=Console(file=io.StringIO()))
        >>> record["benchmark"], record["lines"]
        ('ssm', [])
    """
    return run("ssm", sizes, PARTS, chosen=parts, rooflines=_rooflines, console=console)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `jaxkit bench ssm [--quick] [--parts ...] [--out FILE]`.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        Exit status: 0 when everything ran, whatever the numbers say.
    """
    parser, finish = command(
        "ssm",
        "State-space kernels against tutorial forms and against the device's limit.",
        (*PARTS, "roofline"),
    )
    options = parser.parse_args(argv)
    return finish(options, partial(bench, QUICK if options.quick else FULL))


if __name__ == "__main__":
    sys.exit(main())
