"""Does adapting step sizes by exponentiated gradient make up for a badly chosen learning rate?

One classifier, learning rates over three decades, and for each way to adapt it how well it ends up:

* `fixed`: momentum (or Adam) at a constant rate; `cosine`: the same with a cosine schedule;
* `egdd`: scale and gains, gains in front of the momentum; `post`: gains behind the optimizer;
* `gains`, `scale`: one of the two alone; `fast-scale`: both, with ten times the scale's rate;
* `hypergradient`: the scale alone, by addition.

Then every label is replaced by the next one at half time, and the steps to recover are counted.
All trainings of an arm go side by side, every rate and seed through one compiled step.

    jaxkit run eg-step-sizes --preset cpu
    jaxkit run eg-step-sizes --preset gpu --data cifar-100-binary --inner adam

Sources: kexue.fm 8968; Amid, Anil, Fifty, Warmuth 2022 (arXiv 2202.00145); Baydin et al. 2018, the
hypergradient (arXiv 1703.04782).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkit._checks import check_choice, check_int
from jaxkit.optim.step_size import eg_stepsize
from jaxkit_experiments.data import LabelledImages, cifar
from jaxkit_experiments.experiment import (
    Claim,
    Context,
    Experiment,
    MissingResult,
    Results,
    Verdict,
)
from jaxkit_experiments.optim import classifiers
from jaxkit_experiments.plots import figure, number_log_ticks
from jaxkit_experiments.training import TrainResult, train

__all__ = ["ARMS", "CARD", "StepSizeAdaptation", "StepSizeConfig", "make_optimizer", "recovery"]

# What the arms that adapt do otherwise than `eg_stepsize` by default.
ADAPTIVE: Mapping[str, Mapping[str, Any]] = {
    "egdd": {},
    "post": {"where": "post"},
    "gains": {"scale_lr": 0},
    "scale": {"gain_lr": 0},
    "fast-scale": {"scale_lr": 0.01},
    "hypergradient": {"gain_lr": 0, "scale_rule": "additive"},
}
ARMS = ("fixed", "cosine", *ADAPTIVE)

# The methods card: accuracy by learning rate, mean of 3 seeds, digits.
CARD: Mapping[str, Mapping[float, float]] = {
    "fixed": {1e-4: 0.573, 1e-3: 0.931, 1e-2: 0.978, 1e-1: 0.985},
    "egdd": {1e-4: 0.972, 1e-3: 0.981, 1e-2: 0.984, 1e-1: 0.987},
    "scale": {1e-4: 0.742, 1e-3: 0.947, 1e-2: 0.980, 1e-1: 0.985},
    "gains": {1e-4: 0.969, 1e-3: 0.980, 1e-2: 0.984, 1e-1: 0.987},
    "fast-scale": {1e-4: 0.982, 1e-3: 0.986, 1e-2: 0.983, 1e-1: 0.987},
}


@dataclasses.dataclass(frozen=True)
class StepSizeConfig:
    """A classifier and its training.

    Attributes:
      arms: ways to set the step size.
      seeds: one model for each.
      rates: learning rates, growing.
      shift_rates: those at which the labels are shifted at half time; may be empty.
      steps: training steps.
      batch_size: images in a batch.
      model: "mlp" or "resnet18".
      inner: "momentum" (decay 0.9) or "adam", which has its gains behind it in every arm.
      evaluate_every: steps between evaluations, and the resolution of the recovery.
      test_images: at most so many are evaluated.
    """

    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    shift_rates: tuple[float, ...] = (1e-3, 1e-2)
    steps: int = 1500
    batch_size: int = 64
    model: str = "mlp"
    inner: str = "momentum"
    evaluate_every: int = 25
    test_images: int = 2048

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        check_choice("model", self.model, classifiers.MODELS)
        check_choice("inner", self.inner, ("momentum", "adam"))
        for name in ("batch_size", "evaluate_every", "test_images"):
            check_int(name, getattr(self, name), least=1)
        check_int("steps", self.steps, least=2)
        for name in ("rates", "shift_rates"):
            rates = getattr(self, name)
            if list(rates) != sorted(set(rates)) or any(rate <= 0 for rate in rates):
                raise ValueError(f"{name} must be growing positive numbers; got {rates!r}.")
        if not self.rates or not self.seeds:
            raise ValueError("rates and seeds must hold at least one value each.")

    @property
    def trainings(self) -> list[tuple[float, bool]]:
        """Rate of every training, and whether labels are shifted; there is one for each seed."""
        return [(rate, False) for rate in self.rates] + [(rate, True) for rate in self.shift_rates]

    @property
    def shift_at(self) -> int:
        """The step from which on labels are shifted."""
        return self.steps // 2


def make_optimizer(
    config: StepSizeConfig, arm: str, rate: Any
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of an arm at a rate, which may be traced.

    Example:
      >>> optimizer = make_optimizer(StepSizeConfig(), "egdd", 0.1)
    """
    schedule = optax.cosine_decay_schedule(rate, config.steps) if arm == "cosine" else rate
    inner = optax.adam(schedule) if config.inner == "adam" else optax.sgd(schedule, momentum=0.9)
    if arm not in ADAPTIVE:
        return optax.with_extra_args_support(inner)
    where = "post" if config.inner == "adam" else "pre"
    options: dict[str, Any] = {"where": where, **ADAPTIVE[arm]}
    return eg_stepsize(inner, **options)


def loss(model: Any, batch: Any, key: jax.Array) -> Any:
    """Cross-entropy."""
    del key
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(batch["images"]), batch["labels"]
    )
    return jnp.mean(losses), {}


def evaluate(model: Any, batch: Any) -> Any:
    """Share of images whose label is found, and whose next label is."""
    found = jnp.argmax(model(batch["images"]), axis=-1)
    share = lambda labels: jnp.mean((found == labels).astype(jnp.float32))
    return {"accuracy": share(batch["labels"]), "shifted": share(batch["next_labels"])}


def recovery(
    history: Sequence[Mapping[str, Any]], shift_at: int, steps: int, *, share: float = 0.95
) -> list[float]:
    """Steps after the shift until the new accuracy is `share` of the old one before, per seed.

    Where that does not happen, the steps that there were: at least so many.

    Example:
      >>> history = [
      ...     {"step": 10, "split": "evaluation", "accuracy": [0.8], "shifted": [0.0]},
      ...     {"step": 20, "split": "evaluation", "accuracy": [0.1], "shifted": [0.7]},
      ...     {"step": 30, "split": "evaluation", "accuracy": [0.0], "shifted": [0.8]},
      ... ]
      >>> recovery(history, 10, 30)
      [20.0]
    """
    seen = [record for record in history if record["split"] == "evaluation"]
    before = [record["accuracy"] for record in seen if record["step"] <= shift_at]
    if not before:
        raise ValueError(f"history must have an evaluation up to step {shift_at}; got none.")
    after = [record for record in seen if record["step"] > shift_at]
    return [
        float(
            next(
                (r["step"] for r in after if r["shifted"][seed] >= share * accuracy),
                steps,
            )
            - shift_at
        )
        for seed, accuracy in enumerate(before[-1])
    ]


# --- claims ------------------------------------------------------------------------------------


def trained(check: Callable[[Results], Verdict]) -> Callable[[Results], Verdict]:
    """The check, but not of models that have hardly been trained, or at close rates."""

    def checked(results: Results) -> Verdict:
        config = results.config
        if config.steps < 1000 or config.rates[-1] < 100 * config.rates[0]:
            return Verdict("not testable", "needs 1000 steps and rates that are 100 times apart")
        return check(results)

    return checked


def _accuracies(results: Results, arm: str) -> list[float]:
    return [results.mean(arm, f"accuracy[{rate:g}]") for rate in results.config.rates]


def _robust(results: Results) -> Verdict:
    spread = {
        arm: max(values) - min(values)
        for arm in ("fixed", "egdd")
        for values in [_accuracies(results, arm)]
    }
    return Verdict.of(
        spread["egdd"] <= 0.03 and spread["egdd"] < spread["fixed"] / 3,
        f"between best and worst rate: egdd {spread['egdd']:.3f}, fixed {spread['fixed']:.3f}",
    )


def _no_harm(results: Results) -> Verdict:
    pairs = list(zip(_accuracies(results, "egdd"), _accuracies(results, "fixed"), strict=True))
    worst = min(egdd - fixed for egdd, fixed in pairs)
    return Verdict.of(worst >= -0.005, f"least advantage over the fixed rate {worst:+.4f}")


def _lowest(results: Results, arm: str) -> float:
    return _accuracies(results, arm)[0]


def _gains_do_most(results: Results) -> Verdict:
    at = {arm: _lowest(results, arm) for arm in ("fixed", "scale", "gains", "egdd")}
    gap = at["egdd"] - at["fixed"]
    shares = [(at[arm] - at["fixed"]) / gap if gap > 0 else 0.0 for arm in ("gains", "scale")]
    return Verdict.of(
        shares[0] >= 0.9 and shares[1] < shares[0],
        f"of the gap of {gap:.3f} gains close {100 * shares[0]:.0f} %, "
        f"the scale {100 * shares[1]:.0f} %",
    )


def _fast_scale(results: Results) -> Verdict:
    fast, slow = _lowest(results, "fast-scale"), _lowest(results, "egdd")
    return Verdict.of(fast >= slow, f"{fast:.3f} at a scale_lr of .01, {slow:.3f} at .001")


def _train_loss(results: Results) -> Verdict:
    rate = results.config.rates[0]
    egdd, fixed = (results.mean(arm, f"train_loss[{rate:g}]") for arm in ("egdd", "fixed"))
    return Verdict.of(egdd <= 0.1 * fixed, f"{egdd:.3f} for {fixed:.3f} at a rate of {rate:g}")


def _recovers(results: Results) -> Verdict:
    rates = results.config.shift_rates
    if not rates:
        raise MissingResult("no shift was run")
    pairs = [
        tuple(results.mean(arm, f"recovery[{rate:g}]") for arm in ("egdd", "fixed"))
        for rate in rates
    ]
    return Verdict.of(
        all(egdd < fixed for egdd, fixed in pairs),
        "; ".join(
            f"rate {rate:g}: {egdd:.0f} steps for {fixed:.0f}"
            for rate, (egdd, fixed) in zip(rates, pairs, strict=True)
        ),
    )


def _as_good_as_tuned(results: Results) -> Verdict:
    tuned = max(_accuracies(results, "cosine"))
    best = max(_accuracies(results, "post"))
    return Verdict.of(best >= tuned - 0.005, f"{best:.3f}; best cosine {tuned:.3f}")


def _card(results: Results) -> Verdict:
    config = results.config
    if config != dataclasses.replace(
        StepSizeConfig(), arms=config.arms, shift_rates=config.shift_rates
    ):
        return Verdict("not testable", "the card's numbers are those of the preset cpu")
    wrong, compared = [], 0
    for arm in set(CARD) & set(results.arms):
        for rate, value in CARD[arm].items():
            got = results.mean(arm, f"accuracy[{rate:g}]")
            compared += 1
            if abs(got - value) > 0.02:
                wrong.append(f"{arm} at {rate:g}: {got:.3f} for {value:.3f}")
    if not compared:
        raise MissingResult("no arm of the card was run")
    text = f"{compared - len(wrong)} of {compared} within 0.02"
    return Verdict.of(not wrong, "; ".join([text, *sorted(wrong)]))


class StepSizeAdaptation(Experiment):
    """Ways to adapt the step size, at learning rates over three decades.

    Metrics of an arm, for every rate η: `accuracy[η]` on the test set and `train_loss[η]` over the
    last steps; for the rates with a shift `recovery[η]`, see `recovery`; `seconds` for all of it.
    """

    name = "eg-step-sizes"
    title = "Step sizes adapted by exponentiated gradient, against badly chosen learning rates"
    description = (
        "A tanh MLP on the digits (1400 to train, 397 to test) at learning rates from 1e-4 to 0.1, "
        "constant or adapted; and the steps to recover when all labels change. With --data, a "
        "folder of CIFAR-10 or CIFAR-100."
    )
    sources = ("kexue.fm 8968", "arXiv 2202.00145", "arXiv 1703.04782")
    arms = ARMS
    columns = ("accuracy[0.0001]", "accuracy[0.01]", "recovery[0.001]")
    config_class = StepSizeConfig
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        arm: {f"accuracy[{rate:g}]": value for rate, value in of.items()}
        for arm, of in CARD.items()
    }
    paper_note = "The numbers beside are the methods card's, 3 seeds."
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": StepSizeConfig(
            arms=("fixed", "egdd"),
            seeds=(0,),
            rates=(1e-2,),
            shift_rates=(1e-2,),
            steps=20,
            batch_size=16,
            evaluate_every=5,
        ),
        "cpu": StepSizeConfig(),
        "gpu": StepSizeConfig(
            rates=(1e-3, 1e-2, 1e-1),
            shift_rates=(1e-2,),
            steps=20_000,
            batch_size=128,
            model="resnet18",
            evaluate_every=500,
        ),
    }
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim(
            "EGDD forgives the learning rate: accuracies at all rates within 0.03, a third of the "
            "spread at fixed rates.",
            "arXiv 2202.00145; methods card (.972 to .987 against .573 to .985)",
            trained(_robust),
        ),
        Claim(
            "It does no harm: at every rate at most 0.005 below the fixed one.",
            "arXiv 2202.00145",
            trained(_no_harm),
        ),
        Claim(
            "At the lowest rate it has a tenth of the training loss.",
            "methods card (1.917 to .112)",
            trained(_train_loss),
        ),
        Claim(
            "Gains alone close 90 percent of the gap at the lowest rate, the scale alone less.",
            "methods card (.969 and .742 between .573 and .972)",
            trained(_gains_do_most),
        ),
        Claim(
            "There, ten times the scale's rate is better still.",
            "methods card (.982)",
            trained(_fast_scale),
        ),
        Claim(
            "When labels change EGDD recovers in fewer steps than the same rate fixed.",
            "arXiv 2202.00145",
            trained(_recovers),
        ),
        Claim(
            "At its best rate the wrapper is as good as the best cosine schedule, within 0.005.",
            "arXiv 2202.00145",
            trained(_as_good_as_tuned),
        ),
        Claim("Accuracies are the card's, within 0.02.", "methods card", _card),
    )

    def run_arm(
        self, config: StepSizeConfig, arm: str, ctx: Context
    ) -> Mapping[str, Sequence[float]]:
        data = classifiers.digits() if ctx.data is None else cifar(ctx.data)
        start = time.perf_counter()
        result = self.fit(config, arm, data, ctx)
        last = [record for record in result.history if record["split"] == "train"][-1]
        per_training = partial(np.reshape, shape=(len(config.trainings), len(config.seeds)))
        columns = {
            "accuracy": per_training(result.metrics["accuracy"]),
            "train_loss": per_training(last["loss"]),
        }
        if config.shift_rates:
            recovered = recovery(result.history, config.shift_at, config.steps)
            columns["recovery"] = per_training(recovered)
        metrics = {
            f"{name}[{rate:g}]": columns[name][row].tolist()
            for row, (rate, shifted) in enumerate(config.trainings)
            for name in (("recovery",) if shifted else ("accuracy", "train_loss"))
        }
        return metrics | {"seconds": [time.perf_counter() - start] * len(config.seeds)}

    def fit(
        self, config: StepSizeConfig, arm: str, data: LabelledImages, ctx: Context
    ) -> TrainResult:
        """All trainings of an arm, a seed after the other within each of `config.trainings`."""
        following = np.roll(np.arange(data.classes), -1)  # the next class, for every class
        shape, labels = data.train_images.shape[1:], data.test_labels[: config.test_images]
        every = [
            (rate, shifted, seed) for rate, shifted in config.trainings for seed in config.seeds
        ]
        return train(
            init=lambda key: classifiers.build(
                config.model, shape, data.classes, rngs=nnx.Rngs(key)
            ),
            loss=loss,
            optimizer=partial(make_optimizer, config, arm),
            hyperparams=np.array([rate for rate, _, _ in every], np.float32),
            batches=[
                classifiers.Batches(
                    data.train_images,
                    data.train_labels,
                    config.batch_size,
                    seed,
                    relabel=following if shifted else None,
                    relabel_at=config.shift_at,
                )
                for _, shifted, seed in every
            ],
            steps=config.steps,
            seeds=[seed for _, _, seed in every],
            evaluate=evaluate,
            evaluation_data={
                "images": data.test_images[: config.test_images],
                "labels": labels,
                "next_labels": following[labels].astype(labels.dtype),
            },
            evaluate_every=config.evaluate_every,
            # The batches of a chunk are in memory at once, those of the next beside them.
            chunk=math.gcd(config.evaluate_every, 25),
            ctx=ctx,
        )

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """Error against the learning rate, and accuracy after the shift of labels."""
        config = results.config
        files = [ctx.run_dir / "plots" / "rates.png"]
        with figure(files[0]) as axis:
            for arm in results.arms:
                errors = 1 - np.asarray(_accuracies(results, arm))
                axis.plot(config.rates, errors, marker="o", ms=4, label=arm)
            axis.set(xscale="log", yscale="log", xlabel="learning rate")
            number_log_ticks(axis.yaxis)
            axis.set_title("error rate", fontsize=10)
            axis.legend(frameon=False, fontsize=8)
        if config.shift_rates:
            files.append(ctx.run_dir / "plots" / "shift.png")
            with figure(files[1], columns=len(config.shift_rates), squeeze=False) as axes:
                shape = len(config.trainings), len(config.seeds)
                for axis, rate in zip(axes[0], config.shift_rates, strict=True):
                    row = config.trainings.index((rate, True))
                    for arm in results.arms:
                        points = [
                            (record["step"], np.mean(np.reshape(record["shifted"], shape)[row]))
                            for record in ctx.history(arm)
                            if record["split"] == "evaluation" and record["step"] >= config.shift_at
                        ]
                        axis.plot(*zip(*points, strict=True), label=arm)
                    axis.set_xlabel("step")
                    axis.set_title(f"accuracy on the new labels, rate {rate:g}", fontsize=10)
                axes[0][0].legend(frameon=False, fontsize=8)
        return files

    def epilogue(self, results: Results, ctx: Context) -> str:
        """Means at every rate."""
        config, lines = results.config, []
        for metric, rates in (("accuracy", config.rates), ("recovery", config.shift_rates)):
            for arm in results.arms:
                values = [
                    f"{results.mean(arm, f'{metric}[{rate:g}]'):.4g} at {rate:g}"
                    for rate in rates
                    if results.has(arm, f"{metric}[{rate:g}]")
                ]
                lines.append(f"  {metric} {arm:14} {', '.join(values)}")
        return "At every rate:\n" + "\n".join(lines)
