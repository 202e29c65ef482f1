"""Does S4's initialisation and parametrization matter? Every arm on the same sequence tasks.

The model is the same for every arm but for its mixing layer: encoder, then layers of
[LayerNorm, mixer, GELU, Dense 2H, GLU, residual], then pooling (or none) and a dense read-out. The
state-space parameters Λ, P, B and the step sizes learn at a rate of their own without weight decay,
all else by AdamW; both by a cosine schedule to zero, after clipping the gradient's norm. A trained
model is then run step by step, and must say what it says as a convolution.

    jaxkit run s4-digits --preset cpu
    jaxkit run s4-copying --preset cpu --steps 1200

Sources: Gu, Goel, Ré 2021 (arXiv 2111.00396); Gu, Gupta, Goel, Ré 2022 (2206.11893); Gu et al. 2022
(2206.12037); Parnichkun et al. 2024 (2405.06147); posts 10162 and 10180 on kexue.fm.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.ssm import SequenceModel, ssm_labels
from jaxkit_experiments import data
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.ssm import tasks
from jaxkit_experiments.training import train

__all__ = [
    "ARMS",
    "Adding",
    "Copying",
    "Delay",
    "Digits",
    "ListOps",
    "PermutedDigits",
    "RateChange",
    "SelectiveCopying",
]

# What each arm puts in the place of the mixing layer.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "s4-legs": {"kernel": "dplr", "init": "legs"},
    "s4-rand": {"kernel": "dplr", "init": "random"},
    "s4d-legs": {"kernel": "diag", "init": "legs"},
    "s4d-inv": {"kernel": "diag", "init": "inv"},
    "s4d-lin": {"kernel": "diag", "init": "lin"},
    "s4d-real": {"kernel": "diag", "init": "real"},
    "s4d-rand": {"kernel": "diag", "init": "random"},
    "s5": {"mixer": "s5"},
    "rtf": {"kernel": "rtf", "init": "zeros"},
    "lstm": {"mixer": "lstm"},
    "gru": {"mixer": "gru"},
}
COMPLEX = ("s4-legs", "s4d-legs", "s4d-inv", "s4d-lin", "s4-rand", "s4d-rand")
RNNS = ("gru", "lstm")


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """What all sequence tasks share.

    Attributes:
      arms: mixing layers to compare.
      seeds: one model for each; trained side by side.
      steps: training steps.
      batch_size: sequences in a batch.
      heads: width H.
      state_size: N of the state-space arms.
      layers: number of blocks.
      dt_min: least initial step size; about 1 / length.
      dt_max: greatest initial step size.
      learning_rate: of everything but the state-space parameters.
      ssm_learning_rate: of Λ, P, B and the step sizes.
      weight_decay: of everything but the state-space parameters.
      clip: greatest norm of the gradient.
      dropout: rate.
      bidirectional: let the state-space arms read the future; recurrent cells cannot.
      evaluate_every: steps between evaluations on the test set.
    """

    arms: tuple[str, ...] = ("s4-legs", "s4d-inv", "s4d-real", "gru", "lstm")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 400
    batch_size: int = 64
    heads: int = 32
    state_size: int = 32
    layers: int = 2
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    learning_rate: float = 4e-3
    ssm_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: float = 0.0
    bidirectional: bool = False
    evaluate_every: int = 50

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        for name in ("steps", "batch_size", "heads", "state_size", "layers", "evaluate_every"):
            check_int(name, getattr(self, name), least=1)
        for name in ("dt_min", "learning_rate", "ssm_learning_rate", "clip"):
            check_real(name, getattr(self, name), above=0.0)
        check_real("dt_max", self.dt_max, above=self.dt_min)
        check_real("weight_decay", self.weight_decay, least=0.0)
        if self.bidirectional and set(self.arms) & set(RNNS):
            raise ValueError("bidirectional must be False with the arms gru and lstm; got True.")


def build_model(
    config: SequenceConfig, arm: str, task: tasks.Task, key: jax.Array
) -> SequenceModel:
    """The model of one arm for one task."""
    options = dict(ARMS[arm])
    if "kernel" in options:
        options |= {"bidirectional": config.bidirectional, "l_max": task.length}
    if arm not in ("rtf", *RNNS):
        options |= {"dt_min": config.dt_min, "dt_max": config.dt_max}
    features = task.vocabulary or task.train["inputs"].shape[-1]
    outputs = task.classes or task.train["targets"].shape[-1]
    return SequenceModel(
        features,
        outputs,
        heads=config.heads,
        layers=config.layers,
        state_size=config.state_size,
        encoder="dense" if task.vocabulary is None else "embedding",
        pooling="mean" if task.pooled else "none",
        dropout=config.dropout,
        rngs=nnx.Rngs(key),
        **options,
    )


def build_optimizer(config: SequenceConfig, params: Any) -> optax.GradientTransformation:
    """Two rates, one schedule: the dynamics learn slowly and without decay."""

    def cosine(rate: float) -> optax.Schedule:
        return optax.cosine_decay_schedule(rate, config.steps)

    rest = optax.adamw(cosine(config.learning_rate), weight_decay=config.weight_decay)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.multi_transform(
            {"ssm": optax.adam(cosine(config.ssm_learning_rate)), "regular": rest},
            ssm_labels(params),
        ),
    )


def score(
    model: SequenceModel, batch: Mapping[str, jax.Array], *, classes: bool, key: Any = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics over the outputs that count: accuracy, or root mean squared error."""
    outputs = model(batch["inputs"], mask=batch.get("mask"), key=key)
    targets = batch["targets"]
    if classes:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        hits = (jnp.argmax(outputs, axis=-1) == targets).astype(losses.dtype)
    else:
        losses = hits = jnp.mean((outputs - targets) ** 2, axis=-1)
    weight = jnp.broadcast_to(batch.get("loss_mask", jnp.ones((), bool)), losses.shape)
    weight = weight.astype(losses.dtype)
    loss = jnp.sum(losses * weight) / jnp.sum(weight)
    metric = jnp.sum(hits * weight) / jnp.sum(weight)
    return loss, {"accuracy": metric} if classes else {"rmse": jnp.sqrt(metric)}


def held_out(task: tasks.Task, count: int | None = None) -> tuple[jax.Array, jax.Array | None]:
    """The first test sequences, and their mask if lengths differ."""
    mask = task.test.get("mask")
    inputs = jnp.asarray(task.test["inputs"][:count])
    return inputs, None if mask is None else jnp.asarray(mask[:count])


def step_by_step(model: SequenceModel, inputs: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The model's outputs from its recurrence, one position at a time."""
    systems = model.discretize()
    graph, values = nnx.split(model)
    mask = jnp.ones(inputs.shape[:2], bool) if mask is None else mask

    def body(state: Any, at: Any) -> Any:
        x, counts = at
        outputs, state = nnx.merge(graph, values).step(state, x, mask=counts, systems=systems)
        return state, outputs

    positions = jnp.moveaxis(inputs, 1, 0), jnp.moveaxis(mask, 1, 0)
    _, outputs = jax.lax.scan(body, model.init_state(inputs.shape[:1]), positions)
    return outputs[-1] if model.pooling != "none" else jnp.moveaxis(outputs, 0, 1)


class SequenceExperiment(Experiment):
    """Train every arm on one task; subclasses say which."""

    arms = tuple(ARMS)
    sources = (
        "arXiv 2111.00396",
        "arXiv 2206.11893",
        "arXiv 2206.12037",
        "arXiv 2405.06147",
        "kexue.fm 10162, 10180",
    )
    columns: ClassVar[tuple[str, ...]] = ("accuracy", "steps_per_second", "seconds")
    config_class: ClassVar[type] = SequenceConfig
    # How many test sequences the recurrence is compared on.
    stepped: ClassVar[int] = 540

    @abc.abstractmethod
    def task(self, config: Any, ctx: Context) -> tasks.Task:
        """The task's data; the same for every arm and seed."""

    def run_arm(self, config: Any, arm: str, ctx: Context) -> Mapping[str, list[float]]:
        task = self.task(config, ctx)
        classes = task.classes is not None
        drops = config.dropout > 0

        def loss(model: SequenceModel, batch: Any, key: jax.Array) -> Any:
            return score(model, batch, classes=classes, key=key if drops else None)

        def evaluate(model: SequenceModel, batch: Any) -> Any:
            value, metrics = score(model, batch, classes=classes)
            return {"loss": value} | metrics

        start = time.perf_counter()
        result = train(
            init=lambda key: build_model(config, arm, task, key),
            loss=loss,
            optimizer=lambda params: build_optimizer(config, params),
            batches=lambda seed: data.batches(task.train, config.batch_size, seed),
            steps=config.steps,
            seeds=config.seeds,
            evaluate=evaluate,
            evaluation_data=dict(task.test),
            evaluate_every=config.evaluate_every,
            chunk=min(config.evaluate_every, config.steps),
            ctx=ctx,
            name=arm,
        )
        seconds = time.perf_counter() - start
        metrics = {name: values.tolist() for name, values in result.metrics.items()}
        count = len(config.seeds)
        metrics["steps_per_second"] = [result.steps_per_second] * count
        metrics["seconds"] = [seconds] * count
        models = [result.model(index) for index in range(count)]
        if classes and task.pooled:
            self._keep_confusion(task, models, arm, ctx)
        if not config.bidirectional:
            metrics |= self._compare_forms(task, models)
        return metrics | self.further_metrics(task, arm, models)

    def further_metrics(
        self, task: tasks.Task, arm: str, models: list[Any]
    ) -> dict[str, list[float]]:
        """What else a task asks of the trained models, one value per seed."""
        return {}

    def _compare_forms(self, task: tasks.Task, models: list[Any]) -> dict[str, list[float]]:
        """How far the recurrence is from the convolution, and how often both decide alike."""
        inputs, mask = held_out(task, self.stepped)
        outputs: dict[str, list[float]] = {"recurrent_difference": [], "recurrent_agreement": []}
        graph = nnx.graphdef(models[0])
        convolve = jax.jit(lambda values: nnx.merge(graph, values)(inputs, mask=mask))
        recur = jax.jit(lambda values: step_by_step(nnx.merge(graph, values), inputs, mask))
        for model in models:
            whole, stepped = convolve(nnx.state(model)), recur(nnx.state(model))
            scale = jnp.max(jnp.abs(whole))
            outputs["recurrent_difference"].append(float(jnp.max(jnp.abs(whole - stepped)) / scale))
            same = jnp.argmax(whole, -1) == jnp.argmax(stepped, -1)
            outputs["recurrent_agreement"].append(float(jnp.mean(same.astype(jnp.float32))))
        return outputs

    def _keep_confusion(self, task: tasks.Task, models: list[Any], arm: str, ctx: Context) -> None:
        inputs, mask = held_out(task)
        targets = task.test["targets"]
        assert task.classes is not None
        graph = nnx.graphdef(models[0])
        decide = jax.jit(
            lambda values: jnp.argmax(nnx.merge(graph, values)(inputs, mask=mask), axis=-1)
        )
        counts = np.zeros((task.classes, task.classes), int)
        for model in models:
            np.add.at(counts, (targets, np.asarray(decide(nnx.state(model)))), 1)
        ctx.save_arrays(f"confusion-{arm}", counts=counts)

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        files = super().plot(results, ctx)
        counts = {}
        for arm in results.arms:
            try:
                counts[arm] = ctx.load_arrays(f"confusion-{arm}")["counts"]
            except KeyError:
                continue
        return files + ([plot_confusion(counts, ctx)] if counts else [])

    def epilogue(self, results: Results, ctx: Context) -> str | None:
        lines = []
        for arm in results.arms:
            if not results.has(arm, "recurrent_agreement"):
                continue
            agreement = results.metric(arm, "recurrent_agreement")
            difference = results.metric(arm, "recurrent_difference")
            lines.append(
                f"  {arm}: {100 * agreement.min():.2f} % of the decisions are the same, outputs "
                f"differ by at most {difference.max():.1e} of the largest"
            )
        if not lines:
            return None
        return "The trained models run step by step, against the form they were trained in:\n" + (
            "\n".join(lines)
        )


def plot_confusion(counts: Mapping[str, np.ndarray], ctx: Context) -> Path:
    """Confusion matrices of all arms, summed over seeds, rows being true classes."""
    from matplotlib.figure import Figure

    columns = min(3, len(counts))
    rows = -(-len(counts) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis in axes[len(counts) :]:
        axis.set_axis_off()
    for axis, (arm, matrix) in zip(axes, counts.items(), strict=False):
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.005:
                color = "white" if value > 0.5 else "black"
                text = f"{100 * value:.0f}"
                axis.text(column, row, text, ha="center", va="center", color=color, fontsize=6)
        axis.set_title(f"{arm}, accuracy {np.trace(matrix) / matrix.sum():.3f}", fontsize=9)
        axis.set_xlabel("predicted", fontsize=8)
        axis.set_ylabel("true (row sums to 100 %)", fontsize=8)
        axis.set_xticks(range(len(matrix)))
        axis.set_yticks(range(len(matrix)))
        axis.tick_params(labelsize=7)
    path = ctx.run_dir / "plots" / "confusion.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


# --- claims ------------------------------------------------------------------------------------


def ahead(better: str, worse: str, margin: float) -> Callable[[Results], Verdict]:
    """Mean accuracy of one arm above another's by at least `margin`."""

    def check(results: Results) -> Verdict:
        a, b = results.mean(better, "accuracy"), results.mean(worse, "accuracy")
        return Verdict.of(
            a - b >= margin,
            f"{better} {a:.3f}, {worse} {b:.3f}: difference {a - b:+.3f}, asked {margin:+.2f}",
        )

    return check


def _alike(one: str, other: str, margin: float) -> Callable[[Results], Verdict]:
    def check(results: Results) -> Verdict:
        a, b = results.mean(one, "accuracy"), results.mean(other, "accuracy")
        return Verdict.of(
            abs(a - b) <= margin,
            f"{one} {a:.3f}, {other} {b:.3f}: {abs(a - b):.3f} apart, {margin:.2f} allowed",
        )

    return check


def _same_function(results: Results) -> Verdict:
    arms = [arm for arm in results.arms if results.has(arm, "recurrent_difference")]
    if not arms:
        return Verdict("not testable", "no arm that runs step by step")
    worst = max(arms, key=lambda arm: results.metric(arm, "recurrent_difference").max())
    difference = float(results.metric(worst, "recurrent_difference").max())
    return Verdict.of(
        difference <= 1e-3, f"largest relative difference {difference:.1e} ({worst}), 1e-3 allowed"
    )


RECURRENT = Claim(
    "A trained layer run as a recurrence is the function that was trained as a convolution.",
    "arXiv 2111.00396, section 3",
    _same_function,
)

DIGIT_CLAIMS = (
    Claim(
        "S4 is ahead of a GRU of the same width by 5 points on sequential images.",
        "arXiv 2111.00396, table of pixel-by-pixel classification",
        ahead("s4-legs", "gru", 0.05),
    ),
    Claim(
        "S4 is ahead of an LSTM of the same width by 5 points on sequential images.",
        "arXiv 2111.00396, table of pixel-by-pixel classification",
        ahead("s4-legs", "lstm", 0.05),
    ),
    Claim(
        "The diagonal S4D is within 5 points of S4.",
        "arXiv 2206.11893, table of ablations",
        _alike("s4d-inv", "s4-legs", 0.05),
    ),
    Claim(
        "Complex modes matter: S4D-Inv is ahead of S4D-Real by 8 points.",
        "arXiv 2206.11893, real against complex",
        ahead("s4d-inv", "s4d-real", 0.08),
    ),
    Claim(
        "HiPPO initialisation is ahead of a random one by 5 points.",
        "arXiv 2111.00396 (sCIFAR, 100k parameters: 70 % against 55 %)",
        ahead("s4-legs", "s4-rand", 0.05),
    ),
    RECURRENT,
)


# --- the tasks ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DigitsConfig(SequenceConfig):
    """Sequential digits.

    Attributes:
      upsample: repeat each pixel k × k times, for length 64 k².
    """

    dt_min: float = 1e-2
    dt_max: float = 1.0
    upsample: int = 1


class Digits(SequenceExperiment):
    """S4, its diagonal forms and RNNs on scikit-learn's digits, pixel by pixel."""

    name = "s4-digits"
    title = "S4 against S4D, S4D-Real, GRU and LSTM on sequential digits"
    description = (
        "8×8 digits (1257 to train, 540 to test) are read one pixel after the other, in raster "
        "order. Accuracy is on the test set after the last step."
    )
    config_class = DigitsConfig
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {"s4-legs": {"accuracy": 0.9963}}
    paper_note: ClassVar[str] = (
        "The paper's number is for sequential MNIST, 784 pixels, 60 000 images."
    )
    claims: ClassVar[tuple[Claim, ...]] = DIGIT_CLAIMS
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": DigitsConfig(
            arms=("s4-legs", "gru"),
            seeds=(0,),
            steps=20,
            batch_size=16,
            heads=8,
            state_size=8,
            evaluate_every=10,
        ),
        "cpu": DigitsConfig(),
        "gpu": DigitsConfig(
            arms=tuple(ARMS),
            steps=4000,
            heads=128,
            state_size=64,
            layers=4,
            dt_min=1e-3,
            dt_max=1e-1,
            upsample=4,
            evaluate_every=200,
        ),
    }
    permuted: ClassVar[bool] = False

    def task(self, config: Any, ctx: Context) -> tasks.Task:
        return tasks.digits(permuted=self.permuted, upsample=config.upsample)


class PermutedDigits(Digits):
    """The same with the pixels in one random order, so that neighbours are far apart."""

    name = "s4-permuted-digits"
    title = "S4 against S4D, S4D-Real, GRU and LSTM on permuted digits"
    description = (
        "8×8 digits (1257 to train, 540 to test) are read one pixel after the other, in one random "
        "order. Accuracy is on the test set after the last step."
    )
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {"s4-legs": {"accuracy": 0.9870}}
    paper_note: ClassVar[str] = (
        "The paper's number is for permuted MNIST, 784 pixels, 60 000 images."
    )
    permuted = True


def _half_rate(arm: str) -> Callable[[Results], Verdict]:
    def check(results: Results) -> Verdict:
        full = results.mean(arm, "accuracy")
        half, naive = (results.mean(arm, name) for name in ("half_rate", "half_rate_same_step"))
        return Verdict.of(
            half >= full - 0.05 and half > naive,
            f"{arm} {full:.3f} at the rate of training, {half:.3f} at half of it with steps twice "
            f"as long, {naive:.3f} with the same steps; 0.05 allowed",
        )

    return check


class RateChange(Digits):
    """Train at one sampling rate, test at half of it: only the step size changes."""

    name = "s4-rate-change"
    title = "Tested at half the sampling rate, without training again"
    description = (
        "Digits of 16×16 pixels, length 256, to train; in the test every second sample is left out "
        "(half_rate), and the layers' steps are twice as long (rate=2), or not "
        "(half_rate_same_step)."
    )
    columns = ("accuracy", "half_rate", "half_rate_same_step", "seconds")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "s4-legs": {"accuracy": 0.9832, "half_rate": 0.9630}
    }
    paper_note: ClassVar[str] = "The paper's numbers are for Speech Commands (SC10), raw audio."
    claims = (
        Claim(
            "S4 works at half the sampling rate without training again: at most 5 points lost, and "
            "better than with the steps of training.",
            "arXiv 2111.00396 (SC10: 98.32 at full rate, 96.30 at half)",
            _half_rate("s4-legs"),
        ),
        Claim(
            "So does the diagonal S4D.",
            "arXiv 2206.11893",
            _half_rate("s4d-lin"),
        ),
        RECURRENT,
    )
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": dataclasses.replace(
            Digits.presets["smoke"], arms=("s4-legs", "s4d-lin"), upsample=2, steps=10
        ),
        "cpu": DigitsConfig(
            arms=("s4-legs", "s4d-lin"), seeds=(0, 1), upsample=2, dt_min=2e-3, dt_max=0.2
        ),
        "gpu": dataclasses.replace(
            Digits.presets["gpu"], arms=("s4-legs", "s4d-lin", "s4d-inv", "s5")
        ),
    }

    def further_metrics(
        self, task: tasks.Task, arm: str, models: list[Any]
    ) -> dict[str, list[float]]:
        if arm in ("rtf", *RNNS):  # no step size to change
            return {}
        inputs, targets = held_out(task)[0][:, ::2], jnp.asarray(task.test["targets"])
        graph = nnx.graphdef(models[0])
        accuracy = {
            rate: jax.jit(
                lambda values, rate=rate: jnp.mean(
                    jnp.argmax(nnx.merge(graph, values)(inputs, rate=rate), axis=-1) == targets
                )
            )
            for rate in (1.0, 2.0)
        }
        return {
            name: [float(accuracy[rate](nnx.state(model))) for model in models]
            for name, rate in (("half_rate", 2.0), ("half_rate_same_step", 1.0))
        }


@dataclasses.dataclass(frozen=True)
class CopyingConfig(SequenceConfig):
    """Copying, and selective copying.

    Attributes:
      symbols: S; chance is 1 / S.
      tokens: M, how many are remembered.
      lag: T, how long.
      examples: training sequences.
    """

    arms: tuple[str, ...] = ("s4d-legs", "s4-legs", "s4d-rand", "gru")
    seeds: tuple[int, ...] = (0, 1)
    batch_size: int = 32
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    symbols: int = 8
    tokens: int = 8
    lag: int = 100
    examples: int = 12_800


class Copying(SequenceExperiment):
    """Symbols, a long blank, and the symbols again."""

    name = "s4-copying"
    title = "Copying: symbols, a long blank, and the symbols again"
    description = (
        "M random symbols must be said again after T blanks. Accuracy is over the last M outputs; "
        "chance is 1 / S."
    )
    config_class = CopyingConfig
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "s4-legs": {"accuracy": 0.293},
        "rtf": {"accuracy": 0.221},
    }
    paper_note: ClassVar[str] = "RTF paper, table 2: 64 symbols, length 1024, state 64."
    stepped = 64
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim(
            "A HiPPO-derived diagonal layer copies better than a random one, by 30 points.",
            "arXiv 2206.12037; arXiv 2206.11893",
            ahead("s4d-legs", "s4d-rand", 0.3),
        ),
        Claim(
            "A HiPPO-derived diagonal layer copies better than a GRU, by 50 points.",
            "arXiv 2111.00396",
            ahead("s4d-legs", "gru", 0.5),
        ),
        Claim(
            "S4 (diagonal plus low rank) copies better than a random diagonal layer.",
            "arXiv 2111.00396",
            ahead("s4-legs", "s4d-rand", 0.0),
        ),
        RECURRENT,
    )
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": CopyingConfig(
            arms=("s4d-legs", "gru"),
            seeds=(0,),
            steps=10,
            batch_size=8,
            heads=8,
            state_size=8,
            tokens=4,
            lag=8,
            examples=64,
            evaluate_every=10,
        ),
        "cpu": CopyingConfig(),
        "gpu": CopyingConfig(
            arms=("s4d-legs", "s4-legs", "s4d-inv", "s4d-lin", "s4d-rand", "s4-rand", "rtf", "gru"),
            steps=15_000,
            heads=64,
            state_size=64,
            symbols=64,
            tokens=64,
            lag=896,
            examples=10_000,
            evaluate_every=500,
        ),
    }
    make: ClassVar[Callable[..., tasks.Task]] = staticmethod(tasks.copying)

    def task(self, config: Any, ctx: Context) -> tasks.Task:
        return self.make(
            train=config.examples,
            test=256,
            symbols=config.symbols,
            tokens=config.tokens,
            lag=config.lag,
        )


class SelectiveCopying(Copying):
    """The symbols stand at random places: no time-invariant layer can do it."""

    name = "s4-selective-copying"
    title = "Selective copying: no fixed delay brings the symbols back"
    description = (
        "As copying, but the symbols stand at random places among the blanks, so that a linear "
        "time-invariant layer must fail."
    )
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {"s4-legs": {"accuracy": 0.183}}
    paper_note: ClassVar[str] = "Mamba paper (arXiv 2312.00752): 16 tokens, length 4096."
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim(
            "A time-invariant layer does not solve selective copying: S4 stays below 60 %.",
            "arXiv 2312.00752 (S4: 18.3 %)",
            lambda results: Verdict.of(
                results.mean("s4-legs", "accuracy") < 0.6,
                f"s4-legs {results.mean('s4-legs', 'accuracy'):.3f}",
            ),
        ),
        RECURRENT,
    )
    make = staticmethod(tasks.selective_copying)


@dataclasses.dataclass(frozen=True)
class DelayConfig(SequenceConfig):
    """A trained delay (the closed-form one needs no training: `ssm.delay`).

    Attributes:
      length: positions of a signal.
      lag: τ.
      cutoff: greatest frequency, cycles a sample.
      examples: training signals.
    """

    arms: tuple[str, ...] = ("s4-legs", "s4d-lin", "s4d-inv", "s4d-real", "gru")
    seeds: tuple[int, ...] = (0, 1)
    batch_size: int = 32
    length: int = 256
    lag: int = 64
    cutoff: float = 0.1
    examples: int = 2048


def _lower(better: str, worse: str, factor: float) -> Callable[[Results], Verdict]:
    def check(results: Results) -> Verdict:
        a, b = results.mean(better, "rmse"), results.mean(worse, "rmse")
        return Verdict.of(a <= factor * b, f"{better} {a:.3f}, {worse} {b:.3f}, asked {factor:g}x")

    return check


class Delay(SequenceExperiment):
    """White noise in, the same noise τ steps later out."""

    name = "s4-delay"
    title = "Delay: white noise, τ steps later"
    description = "The target is the input of τ steps ago, of variance 1."
    config_class = DelayConfig
    columns = ("rmse", "steps_per_second", "seconds")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {"s4-legs": {"rmse": 0.41}}
    paper_note: ClassVar[str] = "RTF paper, table 2: delay by 1000, state 64."
    stepped = 32
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim("S4 delays better than a GRU.", "arXiv 2206.12037", _lower("s4-legs", "gru", 0.9)),
        Claim(
            "Complex modes delay better than real ones.",
            "arXiv 2206.11893",
            _lower("s4d-lin", "s4d-real", 0.9),
        ),
        RECURRENT,
    )
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": DelayConfig(
            arms=("s4d-lin", "gru"),
            seeds=(0,),
            steps=10,
            batch_size=8,
            heads=8,
            state_size=8,
            length=32,
            lag=4,
            examples=32,
            evaluate_every=10,
        ),
        "cpu": DelayConfig(),
        "gpu": DelayConfig(
            arms=("s4-legs", "s4d-lin", "s4d-inv", "s4d-real", "s4-rand", "rtf", "gru"),
            steps=10_000,
            heads=64,
            state_size=256,
            length=4000,
            lag=1000,
            examples=8192,
            evaluate_every=500,
        ),
    }

    def task(self, config: Any, ctx: Context) -> tasks.Task:
        return tasks.delay_signals(
            train=config.examples,
            test=128,
            length=config.length,
            lag=config.lag,
            cutoff=config.cutoff,
        )


@dataclasses.dataclass(frozen=True)
class AddingConfig(SequenceConfig):
    """Adding.

    Attributes:
      length: positions.
      examples: training sequences.
    """

    arms: tuple[str, ...] = ("s4-legs", "s4d-legs", "gru")
    seeds: tuple[int, ...] = (0, 1)
    batch_size: int = 32
    length: int = 100
    examples: int = 12_800


class Adding(SequenceExperiment):
    """The sum of two marked numbers."""

    name = "s4-adding"
    title = "Adding: the sum of two marked numbers"
    description = "Two of the numbers are marked; the target is their sum. Answering 1 gives .408."
    config_class = AddingConfig
    columns = ("rmse", "steps_per_second", "seconds")
    stepped = 64
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim(
            "S4 is better than always answering 1 (root mean squared error .408), by half.",
            "Hochreiter, Schmidhuber 1997 (the task)",
            lambda results: Verdict.of(
                results.mean("s4-legs", "rmse") < 0.204,
                f"s4-legs {results.mean('s4-legs', 'rmse'):.3f}",
            ),
        ),
        RECURRENT,
    )
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": AddingConfig(
            arms=("s4-legs",),
            seeds=(0,),
            steps=10,
            batch_size=8,
            heads=8,
            state_size=8,
            length=16,
            examples=32,
            evaluate_every=10,
        ),
        "cpu": AddingConfig(),
        "gpu": AddingConfig(steps=10_000, heads=64, state_size=64, length=1000, evaluate_every=500),
    }

    def task(self, config: Any, ctx: Context) -> tasks.Task:
        return tasks.adding(train=config.examples, test=512, length=config.length)


@dataclasses.dataclass(frozen=True)
class ListOpsConfig(SequenceConfig):
    """ListOps.

    Attributes:
      train: training expressions.
      test: test expressions (and as many for validation).
      shortest: lengths are greater than this.
      longest: and less than this.
    """

    arms: tuple[str, ...] = ("s4-legs", "s4d-legs", "gru")
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 32
    train: int = 5000
    test: int = 1000
    shortest: int = 16
    longest: int = 128


class ListOps(SequenceExperiment):
    """Nested operations on digits; `--data` takes the folder of the published files."""

    name = "s4-listops"
    title = "ListOps: nested MIN, MAX, MED and SM on digits"
    description = (
        "Expressions by the generator of the Long Range Arena (or its own files, with --data). "
        "The column `root_operator` is what the root operator alone predicts."
    )
    config_class = ListOpsConfig
    columns = ("accuracy", "root_operator", "steps_per_second", "seconds")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "s4-legs": {"accuracy": 0.5960},
        "s4d-legs": {"accuracy": 0.6047},
        "rtf": {"accuracy": 0.6159},
    }
    paper_note: ClassVar[str] = (
        "Long Range Arena, lengths 500 to 2000, 96 000 expressions, 40 epochs."
    )
    stepped = 32
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim(
            "S4 learns more than the root operator: at least 5 points ahead of that shortcut.",
            "arXiv 2111.00396 (59.6 % against .371 for the shortcut)",
            lambda results: Verdict.of(
                results.mean("s4-legs", "accuracy")
                >= results.mean("s4-legs", "root_operator") + 0.05,
                f"s4-legs {results.mean('s4-legs', 'accuracy'):.3f}, root operator "
                f"{results.mean('s4-legs', 'root_operator'):.3f}",
            ),
        ),
        RECURRENT,
    )
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": ListOpsConfig(
            arms=("s4-legs",),
            steps=10,
            batch_size=8,
            heads=8,
            state_size=8,
            train=64,
            test=32,
            longest=48,
            evaluate_every=10,
        ),
        "cpu": ListOpsConfig(),
        "gpu": ListOpsConfig(
            arms=("s4-legs", "s4d-legs", "rtf"),
            steps=76_800,
            batch_size=50,
            heads=128,
            state_size=64,
            layers=8,
            learning_rate=1e-2,
            bidirectional=True,
            train=96_000,
            test=2000,
            shortest=500,
            longest=2000,
            evaluate_every=1000,
        ),
    }

    def task(self, config: Any, ctx: Context) -> tasks.Task:
        if ctx.data is not None:
            return tasks.read_listops(ctx.data)
        return tasks.listops(
            train=config.train,
            validation=config.test,
            test=config.test,
            config=tasks.ListOpsConfig(min_length=config.shortest, max_length=config.longest),
        )

    def run_arm(self, config: Any, arm: str, ctx: Context) -> Mapping[str, list[float]]:
        task = self.task(config, ctx)
        shortcut = tasks.root_operator_accuracy(task.train, task.test)
        metrics = dict(super().run_arm(config, arm, ctx))
        return metrics | {"root_operator": [shortcut] * len(config.seeds)}
