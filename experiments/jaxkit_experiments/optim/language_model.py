"""Tiger, Lion, AdamW and LAMB on a byte-level language model, each tuned as much as the others.

Every optimizer gets the same number of learning rates, spaced alike about the rate of its own
literature, and all trials of a seed have the same weights to start from, batches, schedule,
clipping and weight decay. The rate is chosen on the validation part, its bits per byte are those
of the test part; where it is the first or the last of its grid, a better one may lie beyond, and
nothing is said of that optimizer's quality. Memory is counted on the states themselves, with and
without gradients accumulated over micro-batches.

    jaxkit run optim-language-model --preset cpu
    jaxkit run optim-language-model --preset gpu --data enwik8

Sources: kexue.fm 9512 and 8634 (Tiger); Chen et al. 2023, Lion (arXiv 2302.06675); Loshchilov &
Hutter 2017, AdamW (arXiv 1711.05101); You et al. 2019, LAMB (arXiv 1904.00962).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.optim import tiger
from jaxkit_experiments.checkpoints import Checkpoints
from jaxkit_experiments.experiment import (
    Claim,
    Context,
    Experiment,
    MissingResult,
    Results,
    Verdict,
)
from jaxkit_experiments.plots import figure
from jaxkit_experiments.runfolder import plain
from jaxkit_experiments.speed.optim import multi_steps, state_bytes
from jaxkit_experiments.vq import language_model as lm
from jaxkit_experiments.vq.text import Corpus, Windows, held_out, read_corpus

__all__ = ["CENTRES", "OptimizerComparison", "OptimizerComparisonConfig", "Sweep"]

# The rate of the literature for language models. Tiger: 1e-3 to 2e-3, of a weight's own size. Lion:
# a third to a tenth of AdamW's. LAMB: 6e-4 to 5e-3 by the size of the batch.
CENTRES: Mapping[str, float] = {"tiger": 1.5e-3, "lion": 2e-4, "adamw": 1e-3, "lamb": 1.8e-3}
ARMS = tuple(CENTRES)


@dataclasses.dataclass(frozen=True)
class OptimizerComparisonConfig:
    """The model, its training, and the grids.

    Attributes:
      arms: optimizers.
      seeds: of weights and batches; every rate is tried with each.
      points: learning rates of each optimizer.
      factor: between neighbouring rates.
      scale: the middle of each grid, in units of the literature's rate, one for all optimizers.
        Small models that are trained for a short time take larger steps; about 4 the best rate of
        Lion was the greatest of its grid, hence a step more.
      steps: training steps, a multiple of `evaluate_every`.
      warmup: steps of the warm-up; a cosine to a tenth follows.
      batch_size: windows in a batch.
      length: predicted bytes of a window.
      model_dim: width.
      key_dim: of queries and keys.
      layers: gated layers, of full attention.
      weight_decay: what a step at the schedule's peak takes off each matrix, whatever the rate.
      clip: greatest norm of the gradient.
      dtype: of the activations.
      remat: compute a layer's activations again in the backward pass.
      accumulation: micro-batches to an update, where the memory for accumulation is counted.
      evaluate_every: steps between evaluations on the validation part.
      windows: held-out windows of each part.
    """

    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1)
    points: int = 5
    factor: float = 2.5
    scale: float = 10.0
    steps: int = 300
    warmup: int = 30
    batch_size: int = 8
    length: int = 128
    model_dim: int = 64
    key_dim: int = 32
    layers: int = 2
    weight_decay: float = 1e-4
    clip: float = 1.0
    dtype: str = "float32"
    remat: bool = False
    accumulation: int = 4
    evaluate_every: int = 50
    windows: int = 256

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        if not self.seeds:
            raise ValueError("seeds must hold at least one seed; got none.")
        check_int("points", self.points, least=3)
        check_int("accumulation", self.accumulation, least=2)
        check_int("evaluate_every", self.evaluate_every, least=1)
        check_int("steps", self.steps, least=1)
        check_int("warmup", self.warmup, least=1)
        check_real("factor", self.factor, above=1.0)
        check_real("scale", self.scale, above=0.0)
        if self.steps % self.evaluate_every:
            raise ValueError(
                f"steps must be a multiple of evaluate_every = {self.evaluate_every}; "
                f"got {self.steps}."
            )
        if self.warmup >= self.steps:
            raise ValueError(f"warmup must be less than steps = {self.steps}; got {self.warmup}.")
        if self.windows < self.batch_size:
            raise ValueError(
                f"windows must be at least batch_size = {self.batch_size}; got {self.windows}."
            )
        self.model()  # the rest is checked there

    def model(self) -> lm.LanguageModelConfig:
        """The model as `vq-language-model` has it."""
        names = {field.name for field in dataclasses.fields(lm.LanguageModelConfig)}
        shared = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in names
        }
        return lm.LanguageModelConfig(**{**shared, "arms": ("full",), "prompt": 1})

    def rates(self, arm: str) -> tuple[float, ...]:
        """The grid of an optimizer, growing.

        Example:
          >>> config = OptimizerComparisonConfig(points=3, factor=10.0, scale=1.0)
          >>> [f"{rate:g}" for rate in config.rates("adamw")]
          ['0.0001', '0.001', '0.01']
        """
        middle = (self.points - 1) / 2
        return tuple(
            self.scale * CENTRES[arm] * self.factor ** (point - middle)
            for point in range(self.points)
        )


# --- optimizers --------------------------------------------------------------------------------


def is_vector(leaf: Any) -> bool:
    """Whether at most one axis is longer than 1: gains, biases, and the biases `[1, dim]` of keys.

    Example:
      >>> is_vector(jnp.zeros((1, 5))), is_vector(jnp.zeros((2, 5)))
      (True, False)
    """
    return leaf.size == max(leaf.shape, default=1)


def make_optimizer(arm: str, rate: Any, accumulation: int = 1) -> optax.GradientTransformation:
    """An optimizer alone, without decay, with its betas for language models.

    Args:
      arm: which.
      rate: learning rate or schedule.
      accumulation: micro-batches to an update: hidden in Tiger's momentum, in a buffer of
        `optax.MultiSteps` for the others.
    """
    if arm == "tiger":
        label = lambda path, leaf: "vector" if is_vector(leaf) else None
        return tiger(rate, 0.965, weight_decay=0.0, accumulation_steps=accumulation, label_fn=label)
    make: Mapping[str, Callable[..., optax.GradientTransformation]] = {
        "lion": partial(optax.lion, b1=0.95, b2=0.98, weight_decay=0.0),
        "adamw": partial(optax.adamw, b1=0.9, b2=0.99, weight_decay=0.0),
        "lamb": partial(optax.lamb, b1=0.9, b2=0.99, weight_decay=0.0),
    }
    optimizer = make[arm](rate)
    return optimizer if accumulation == 1 else multi_steps(optimizer, accumulation)


def full_optimizer(
    config: OptimizerComparisonConfig, arm: str, rate: Any
) -> optax.GradientTransformation:
    """Clipping before, decay behind, the same for every arm.

    With the schedule's shape s(t) of peak 1 the step is -rate s(t) u_t - decay s(t) θ_t: the decay
    of Loshchilov & Hutter's algorithm 2, in which it does not change with the rate.

    Args:
      config: of the schedule.
      arm: which.
      rate: at the peak; may be traced.
    """
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, config.warmup, config.steps, 0.1)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        make_optimizer(arm, lambda count: rate * shape(count)),
        optax.add_decayed_weights(
            lambda count: -config.weight_decay * shape(count),
            mask=partial(jax.tree.map, lambda leaf: not is_vector(leaf)),
        ),
    )


# --- training ----------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """What all trials of an optimizer gave, in bits per byte; NaN or Inf where one diverged."""

    rates: np.ndarray
    """`[rates]`."""
    steps: np.ndarray
    """`[evaluations]`, steps before each."""
    training: np.ndarray
    """`[evaluations, rates, seeds]`, means over the steps since the evaluation before."""
    validation: np.ndarray
    """`[evaluations, rates, seeds]`."""
    test: np.ndarray
    """`[rates, seeds]`, at the end."""

    @property
    def best(self) -> int:
        """The rate of least bits on the validation part at the end, mean over the seeds.

        A rate at which any seed diverges comes last.
        """
        last = self.validation[-1].mean(1)
        return int(np.argmin(np.where(np.isfinite(last), last, np.inf)))


def sweep(config: OptimizerComparisonConfig, arm: str, corpus: Corpus, ctx: Context) -> Sweep:
    """Train at every rate of the grid, with every seed, all side by side."""
    model = config.model()
    rates = jnp.asarray(config.rates(arm), jnp.float32)
    keys = jnp.stack([jax.random.key(seed) for seed in config.seeds])
    sources = [Windows(corpus.train, s, config.batch_size, config.length) for s in config.seeds]
    held = {
        part: jnp.asarray(
            held_out(
                getattr(corpus, part),
                config.length,
                count=config.windows,
                batch_size=config.batch_size,
            )
        )
        for part in ("validation", "test")
    }

    def build(key: jax.Array) -> Any:
        return nnx.split(lm.build_model(model, "full", key), nnx.Param, ...)

    graph, _, rest = jax.eval_shape(build, keys[0])  # without codes nothing is left

    def step(rate: jax.Array, state: Any, batch: jax.Array) -> Any:
        params, opt_state = state

        def objective(params: Any) -> Any:
            merged = nnx.merge(graph, params, rest, copy=True)
            return lm.loss(model, merged, {"bytes": batch}, jax.random.key(0))

        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
        optimizer = full_optimizer(config, arm, rate)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics["bits_per_byte"]

    @jax.jit
    def init(keys: jax.Array) -> Any:
        """The same weights at every rate: `[rates, seeds, ...]`."""
        params = jax.vmap(lambda key: build(key)[1])(keys)
        state = params, jax.vmap(full_optimizer(config, arm, 1.0).init)(params)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(rates), *leaf.shape)), state)

    @partial(jax.jit, donate_argnums=0)
    def train(state: Any, batches: jax.Array) -> Any:
        over_seeds: Any = jax.vmap(step, (None, 0, 0))
        over_rates: Any = jax.vmap(over_seeds, (0, 0, None))  # which share their batches
        return jax.lax.scan(lambda state, batch: over_rates(rates, state, batch), state, batches)

    @jax.jit
    def evaluate(state: Any, windows: jax.Array) -> jax.Array:
        one = lambda params: lm.evaluate(nnx.merge(graph, params, rest), windows)["bits_per_byte"]
        return jax.vmap(jax.vmap(one))(state[0])

    state, done = init(keys), 0
    history: list[dict[str, Any]] = []
    checkpoints = Checkpoints(ctx.arm_dir(arm) / "checkpoints" / "sweep")
    if (restored := checkpoints.restore(state)) is not None:
        done, state, history = restored
    if ctx.writes:
        ctx.metric_log.drop([{"arm": ctx.arm} | record for record in history], arm=ctx.arm)
    with ctx.progress(arm, config.steps) as task:
        task.update(done)
        while done < config.steps:
            numbers = range(done, done + config.evaluate_every)
            batches = np.stack([[source[t]["bytes"] for source in sources] for t in numbers])
            state, bits = train(state, jnp.asarray(batches))
            done += config.evaluate_every
            validation = np.asarray(evaluate(state, held["validation"]))
            training = np.asarray(bits).mean(0)
            record = plain({"step": done, "training": training, "validation": validation})
            history.append(record)
            ctx.log(**record)
            checkpoints.save(done, state, history)
            task.update(done, best=float(np.fmin.reduce(validation, axis=None)))
    over = lambda name: np.asarray([record[name] for record in history], np.float64)
    return Sweep(
        np.asarray(config.rates(arm)),
        over("step"),
        over("training"),
        over("validation"),
        np.asarray(evaluate(state, held["test"]), np.float64),
    )


def load(ctx: Context, arm: str) -> Sweep:
    """The sweep that a run has kept."""
    kept = ctx.load_arrays(f"sweep-{arm}")
    return Sweep(*(kept[name] for name in Sweep._fields))


# --- claims ------------------------------------------------------------------------------------

# In bits per byte, some one percent of a small model's: "at least as good" and "as good as".
_BETTER, _ALIKE = 0.02, 0.05


def _tuned(results: Results, *arms: str) -> list[float]:
    """Test bits of the arms.

    Raises:
      MissingResult: an arm was not tuned, or its best rate is at the edge of the grid.
    """
    if results.config.steps < 200:
        raise MissingResult("needs 200 steps")
    found = [results.mean(arm, "bits_per_byte") for arm in arms]
    for arm in arms:
        if results.mean(arm, "edge"):
            raise MissingResult(
                f"the best rate of {arm} is at the edge of its grid: "
                + ", ".join(f"{arm} {bits:.3f}" for arm, bits in zip(arms, found, strict=True))
            )
    return found


def _margin(results: Results, first: str, second: str) -> str:
    gain = results.metric(second, "bits_per_byte") - results.metric(first, "bits_per_byte")
    each = " ".join(f"{value:+.3f}" for value in gain)
    return f"{gain.mean():+.3f} for {first} ({each} by seed)"


def _not_worse(first: str, second: str) -> Callable[[Results], Verdict]:
    def check(results: Results) -> Verdict:
        a, b = _tuned(results, first, second)
        return Verdict.of(
            a <= b + _BETTER,
            f"{first} {a:.3f}, {second} {b:.3f}: {_margin(results, first, second)}, "
            f"-{_BETTER} allowed",
        )

    return check


def _alike(results: Results) -> Verdict:
    a, b = _tuned(results, "adamw", "lamb")
    return Verdict.of(
        abs(a - b) <= _ALIKE,
        f"adamw {a:.3f}, lamb {b:.3f}: {_margin(results, 'adamw', 'lamb')}, {_ALIKE} allowed",
    )


def _memory(results: Results) -> Verdict:
    held = {arm: results.mean(arm, "state_bytes_accumulated") for arm in ARMS}
    alone = ", ".join(f"{results.mean(arm, 'state_bytes'):.2f}" for arm in ARMS)
    order = held["tiger"] < held["lion"] < held["adamw"]
    return Verdict.of(
        order and math.isclose(held["adamw"], held["lamb"], rel_tol=1e-2),
        ", ".join(f"{arm} {value:.2f}" for arm, value in held.items())
        + f" bytes a parameter; without accumulation {alone}",
    )


class OptimizerComparison(Experiment):
    """Optimizers at equal tuning budget.

    Metrics of an arm: `bits_per_byte` of the test part and `validation` at the best rate,
    `learning_rate`, that rate; `edge`: -1 or 1 where it is the least or the greatest of the grid,
    else 0; `state_bytes` a parameter, and with accumulation `state_bytes_accumulated`.
    """

    name = "optim-language-model"
    title = "Tiger, Lion, AdamW and LAMB on bytes, at equal tuning budget"
    description = (
        "A byte-level transformer of full attention on the source of the Python standard library "
        "(or --data: enwik8, any file, any folder of .py files). Each optimizer has the same "
        "number of learning rates about the literature's, the best on the validation part is "
        "reported on the test part; an `edge` that is not 0 says that the grid was too narrow."
    )
    sources = (
        "kexue.fm 9512",
        "kexue.fm 8634",
        "arXiv 2302.06675",
        "arXiv 1711.05101",
        "arXiv 1904.00962",
    )
    config_class = OptimizerComparisonConfig
    arms = ARMS
    columns = (
        "bits_per_byte",
        "validation",
        "learning_rate",
        "edge",
        "state_bytes",
        "state_bytes_accumulated",
    )
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "tiger": {"state_bytes": 4, "state_bytes_accumulated": 4},
        "lion": {"state_bytes": 4, "state_bytes_accumulated": 8},
        "adamw": {"state_bytes": 8, "state_bytes_accumulated": 12},
        "lamb": {"state_bytes_accumulated": 12},
    }
    paper_note = "The bytes beside are the methods card's; the posts give an order, no numbers."
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": OptimizerComparisonConfig(
            arms=("tiger", "adamw"),
            points=3,
            scale=4.0,
            steps=10,
            warmup=2,
            batch_size=2,
            length=16,
            model_dim=16,
            key_dim=8,
            layers=1,
            evaluate_every=5,
            windows=8,
        ),
        "cpu": OptimizerComparisonConfig(),
        "gpu": OptimizerComparisonConfig(
            seeds=(0, 1, 2),
            points=7,
            factor=2.0,
            scale=1.0,
            steps=20_000,
            warmup=1000,
            batch_size=16,
            length=1024,
            model_dim=512,
            key_dim=128,
            layers=8,
            dtype="bfloat16",
            remat=True,
            evaluate_every=500,
            windows=1024,
        ),
    }
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim("Lion is at least as good as Tiger.", "kexue.fm 9512", _not_worse("lion", "tiger")),
        Claim("Tiger is at least as good as AdamW.", "kexue.fm 9512", _not_worse("tiger", "adamw")),
        Claim("AdamW and LAMB are as good as each other.", "kexue.fm 9512", _alike),
        Claim(
            "With accumulation Tiger needs the least memory, then Lion, then AdamW and LAMB alike.",
            "kexue.fm 9512, 8634",
            _memory,
        ),
    )

    def run_arm(
        self, config: OptimizerComparisonConfig, arm: str, ctx: Context
    ) -> Mapping[str, Sequence[float]]:
        start = time.perf_counter()
        found = sweep(config, arm, read_corpus(ctx.data), ctx)
        seconds = time.perf_counter() - start
        ctx.save_arrays(f"sweep-{arm}", **found._asdict())
        best, count = found.best, len(config.seeds)
        shapes = jax.eval_shape(
            lambda key: nnx.state(lm.build_model(config.model(), "full", key), nnx.Param),
            jax.random.key(0),
        )
        same = {
            "learning_rate": found.rates[best],
            "edge": float((best == config.points - 1) - (best == 0)),
            "state_bytes": state_bytes(make_optimizer(arm, 1e-3), shapes),
            "state_bytes_accumulated": state_bytes(
                make_optimizer(arm, 1e-3, config.accumulation), shapes
            ),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
            "seconds": seconds,
        }
        metrics = {name: [float(value)] * count for name, value in same.items()}
        # What diverged at every rate has no bits.
        finite = lambda bits: np.where(np.isfinite(bits), bits, np.nan).tolist()
        return metrics | {
            "bits_per_byte": finite(found.test[best]),
            "validation": finite(found.validation[-1, best]),
        }

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """Bits per byte against the learning rate, and along the training at the best rate."""
        sweeps = {arm: load(ctx, arm) for arm in results.arms}
        files = [ctx.run_dir / "plots" / f"{name}.png" for name in ("rates", "curves")]
        with figure(files[0]) as axis:
            for arm, found in sweeps.items():
                last = np.where(np.isfinite(found.validation[-1]), found.validation[-1], np.nan)
                (line,) = axis.plot(found.rates, last.mean(1), "o-", ms=3, label=arm)
                axis.fill_between(
                    found.rates,
                    last.min(1),
                    last.max(1),
                    color=line.get_color(),
                    alpha=0.15,
                    lw=0,
                )
                best = found.best
                axis.plot(found.rates[best], last[best].mean(), "*", ms=11, color=line.get_color())
            # What is worse than a guess among 256 bytes leaves the frame.
            ends = np.concatenate([found.validation[-1].mean(1) for found in sweeps.values()])
            ends = ends[ends <= 8]
            if ends.size:
                axis.set_ylim(ends.min() - 0.1, ends.max() + 0.1)
            axis.set_xscale("log")
            axis.set_xlabel("learning rate")
            axis.set_title("bits per byte, validation", fontsize=10)
            axis.legend(frameon=False, fontsize=9)
        with figure(files[1]) as axis:
            for number, (arm, found) in enumerate(sweeps.items()):
                rate = found.rates[found.best]
                for curves, style in ((found.validation, "-"), (found.training, ":")):
                    axis.plot(
                        found.steps,
                        curves[:, found.best].mean(1),
                        style,
                        color=f"C{number}",
                        label=f"{arm} at {rate:.2g}" if style == "-" else None,
                    )
            axis.set_xlabel("step")
            axis.set_title("bits per byte, validation (dotted: training)", fontsize=10)
            axis.legend(frameon=False, fontsize=9)
        return files

    def epilogue(self, results: Results, ctx: Context) -> str | None:
        """Validation bits at every rate, and whose best rate may lie beyond the grid."""
        lines = []
        for arm in results.arms:
            found = load(ctx, arm)
            cells = [
                f"{rate:.2g}: {bits:.3f}"
                for rate, bits in zip(found.rates, found.validation[-1].mean(1), strict=True)
            ]
            edge = results.mean(arm, "edge")
            flag = f" (best at the {'upper' if edge > 0 else 'lower'} edge)" if edge else ""
            lines.append(f"{arm}, validation by learning rate: {', '.join(cells)}{flag}")
        return "\n".join(lines)
