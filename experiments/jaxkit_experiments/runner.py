"""Runs an experiment in its folder: arm by arm, resumable, then table, claims and plots."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxkit._checks import check_choice
from jaxkit_experiments import runfolder
from jaxkit_experiments.environment import environment
from jaxkit_experiments.experiment import Context, Experiment, Results, Verdict
from jaxkit_experiments.runfolder import RunError, RunWarning, read_json, write_json

__all__ = ["Run", "run_experiment"]

_STYLES = {"held": "bold green", "not held": "bold red", "not testable": "yellow"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its folder, results, a verdict for each claim, and summary.json."""

    folder: Path
    results: Results
    verdicts: tuple[Verdict, ...]
    summary: Mapping[str, Any]


def run_experiment(
    experiment: Experiment,
    config: Any,
    out: str | Path,
    *,
    preset: str = "",
    data: str | Path | None = None,
    fresh: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    console: Console | None = None,
) -> Run:
    """Run every arm of `config`, or what is left of them, and write the run folder.

    Arms that are done are read back; within an arm the trainer resumes from its last good
    checkpoint. A finished run is shown again and nothing is computed.

    Args:
      experiment: what to run.
      config: an instance of its `config_class`.
      out: run folder.
      preset: the config's name, for the record.
      data: path of a real data set.
      fresh: empty the run folder first.
      mesh: devices for the trainer.
      console: where to print; by default standard output.

    Raises:
      ValueError: the config has an unknown arm, or none.
      RunLocked: another process runs in this folder.
      RunError: the folder holds a run with another config.

    Example:
      >>> import dataclasses, io, tempfile
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     seeds: tuple[int, ...] = (0, 1)
      ...     arms: tuple[str, ...] = ("fair", "loaded")
      >>> class Coin(Experiment):
      ...     name, title, config_class = "coin", "Heads", Config
      ...
      ...     def run_arm(self, config, arm, ctx):
      ...         bias = {"fair": 0.5, "loaded": 0.9}[arm]
      ...         draws = [np.random.default_rng(seed).random(100) for seed in config.seeds]
      ...         return {"heads": [float(np.mean(draw < bias)) for draw in draws]}
      >>> quiet = Console(file=io.StringIO())
      >>> run = run_experiment(Coin(), Config(), tempfile.mkdtemp(), console=quiet)
      >>> run.results.mean("loaded", "heads") > 0.8
      True
    """
    console = Console() if console is None else console
    main = jax.process_index() == 0
    if not config.arms:
        raise ValueError("arms must name at least one arm; got none.")
    for arm in config.arms:
        check_choice("arms", arm, experiment.arms or config.arms)
    folder = Path(out)
    identity = {
        "experiment": experiment.name,
        "data": None if data is None else str(data),
        "config": dataclasses.asdict(config),
    }
    with _reporting(console if main else Console(quiet=True)):
        if not main:
            console = Console(quiet=True)
            _barrier("run folder")
            return _run(experiment, config, folder, data, mesh, console, preset, writes=False)
        with runfolder.lock(folder):
            _claim_folder(folder, identity, preset, fresh)
            _barrier("run folder")
            if (folder / "summary.json").exists():
                return _show_again(experiment, config, folder, console)
            return _run(experiment, config, folder, data, mesh, console, preset, writes=True)


def _run(
    experiment: Experiment,
    config: Any,
    folder: Path,
    data: str | Path | None,
    mesh: jax.sharding.Mesh | None,
    console: Console,
    preset: str,
    *,
    writes: bool,
) -> Run:
    path = None if data is None else Path(data)
    done = {arm: _stored_arm(folder, arm) for arm in config.arms}
    _barrier("arms read")
    arms: dict[str, Mapping[str, list[float]]] = {}
    seconds: dict[str, float] = {}
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    console.print(
        f"[bold]{escape(experiment.title)}[/]  "
        f"({experiment.name}{f', preset {preset}' if preset else ''}, {len(config.arms)} arms, "
        f"{len(config.seeds)} seeds, {jax.devices()[0].device_kind}) in {escape(str(folder))}",
        highlight=False,
        soft_wrap=True,
    )
    with bars:
        context = Context(folder, data=path, mesh=mesh, console=console, bars=bars, writes=writes)
        total = bars.add_task("arms", total=len(config.arms), shown="")
        for arm in config.arms:
            stored = done[arm]
            if stored is None:
                started = time.perf_counter()
                if writes:
                    # What an interrupted run logged of this arm is logged again.
                    context.metric_log.drop(arm=arm)
                measured = experiment.run_arm(config, arm, context.for_arm(arm))
                arms[arm] = _check_metrics(arm, measured, len(config.seeds))
                seconds[arm] = time.perf_counter() - started
                if writes:
                    write_json(
                        context.arm_dir(arm) / "result.json",
                        {"metrics": arms[arm], "seconds": seconds[arm]},
                    )
            else:
                arms[arm], seconds[arm] = stored
            bars.advance(total)
            results = Results(config, arms)
            shown = "  ".join(
                f"{name} {_cell(results, arm, name)}" for name in _columns(experiment, results, arm)
            )
            how = "done before" if stored is not None else f"{seconds[arm]:.1f} s"
            console.print(f"  {escape(arm)}: {shown}  ({how})", highlight=False, soft_wrap=True)
    results = Results(config, arms)
    verdicts = tuple(claim.judge(results) for claim in experiment.claims)
    # Both read what the arms have kept, which another process may still be writing.
    plots = experiment.plot(results, context) if writes else []
    epilogue = experiment.epilogue(results, context) if writes else None
    summary = {
        "experiment": experiment.name,
        "title": experiment.title,
        "description": experiment.description,
        "sources": list(experiment.sources),
        "preset": preset,
        "seeds": list(config.seeds),
        "seconds": seconds,
        "columns": _columns(experiment, results),
        "arms": arms,
        "paper": experiment.paper,
        "paper_note": experiment.paper_note,
        "claims": [
            {"text": claim.text, "source": claim.source} | dataclasses.asdict(verdict)
            for claim, verdict in zip(experiment.claims, verdicts, strict=True)
        ],
        "plots": [_inside(plot, folder) for plot in plots],
        "epilogue": epilogue,
    }
    if writes:
        write_json(folder / "summary.json", summary)
    _print_outcome(experiment, results, verdicts, summary, folder, console)
    return Run(folder, results, verdicts, summary)


def _show_again(experiment: Experiment, config: Any, folder: Path, console: Console) -> Run:
    summary = read_json(folder / "summary.json")
    results = Results(
        config,
        {
            arm: {name: [float(value) for value in values] for name, values in metrics.items()}
            for arm, metrics in summary["arms"].items()
        },
    )
    verdicts = tuple(Verdict(claim["status"], claim["detail"]) for claim in summary["claims"])
    console.print(
        f"[bold]{escape(experiment.title)}[/] was finished before; --fresh runs it anew.",
        highlight=False,
        soft_wrap=True,
    )
    _print_outcome(experiment, results, verdicts, summary, folder, console)
    return Run(folder, results, verdicts, summary)


def _claim_folder(folder: Path, identity: Mapping[str, Any], preset: str, fresh: bool) -> None:
    """Make the folder this run's: empty it, or see that it holds the same run."""
    if fresh:
        runfolder.clear(folder)
    path = folder / "config.json"
    here = environment()
    if path.exists():
        stored = read_json(path)
        stored = stored if isinstance(stored, dict) else {}
        differences = _differences(
            {key: stored.get(key) for key in identity}, runfolder.plain(identity)
        )
        if differences:
            raise RunError(
                f"{folder} holds a run with {'; '.join(differences)}. Use --fresh to replace it, "
                "or another --out."
            )
        if (folder / "summary.json").exists():
            return
        first = folder / "environment.json"
        past = read_json(first) if first.exists() else here
        if past is not here:
            past["resumed"] = [*past.get("resumed", []), here]
        write_json(first, past)
        return
    if runfolder.contents(folder):
        raise RunError(f"{folder} is not empty and not a run folder; choose another --out.")
    # config.json first: it is what makes the folder a run's, should this be killed in between.
    write_json(path, dict(identity) | {"preset": preset})
    write_json(folder / "environment.json", here)


def _differences(stored: Any, wanted: Any, name: str = "") -> list[str]:
    """`steps 400 instead of 800`, for each field that differs."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            text
            for key in dict.fromkeys([*wanted, *stored])
            for text in _differences(stored.get(key), wanted.get(key), f"{name}.{key}".strip("."))
        ]
    if stored == wanted:
        return []
    return [f"{name.removeprefix('config.')} {stored!r} instead of {wanted!r}"]


def _stored_arm(folder: Path, arm: str) -> tuple[dict[str, list[float]], float] | None:
    """The result of an arm that is done, or None."""
    path = folder / "arms" / arm / "result.json"
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        metrics = {
            str(name): [float(value) for value in values]
            for name, values in stored["metrics"].items()
        }
        return metrics, float(stored["seconds"])
    except (RunError, KeyError, TypeError, ValueError, AttributeError):
        warnings.warn(f"{path} is corrupt; the arm is run again.", RunWarning, stacklevel=2)
        return None


def _check_metrics(arm: str, measured: Any, seeds: int) -> dict[str, list[float]]:
    metrics = {
        name: np.asarray(values, np.float64).reshape(-1).tolist()
        for name, values in measured.items()
    }
    for name, values in metrics.items():
        if len(values) != seeds:
            raise ValueError(
                f"metric {name!r} of arm {arm!r} must have one value for each of {seeds} seeds; "
                f"got {len(values)}."
            )
    return metrics


def _columns(experiment: Experiment, results: Results, arm: str | None = None) -> list[str]:
    """The metrics to show, in order, of an arm or of all."""
    arms = results.arms if arm is None else (arm,)
    there = list(dict.fromkeys(name for each in arms for name in results.metrics(each)))
    return [name for name in experiment.columns or there if name in there]


def _cell(results: Results, arm: str, name: str) -> str:
    if not results.has(arm, name):
        return "–"
    mean = format_number(results.mean(arm, name))
    spread = results.spread(arm, name)
    return f"{mean} ± {spread:.2g}" if spread else mean


def format_number(value: float) -> str:
    """Four digits, without an exponent where that is as short.

    Example:
      >>> format_number(0.12345), format_number(1234567.0), format_number(1e-7)
      ('0.1235', '1.235e+06', '1e-07')
    """
    return f"{value:.4g}"


def _print_outcome(
    experiment: Experiment,
    results: Results,
    verdicts: tuple[Verdict, ...],
    summary: Mapping[str, Any],
    folder: Path,
    console: Console,
) -> None:
    columns = _columns(experiment, results)
    paper = {
        name
        for name in columns
        if any(name in experiment.paper.get(arm, {}) for arm in results.arms)
    }
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for name in columns:
        table.add_column(escape(name), justify="right")
        if name in paper:
            table.add_column("paper", justify="right", style="dim")
    for arm in results.arms:
        cells = []
        for name in columns:
            cells.append(_cell(results, arm, name))
            if name in paper:
                value = experiment.paper.get(arm, {}).get(name)
                cells.append("–" if value is None else format_number(value))
        table.add_row(escape(arm), *cells)
    console.print()
    # A number that is cut says nothing: a table wider than the terminal goes on in its next line.
    table.width = console.measure(table, options=console.options.update(width=10_000)).maximum
    console.print(table, crop=False)
    if len(results.config.seeds) > 1:
        console.print(f"mean ± standard deviation over {len(results.config.seeds)} seeds")
    if paper and experiment.paper_note:
        console.print(escape(experiment.paper_note), highlight=False, soft_wrap=True)
    if verdicts:
        console.print("\n[bold]Claims[/]")
    for claim, verdict in zip(experiment.claims, verdicts, strict=False):
        console.print(
            f"  [{_STYLES[verdict.status]}]{verdict.status}[/]: {escape(claim.text)} "
            f"[dim]({escape(claim.source)})[/]"
            + (f"\n    {escape(verdict.detail)}" if verdict.detail else ""),
            highlight=False,
            soft_wrap=True,
        )
    if summary["epilogue"]:
        console.print("\n" + escape(summary["epilogue"]), highlight=False, soft_wrap=True)
    names = [*summary["plots"], "summary.json"]
    console.print(
        f"\nin {escape(str(folder))}: {escape(', '.join(names))}", highlight=False, soft_wrap=True
    )


def _inside(path: Path, folder: Path) -> str:
    return Path(path).absolute().relative_to(folder.absolute()).as_posix()


@contextmanager
def _reporting(console: Console) -> Iterator[None]:
    """Print faults that were worked around as lines of their own, above the progress bars."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RunWarning)
        show = warnings.showwarning

        def report(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, RunWarning):
                console.print(
                    f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True
                )
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = report
        yield


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
