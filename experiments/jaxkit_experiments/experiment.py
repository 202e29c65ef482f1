"""What an experiment is: a config with presets, arms, metrics over seeds, and claims.

A subclass of `Experiment` is a whole ablation in one file. Its `run_arm` gives every metric as one
value per seed; its claims are sentences with a predicate on the results; the runner does the rest
(run folder, resume by arm, table, verdicts, summary).
"""

from __future__ import annotations

import abc
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

from jaxkit._checks import check_choice
from jaxkit_experiments.runfolder import MetricLog, disk_errors

__all__ = ["Claim", "Context", "Experiment", "MissingResult", "Results", "Task", "Verdict"]

STATUSES = ("held", "not held", "not testable")


class MissingResult(KeyError):
    """An arm that was not run, or a metric without a value; a claim on it is not testable."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a claim held: "held", "not held" or "not testable", and the numbers that say so.

    Example:
      >>> Verdict.of(0.9 > 0.8, "0.900 against 0.800").status
      'held'
    """

    status: Literal["held", "not held", "not testable"]
    detail: str = ""

    def __post_init__(self) -> None:
        check_choice("status", self.status, STATUSES)

    @classmethod
    def of(cls, condition: Any, detail: str = "") -> Verdict:
        """ "held" if `condition` is true, else "not held"."""
        return cls("held" if condition else "not held", detail)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence, where it was claimed, and a predicate on the results with its tolerance."""

    text: str
    source: str
    check: Callable[[Results], Verdict]

    def judge(self, results: Results) -> Verdict:
        """The verdict; "not testable" when the arms or values that it needs are not there."""
        try:
            return self.check(results)
        except MissingResult as missing:
            return Verdict("not testable", str(missing))


class Results:
    """Read-only view of what a run measured: for each arm, each metric's values over the seeds.

    Args:
      config: the run's config.
      arms: arm to metric to values, one per seed.

    Example:
      >>> results = Results(None, {"gru": {"accuracy": [0.5, 0.7]}})
      >>> results.mean("gru", "accuracy"), results.has("lstm", "accuracy")
      (0.6, False)
    """

    def __init__(self, config: Any, arms: Mapping[str, Mapping[str, Sequence[float]]]):
        self.config = config
        self._arms = {
            arm: {name: np.asarray(values, np.float64).reshape(-1) for name, values in of.items()}
            for arm, of in arms.items()
        }

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that were run, in their order."""
        return tuple(self._arms)

    def metrics(self, arm: str) -> tuple[str, ...]:
        """The names of an arm's metrics."""
        return tuple(self._arm(arm))

    def metric(self, arm: str, name: str) -> np.ndarray:
        """A metric's values over the seeds, without those that are NaN.

        Raises:
          MissingResult: the arm was not run, or every value is NaN.
          KeyError: no arm measured such a metric; the message names those there are.
        """
        of = self._arm(arm)
        if name not in of:
            everywhere = sorted({name for of in self._arms.values() for name in of})
            kind = MissingResult if name in everywhere else KeyError
            raise kind(f"arm {arm!r} has no metric {name!r}; it has {', '.join(of) or 'none'}.")
        values = of[name][~np.isnan(of[name])]
        if not values.size:
            raise MissingResult(f"metric {name!r} of arm {arm!r} has no value but NaN.")
        return values

    def mean(self, arm: str, name: str) -> float:
        """Mean of a metric over the seeds."""
        return float(np.mean(self.metric(arm, name)))

    def spread(self, arm: str, name: str) -> float:
        """Sample standard deviation over the seeds; 0 for a single seed, NaN with infinities."""
        values = self.metric(arm, name)
        if not np.isfinite(values).all():
            return float("nan")
        if np.all(values == values[0]):
            return 0.0  # not the rounding of a mean
        return float(np.std(values, ddof=1))

    def has(self, arm: str, name: str) -> bool:
        """Whether the arm was run and the metric has a value."""
        values = self._arms.get(arm, {}).get(name)
        return values is not None and not bool(np.all(np.isnan(values)))

    def _arm(self, arm: str) -> Mapping[str, np.ndarray]:
        if arm not in self._arms:
            raise MissingResult(
                f"arm {arm!r} was not run (there are: {', '.join(self._arms) or 'none'})."
            )
        return self._arms[arm]


class Task:
    """One line of the progress display. `advance` and `update` also take what the line shows."""

    def __init__(self, progress: Progress | None, task: TaskID | None):
        self._progress, self._task = progress, task

    def advance(self, steps: float = 1, **shown: Any) -> None:
        """Move on by `steps`; `shown` values such as `loss=0.3` stand beside the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=steps, shown=_show(shown))

    def update(self, completed: float, **shown: Any) -> None:
        """Move to `completed` steps."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=completed, shown=_show(shown))


def _show(values: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


@dataclasses.dataclass
class Context:
    """What an arm may use of its run: folder, metric log, progress, mesh and console.

    Attributes:
      run_dir: the run's folder.
      arm: the arm that is running, or None outside of one.
      data: path of a real data set, as given by `--data`, or None.
      mesh: devices to train on; None leaves the choice to the trainer.
      console: where to print.
      writes: whether this process writes files (the first of several processes does).

    Example:
      >>> import tempfile
      >>> ctx = Context(Path(tempfile.mkdtemp())).for_arm("gru")
      >>> ctx.log(step=1, loss=0.5)
      >>> ctx.history()
      [{'arm': 'gru', 'step': 1, 'loss': 0.5}]
    """

    run_dir: Path
    arm: str | None = None
    data: Path | None = None
    mesh: jax.sharding.Mesh | None = None
    console: Console = dataclasses.field(default_factory=lambda: Console(file=io.StringIO()))
    bars: Progress | None = None
    writes: bool = True

    def for_arm(self, arm: str) -> Context:
        """The same context inside `arm`."""
        return dataclasses.replace(self, arm=arm)

    def arm_dir(self, arm: str | None = None) -> Path:
        """An arm's folder, by default that of the running arm; it is made if need be."""
        arm = self.arm if arm is None else arm
        if arm is None:
            raise ValueError("arm must be given outside of an arm; got None.")
        folder = self.run_dir / "arms" / arm
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def metric_log(self) -> MetricLog:
        """metrics.jsonl of the run."""
        return MetricLog(self.run_dir / "metrics.jsonl")

    def log(self, **record: Any) -> None:
        """Append a record to metrics.jsonl, with the running arm's name."""
        if self.writes:
            self.metric_log.append(({} if self.arm is None else {"arm": self.arm}) | record)

    def history(self, arm: str | None = None) -> list[dict[str, Any]]:
        """The records of metrics.jsonl of an arm; without one, those of the running arm, or all."""
        arm = self.arm if arm is None else arm
        records = self.metric_log.read()
        return [record for record in records if arm is None or record.get("arm") == arm]

    @contextmanager
    def progress(self, description: str, total: float) -> Iterator[Task]:
        """A progress bar for the body of a `with`: `with ctx.progress("fit", 10) as task: ...`."""
        if self.bars is None:
            yield Task(None, None)
            return
        task = self.bars.add_task(description, total=total, shown="")
        try:
            yield Task(self.bars, task)
        finally:
            self.bars.remove_task(task)

    def save_arrays(self, name: str, **arrays: Any) -> None:
        """Keep arrays in the run folder under `name`, for plots and for a resumed run."""
        if not self.writes:
            return
        path = self.run_dir / "arrays" / f"{name}.npz"
        temporary = path.with_name(f".{name}.{os.getpid()}.tmp.npz")
        try:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                held: dict[str, Any] = {key: np.asarray(value) for key, value in arrays.items()}
                np.savez_compressed(temporary, **held)
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays kept under `name`.

        Raises:
          KeyError: there are none; the message names those there are.
        """
        path = self.run_dir / "arrays" / f"{name}.npz"
        if not path.exists():
            there = sorted(item.stem for item in path.parent.glob("[!.]*.npz"))
            raise KeyError(f"no arrays {name!r} in {self.run_dir}; there are {there}.")
        with np.load(path) as stored:
            return dict(stored)


class Experiment(abc.ABC):
    """One ablation. Subclasses set the class attributes and write `run_arm`.

    Attributes:
      name: as on the command line, such as "s4-digits".
      title: one line.
      description: what is compared, on what, in a few sentences.
      sources: papers and posts.
      config_class: frozen dataclass with `seeds: tuple[int, ...]` and `arms: tuple[str, ...]`.
      presets: configs by name; "smoke", "cpu" and "gpu".
      arms: every valid arm; empty leaves the check to the config.
      columns: metrics shown in the table; empty shows all.
      paper: the paper's numbers, arm to metric to value.
      paper_note: what they were measured on, where that is not what is run here.
      claims: what the results are held against.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    description: ClassVar[str] = ""
    sources: ClassVar[tuple[str, ...]] = ()
    config_class: ClassVar[type]
    presets: ClassVar[Mapping[str, Any]]
    arms: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    paper_note: ClassVar[str] = ""
    claims: ClassVar[tuple[Claim, ...]] = ()

    @abc.abstractmethod
    def run_arm(self, config: Any, arm: str, ctx: Context) -> Mapping[str, Sequence[float]]:
        """Run one arm for all seeds; every metric as one value per seed."""

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """Draw into `ctx.run_dir / "plots"` and return the files; by default, training curves."""
        from jaxkit_experiments.plots import training_curves

        return training_curves(ctx)

    def epilogue(self, results: Results, ctx: Context) -> str | None:
        """Text shown after the table and the claims, or None."""
        return None
