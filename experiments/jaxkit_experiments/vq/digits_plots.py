"""Plots of the quantizers on the digits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxkit_experiments.experiment import Context, Results
from jaxkit_experiments.plots import figure

__all__ = ["plot_codes", "plot_images", "plot_training", "style"]

_COLORS = {"ste": "C0", "rotation": "C3", "unscaled": "C1", "reflection": "C4"}
_OWN_COLORS = {"simvq": "C2", "gumbel": "C5", "fsq": "k", "lfq": "C7"}
_STYLES = {"ema": "-", "loss": "--", "kmeans": ":", "scaled": "-."}


def style(arm: str) -> dict[str, str]:
    """Colour by estimator, line by codebook.

    Example:
      >>> style("rotation-loss")
      {'color': 'C3', 'linestyle': '--'}
    """
    estimator, _, codebook = arm.partition("-")
    color = _COLORS.get(estimator) or _OWN_COLORS.get(arm, "C9")
    return {"color": color, "linestyle": _STYLES.get(codebook, "-")}


def plot_training(results: Results, ctx: Context, metric: str, path: Path) -> Path:
    """One metric on the test set over training: mean over the seeds."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    with figure(path, figsize=(7.4, 4.2)) as axis:
        for arm in results.arms:
            points = [
                (record["step"], float(np.mean(record[metric])))
                for record in ctx.history(arm)
                if record.get("split") == "evaluation" and metric in record
            ]
            if points:
                axis.plot(*zip(*points, strict=True), label=arm, **style(arm))
        axis.set_xlabel("step")
        axis.set_title(f"{metric} on the test set", fontsize=10)
        if metric == "mse":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            axis.set_ylim(0, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return path


def plot_codes(kept: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> Path:
    """How often each code occurs in the test set, most frequent first, a panel for each arm."""
    columns = min(4, len(kept))
    rows = -(-len(kept) // columns)
    with figure(
        path, rows=rows, columns=columns, figsize=(2.9 * columns, 2.1 * rows), squeeze=False
    ) as axes:
        panels = axes.ravel()
        for axis in panels[len(kept) :]:
            axis.set_axis_off()
        for axis, (arm, arrays) in zip(panels, kept.items(), strict=False):
            counts = arrays["counts"]
            share = np.sort(counts / counts.sum(1, keepdims=True), axis=1)[:, ::-1].mean(0)
            axis.stairs(share, fill=True, color="C0")
            axis.axhline(1 / len(share), color="gray", lw=0.8, linestyle=":")
            used = np.mean((counts > 0).sum(1))
            axis.set_title(f"{arm}: {used:.0f} of {len(share)} in use", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("code, by frequency", fontsize=8)
    return path


def plot_images(kept: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> Path:
    """Test images in the first row, below them what each arm's first seed makes of them."""
    originals = next(iter(kept.values()))["images"]
    rows = {"image": originals, **{arm: arrays["rebuilt"] for arm, arrays in kept.items()}}
    count, height, width, channels = originals.shape
    gap = 1
    canvas = np.ones((len(rows) * (height + gap) - gap, count * (width + gap) - gap, channels))
    for row, pictures in enumerate(rows.values()):
        for column, picture in enumerate(pictures):
            top, left = row * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = np.clip(picture, 0, 1)
    with figure(path, figsize=(6.4, 0.55 * len(rows))) as axis:
        options = {"cmap": "gray", "vmin": 0, "vmax": 1} if channels == 1 else {}
        axis.imshow(canvas.squeeze(-1) if channels == 1 else canvas, aspect="auto", **options)
        middles = [row * (height + gap) + (height - 1) / 2 for row in range(len(rows))]
        axis.set_yticks(middles, list(rows), fontsize=8)
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return path
