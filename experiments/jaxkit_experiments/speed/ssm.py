"""`jaxkit bench ssm`: the state-space kernels against tutorial forms and against the device.

Five parts, all in one process: time of the DPLR kernel against the broadcast complex form, its
temporary memory, two-level against direct Vandermonde, time per training step against length,
and the roofline of each kernel. A target is judged only at the size it is stated for.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxkit_experiments.speed import measure, peers, roofline

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


@dataclass(frozen=True)
class Line:
    """One reported number: what, how much, what was wanted and whether it is so.

    Example:
        >>> Line("ratio", 4.0, "x", least=3.0).met
        True
    """

    name: str
    value: float
    unit: str
    detail: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target holds; `None` without a target."""
        if self.least is None and self.most is None:
            return None
        above = self.least is None or self.value >= self.least
        return above and (self.most is None or self.value <= self.most)

    @property
    def target(self) -> str:
        """The target in words."""
        if self.least is not None:
            return f">= {self.least:g}"
        return f"<= {self.most:g}" if self.most is not None else ""


def _with_vjp(form: Callable[..., Any]) -> Callable[..., Any]:
    def both(params: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(form, params)
        return out, pull(cotangent)

    return both


def _difference(one: Any, other: Any) -> float:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.max(np.abs(one - other)) / np.max(np.abs(other)))


def _milliseconds(timings: Mapping[str, measure.Timing]) -> str:
    return ", ".join(f"{name} {timing.median * 1e3:.3g} ms" for name, timing in timings.items())


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
                _milliseconds(race),
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
            _milliseconds(race),
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
            _milliseconds({f"L={name}": timing for name, timing in timings.items()}),
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


def roofline_lines(
    sizes: Sizes, measured: dict[str, float]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Counted work of each kernel, its least time on each device, and the time measured here."""
    rows = []
    for name, work in kernel_work(sizes).items():
        row: dict[str, Any] = {"kernel": name, **asdict(work), "flops": work.flops}
        for device in roofline.DEVICES:
            seconds, bound = roofline.least_time(work, device)
            row[device] = {"seconds": seconds, "bound": bound}
        row["measured"] = measured.get(name)
        rows.append(row)
    return rows, {"devices": {name: asdict(dev) for name, dev in roofline.DEVICES.items()}}


def _this_device() -> str | None:
    kind = jax.devices()[0].device_kind.lower()
    names = {
        "v5 lite": "tpu-v5e",
        "v5e": "tpu-v5e",
        "v6": "tpu-v6e",
        "h100": "h100",
        "h200": "h200",
    }
    return next((device for part, device in names.items() if part in kind), None)


def _show(
    console: Console,
    lines: Sequence[Line],
    rows: Sequence[dict[str, Any]],
    here: str,
    name: str = "ssm",
) -> None:
    table = Table(title=f"jaxkit bench {name}: float32 on {here}", title_justify="left")
    for column in ("measured", "value", "target", "met", "detail"):
        table.add_column(column, justify="right" if column in ("value", "target") else "left")
    marks = {True: "[green]yes[/]", False: "[red]no[/]", None: "-"}
    for line in lines:
        value = f"{line.value:.3g} {line.unit}".strip()
        table.add_row(line.name, value, line.target, marks[line.met], line.detail)
    console.print(table)
    if not rows:
        return
    limits = Table(
        title="Least time by counted work, and what bounds it: vec(tor) or mat(rix) unit, both as "
        "com(pute), or mem(ory)",
        title_justify="left",
    )
    limits.add_column("kernel")
    limits.add_column("Gflop", justify="right")
    limits.add_column("MB", justify="right")
    for device in roofline.DEVICES.values():
        limits.add_column(f"{device.name.removesuffix(' SXM')} µs", justify="right")
    limits.add_column("here µs", justify="right")
    limits.add_column("Gflop/s", justify="right")
    for row in rows:
        cells = [
            f"{row[device]['seconds'] * 1e6:.3g} {row[device]['bound'][:3]}"
            for device in roofline.DEVICES
        ]
        seconds = row["measured"]
        cells.append(f"{seconds * 1e6:.0f}" if seconds else "-")
        rate = f"{row['flops'] / seconds / 1e9:.3g}" if seconds else "-"
        own = _this_device()
        if own and seconds:
            rate += f" ({row[own]['seconds'] / seconds:.0%} of the limit)"
        limits.add_row(
            row["kernel"], f"{row['flops'] / 1e9:.3g}", f"{row['bytes'] / 1e6:.3g}", *cells, rate
        )
    console.print(limits)


PARTS: dict[str, Callable[[Sizes], tuple[list[Line], dict[str, Any]]]] = {
    "dplr": dplr_speed,
    "memory": dplr_memory,
    "vandermonde": vandermonde_speed,
    "step": step_scaling,
}


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
    console = console or Console()
    environment = measure.environment()
    lines: list[Line] = []
    record: dict[str, Any] = {}
    for name, part in PARTS.items():
        if name not in parts:
            continue
        with console.status(f"bench ssm: {name}"):
            some, record[name] = part(sizes)
        if not sizes.judged:
            some = [replace(line, least=None, most=None) for line in some]
        lines += some
    measured: dict[str, float] = {}
    for label, part_name, form in (
        ("DPLR", "dplr", "fused"),
        ("Vandermonde", "vandermonde", "two-level"),
    ):
        for direction, race in record.get(part_name, {}).items():
            measured[f"{label} {direction}"] = race[form].median
    rows: list[dict[str, Any]] = []
    if "roofline" in parts:
        with console.status("bench ssm: roofline"):
            rows, record["roofline"] = roofline_lines(sizes, measured)
    here = f"{environment['device']} ({environment['processor']}, {environment['cores']} cores)"
    _show(console, lines, rows, here)
    return {
        "benchmark": "ssm",
        "environment": environment,
        "dtype": "float32",
        "sizes": asdict(sizes),
        "lines": [{**asdict(line), "target": line.target, "met": line.met} for line in lines],
        "roofline": rows,
        "details": record,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `jaxkit bench ssm [--quick] [--parts ...] [--out FILE]`.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        Exit status: 0 when everything ran, whatever the numbers say.
    """
    parser = argparse.ArgumentParser(
        prog="jaxkit bench ssm",
        description="State-space kernels against tutorial forms and against the device's limit.",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: no target is judged")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=(*PARTS, "roofline"),
        default=(*PARTS, "roofline"),
        help="run only these parts",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/ssm.json"), help="where the JSON goes"
    )
    options = parser.parse_args(argv)
    # Wide enough for the tables where the output is a file or a pipe.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    record = bench(QUICK if options.quick else FULL, parts=options.parts, console=console)
    path = measure.write_json(options.out, record)
    console.print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
