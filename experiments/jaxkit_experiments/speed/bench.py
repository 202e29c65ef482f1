"""What the benchmarks share: targets, rooflines, tables, the record and the command line."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxkit_experiments.speed import measure, roofline

__all__ = ["Line", "Part", "command", "milliseconds", "roofline_rows", "run", "show"]


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


Part = Callable[[Any], tuple[list[Line], dict[str, Any]]]
"""From sizes to lines, and details for the record."""


def milliseconds(timings: Mapping[str, measure.Timing]) -> str:
    """The medians in words."""
    return ", ".join(f"{name} {timing.median * 1e3:.3g} ms" for name, timing in timings.items())


def roofline_rows(
    work: Mapping[str, roofline.Work], measured: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Counted work of each kernel, its least time on each device, and the seconds measured here."""
    rows = []
    for name, counted in work.items():
        row: dict[str, Any] = {"kernel": name, **asdict(counted), "flops": counted.flops}
        for device in roofline.DEVICES:
            seconds, bound = roofline.least_time(counted, device)
            row[device] = {"seconds": seconds, "bound": bound}
        row["measured"] = measured.get(name)
        rows.append(row)
    return rows


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


def show(
    name: str, console: Console, lines: Sequence[Line], rows: Sequence[dict[str, Any]], here: str
) -> None:
    """Print the table of lines and, if there are rows, that of the rooflines."""
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


def run(
    name: str,
    sizes: Any,
    parts: Mapping[str, Part],
    *,
    chosen: Sequence[str],
    rooflines: Callable[[Any, Mapping[str, Any]], list[dict[str, Any]]],
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the chosen parts, print their tables and return the record.

    Args:
        name: of the benchmark.
        sizes: a dataclass of problem sizes; targets count only where its `judged` is true.
        parts: name to part, in the order of running.
        chosen: which of `parts`, and "roofline".
        rooflines: from the sizes and the details of the parts to `roofline_rows`.
        console: where to print; standard output by default.

    Returns:
        Environment, sizes, lines, rooflines, and the details of every part.

    Example:
        >>> import io
        >>> from jaxkit_experiments.speed.ssm import QUICK
        >>> quiet = Console(file=io.StringIO())
        >>> run("ssm", QUICK, {}, chosen=(), rooflines=lambda *_: [], console=quiet)["lines"]
        []
    """
    console = console or Console()
    environment = measure.environment()
    lines: list[Line] = []
    details: dict[str, Any] = {}
    for part_name, part in parts.items():
        if part_name not in chosen:
            continue
        with console.status(f"bench {name}: {part_name}"):
            some, details[part_name] = part(sizes)
        if not sizes.judged:
            some = [replace(line, least=None, most=None) for line in some]
        lines += some
    rows: list[dict[str, Any]] = []
    if "roofline" in chosen:
        with console.status(f"bench {name}: roofline"):
            rows = rooflines(sizes, details)
        devices = {device: asdict(limits) for device, limits in roofline.DEVICES.items()}
        details["roofline"] = {"devices": devices}
    here = f"{environment['device']} ({environment['processor']}, {environment['cores']} cores)"
    show(name, console, lines, rows, here)
    return {
        "benchmark": name,
        "environment": environment,
        "dtype": "float32",
        "sizes": asdict(sizes),
        "lines": [{**asdict(line), "target": line.target, "met": line.met} for line in lines],
        "roofline": rows,
        "details": details,
    }


def command(
    name: str, description: str, parts: Sequence[str]
) -> tuple[argparse.ArgumentParser, Callable[[argparse.Namespace, Callable[..., Any]], int]]:
    """The options that all benchmarks take, and how to run with them.

    Args:
        name: of the benchmark.
        description: for `--help`.
        parts: what `--parts` takes.

    Returns:
        The parser, to which options can be added; and a function of the parsed options and of a
        function `(parts, console) -> record`, which writes the record and gives the exit status:
        0 when everything ran, whatever the numbers say.
    """
    parser = argparse.ArgumentParser(prog=f"jaxkit bench {name}", description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes: no target is judged")
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=parts, help="run only these parts"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(f"runs/bench/{name}.json"), help="where the JSON goes"
    )

    def finish(options: argparse.Namespace, bench: Callable[..., Any]) -> int:
        # Wide enough for the tables where the output is a file or a pipe.
        console = Console() if sys.stdout.isatty() else Console(width=140)
        path = measure.write_json(options.out, bench(parts=options.parts, console=console))
        console.print(f"Written: {path}")
        return 0

    return parser, finish
