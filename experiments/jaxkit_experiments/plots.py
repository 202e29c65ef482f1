"""Figures that more than one experiment draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxkit_experiments.experiment import Context

__all__ = ["figure", "number_log_ticks", "training_curves"]


@contextmanager
def figure(path: Path, *, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """Axes to draw on, saved to `path` afterwards: `with figure(path) as axes: ...`.

    No display is needed, and no state is left behind in matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = options.pop("figsize", (5.6 * columns, 3.8 * rows))
    drawing = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawing)
    yield drawing.subplots(rows, columns, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.12)


def number_log_ticks(*axes: Any) -> None:
    """Label logarithmic axes (`axis.xaxis`, `axis.yaxis`) by 0.02, 0.05, 0.1, not by powers."""
    for axis in axes:
        axis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def training_curves(ctx: Context, *, name: str = "curve") -> list[Path]:
    """A figure for each metric and split in metrics.jsonl: mean over the seeds and their range.

    Returns:
      The figures, one a file so that they stay readable side by side and on a phone; none if
      there is no training to show.
    """
    curves: dict[tuple[str, str], dict[str, list[tuple[int, np.ndarray]]]] = {}
    for record in ctx.history():
        if "split" not in record:
            continue
        arm = str(record.get("arm") or record["stage"])
        for key, values in record.items():
            if isinstance(values, list) and np.ndim(values) == 1:
                point = record["step"], np.asarray(values, np.float64)
                curves.setdefault((key, record["split"]), {}).setdefault(arm, []).append(point)
    # A single point is no curve.
    shown = {
        panel: arms for panel, arms in curves.items() if max(map(len, arms.values())) > 1
    } or curves
    if not shown:
        return []
    paths = []
    for (metric, split), arms in shown.items():
        file = "".join(c if c.isalnum() else "-" for c in f"{name}-{metric}-{split}")
        paths.append(ctx.run_dir / "plots" / f"{file}.png")
        with figure(paths[-1]) as axis:
            for arm, points in arms.items():
                steps = [step for step, _ in points]
                values = np.stack([value for _, value in points])
                (line,) = axis.plot(steps, values.mean(1), label=arm)
                low, high = values.min(1), values.max(1)
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
            axis.set_xlabel("step")
            axis.set_title(f"{metric} ({split})", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=9)
    return paths
