"""What the weights of the losses change: one at a time is varied, on the digits.

    jaxkit run vq-digits-sweep --preset cpu

Names: `commitment_weight` (on ‖z − sg q‖²) is β in the papers and γ in post 10489, whose β is our
`codebook_weight` (on ‖q − sg z‖²); `decay` is the papers' γ of moving averages.

Sources: kexue.fm 10489; van den Oord et al. 2017 (arXiv 1711.00937); Fifty et al. 2024
(2410.06424); Yu et al. 2023, LFQ (2310.05737).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxkit._checks import check_choice
from jaxkit_experiments.experiment import Claim, Context, MissingResult, Results, Verdict
from jaxkit_experiments.plots import figure
from jaxkit_experiments.vq.digits import Digits, DigitsVQConfig
from jaxkit_experiments.vq.digits_plots import style

__all__ = ["DigitsVQSweep", "DigitsVQSweepConfig"]

# Which weights a kind of arm has.
_EMA_WEIGHTS = ("commitment_weight", "decay")
_LOSS_WEIGHTS = ("commitment_weight", "codebook_weight")
SWEPT: Mapping[str, tuple[str, ...]] = {
    "ste-ema": _EMA_WEIGHTS,
    "rotation-ema": _EMA_WEIGHTS,
    "ste-loss": _LOSS_WEIGHTS,
    "rotation-loss": _LOSS_WEIGHTS,
    "lfq": ("entropy_weight",),
}


@dataclasses.dataclass(frozen=True)
class DigitsVQSweepConfig(DigitsVQConfig):
    """One weight at a time is varied, about the setting of `DigitsVQConfig`.

    Attributes:
      commitment_weights: values of `commitment_weight`, the post's γ and the papers' β.
      codebook_weights: values of `codebook_weight`, the post's β.
      decays: values of `decay`.
      entropy_weights: values of `entropy_weight`.
    """

    arms: tuple[str, ...] = tuple(SWEPT)
    seeds: tuple[int, ...] = (0, 1)
    evaluate_every: int = 100
    commitment_weights: tuple[float, ...] = (0.1, 0.25, 1.0, 2.0)
    codebook_weights: tuple[float, ...] = (0.25, 1.0, 4.0)
    decays: tuple[float, ...] = (0.8, 0.99)
    entropy_weights: tuple[float, ...] = (0.01, 0.1, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for arm in self.arms:
            check_choice("arms", arm, SWEPT)
        for name, values in self.values().items():
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name}s must be growing numbers; got {values!r}.")

    def values(self) -> dict[str, tuple[float, ...]]:
        """The values of each weight.

        Example:
          >>> DigitsVQSweepConfig().values()["decay"]
          (0.8, 0.99)
        """
        return {
            "commitment_weight": self.commitment_weights,
            "codebook_weight": self.codebook_weights,
            "decay": self.decays,
            "entropy_weight": self.entropy_weights,
        }

    def settings(self, arm: str) -> dict[str, dict[str, float]]:
        """What each setting of an arm changes, by a name such as "decay=0.8"; "base" is first.

        Example:
          >>> DigitsVQSweepConfig(entropy_weights=(0.1, 1.0)).settings("lfq")
          {'base': {}, 'entropy_weight=1': {'entropy_weight': 1.0}}
        """
        return {"base": {}} | {
            f"{weight}={value:g}": {weight: value}
            for weight in SWEPT[arm]
            for value in self.values()[weight]
            if value != getattr(self, weight)
        }


def series(results: Results, arm: str, weight: str, metric: str) -> list[tuple[float, float]]:
    """(value, mean of the metric) over the values of one weight."""
    config = results.config
    pairs = []
    for value in config.values()[weight]:
        at = "base" if value == getattr(config, weight) else f"{weight}={value:g}"
        if results.has(arm, f"{metric}[{at}]"):
            pairs.append((value, results.mean(arm, f"{metric}[{at}]")))
    if len(pairs) < 2:
        raise MissingResult(f"arm {arm!r} was not run with two values of {weight}.")
    return pairs


def _robust(results: Results) -> Verdict:
    if min(results.config.commitment_weights) > 0.1 or max(results.config.commitment_weights) < 2:
        return Verdict("not testable", "needs commitment weights from 0.1 to 2")
    errors = [mse for _, mse in series(results, "ste-loss", "commitment_weight", "mse")]
    spread = max(errors) / min(errors) - 1
    return Verdict.of(
        spread <= 0.1,
        f"errors from {min(errors):.4f} to {max(errors):.4f}: {100 * spread:.0f} % apart, 10 asked",
    )


def _not_the_weights(results: Results) -> Verdict:
    ste = min(
        (mse, f"{weight} {value:g}")
        for weight in _LOSS_WEIGHTS
        for value, mse in series(results, "ste-loss", weight, "mse")
    )
    rotation = results.mean("rotation-loss", "mse[base]")
    return Verdict.of(
        rotation < ste[0],
        f"rotation {rotation:.4f} at the base setting; best of ste {ste[0]:.4f} at {ste[1]}",
    )


def _lfq_needs_tuning(results: Results) -> Verdict:
    used = series(results, "lfq", "entropy_weight", "usage")
    shares = [share for _, share in used]
    return Verdict.of(
        max(shares) - min(shares) >= 0.2,
        "usage " + ", ".join(f"{share:.2f} at {value:g}" for value, share in used),
    )


class DigitsVQSweep(Digits):
    """What the weights of the losses change."""

    name = "vq-digits-sweep"
    title = "Loss weights and decay of quantizers on the digits"
    description = (
        "The autoencoders of vq-digits with one weight at a time varied: of the commitment term, "
        "of the codebook term, of LFQ's entropy, and the decay of moving averages."
    )
    arms = tuple(SWEPT)
    columns = ("mse[base]", "usage[base]", "best_mse", "worst_mse", "seconds")
    config_class = DigitsVQSweepConfig
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": DigitsVQSweepConfig(
            arms=("ste-loss",),
            seeds=(0,),
            steps=10,
            batch_size=32,
            codes=16,
            code_dim=4,
            levels=(4, 4),
            init_images=32,
            evaluate_every=10,
            commitment_weights=(0.25, 1.0),
            codebook_weights=(1.0,),
        ),
        "cpu": DigitsVQSweepConfig(),
        "gpu": DigitsVQSweepConfig(
            seeds=(0, 1, 2, 3, 4),
            steps=5000,
            evaluate_every=500,
            commitment_weights=(0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0),
            codebook_weights=(0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0),
            decays=(0.5, 0.8, 0.9, 0.95, 0.99, 0.999),
            entropy_weights=(0.001, 0.01, 0.03, 0.1, 0.3, 1.0),
        ),
    }
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim(
            "Straight-through is robust to the commitment weight: from 0.1 to 2, errors are within "
            "10 percent of each other.",
            "arXiv 1711.00937, section 3.2 (its β)",
            _robust,
        ),
        Claim(
            "With a bad start no weight makes straight-through as good as rotation.",
            "methods card, the ablation's sweep",
            _not_the_weights,
        ),
        Claim(
            "LFQ needs its entropy weight tuned: usage differs by 0.2 over the weights.",
            "methods card",
            _lfq_needs_tuning,
        ),
    )

    def run_arm(
        self, config: DigitsVQSweepConfig, arm: str, ctx: Context
    ) -> Mapping[str, Sequence[float]]:
        pictures = self.images(ctx)
        settings, seeds = config.settings(arm), len(config.seeds)
        metrics: dict[str, list[float]] = {}
        start = time.perf_counter()
        # Weights of losses are numbers of the step, so that all of them train side by side; a decay
        # is a constant of the layer.
        for decay in dict.fromkeys(of.get("decay", config.decay) for of in settings.values()):
            together = {
                name: {key: value for key, value in of.items() if key != "decay"}
                for name, of in settings.items()
                if of.get("decay", config.decay) == decay
            }
            # One pytree for all models: each gets every weight that some of them has.
            varied = dict.fromkeys(key for of in together.values() for key in of)
            weights = [
                {key: of.get(key, getattr(config, key)) for key in varied}
                for of in together.values()
            ]
            setting = dataclasses.replace(config, decay=decay)
            result = self.fit(setting, arm, pictures, ctx, f"{arm}-decay-{decay:g}", weights)
            for key in ("mse", "usage", "perplexity", "quantization_error"):
                for name, values in zip(
                    together, result.metrics[key].reshape(-1, seeds), strict=True
                ):
                    metrics[f"{key}[{name}]"] = values.tolist()
        errors = np.asarray([metrics[f"mse[{name}]"] for name in settings])
        return metrics | {
            "best_mse": errors.min(0).tolist(),
            "worst_mse": errors.max(0).tolist(),
            "seconds": [time.perf_counter() - start] * seeds,
        }

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """Error and usage against each weight."""
        files = []
        for weight in results.config.values():
            curves = {}
            for arm in results.arms:
                if weight in SWEPT[arm]:
                    try:
                        curves[arm] = [
                            series(results, arm, weight, metric) for metric in ("mse", "usage")
                        ]
                    except MissingResult:
                        continue
            if not curves:
                continue
            files.append(ctx.run_dir / "plots" / f"{weight}.png")
            with figure(files[-1], columns=2, figsize=(8.4, 3.4)) as axes:
                for arm, pair in curves.items():
                    for axis, points in zip(axes, pair, strict=True):
                        axis.plot(*zip(*points, strict=True), marker="o", label=arm, **style(arm))
                for axis, metric in zip(axes, ("mse", "usage"), strict=True):
                    axis.set_xlabel(weight)
                    axis.set_xscale("linear" if weight == "decay" else "log")
                    axis.set_title(metric, fontsize=10)
                    axis.spines[["top", "right"]].set_visible(False)
                axes[1].set_ylim(0, 1.02)
                axes[0].legend(frameon=False, fontsize=8)
        return files

    def epilogue(self, results: Results, ctx: Context) -> str:
        """Error and usage of every setting."""
        lines = []
        for arm in results.arms:
            for name in results.config.settings(arm):
                if results.has(arm, f"mse[{name}]"):
                    mse, share = (results.mean(arm, f"{key}[{name}]") for key in ("mse", "usage"))
                    lines.append(f"  {arm:14} {name:24} error {mse:.4f}  usage {share:.2f}")
        return "Every setting:\n" + "\n".join(lines)
