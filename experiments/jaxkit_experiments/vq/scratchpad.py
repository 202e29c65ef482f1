"""Can a decoder of constant state double a number x times, with a scratchpad and without?

A decoder of fixed depth does a bounded amount of work for each token that it writes. Asked for the
digits of a·2^x at once it has that amount for any x; if it may write down the x doublings, each
step is a small one and the work grows with x. The post predicts that the direct answer fails beyond
some x and the chain holds.

The text is made of records `value remaining ,` of one width: `007 03 ,` is "7, to be doubled three
times".

    direct   007 03 , 056 00 ,
    chain    007 03 , 014 02 , 028 01 , 056 00 ,

The question with start a = 1 is the card's own, "x [sep] decimal digits of 2^x". A table of 2^x
could be learnt by heart, by steps as well as at once, so that the models are trained on other
starts: no a·2^x of a held-out start, whose odd part is 1 modulo 8 (all powers of two among them),
ever occurs in training, not even within a chain.

    jaxkit run attention-scratchpad --preset cpu     up to 8 doublings
    jaxkit run attention-scratchpad --preset gpu     up to 64

Source: post 10017 on kexue.fm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.attention.vq import VQTransformer
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.plots import figure, training_curves
from jaxkit_experiments.training import train

__all__ = ["ARMS", "Doublings", "Scratchpad", "ScratchpadConfig", "held_out"]

ARMS = ("direct", "chain")
COMMA = 10
VOCABULARY = 11
# Digits of the counter.
COUNTER = 2
SOURCE = "kexue.fm 10017"


@dataclasses.dataclass(frozen=True)
class ScratchpadConfig:
    """Doubling a number x times.

    Attributes:
      arms: "direct", "chain".
      seeds: one model for each; trained side by side.
      steps: training steps.
      batch_size: chains in a batch, fresh ones in every step; direct answers are shorter, and so
        many more that both arms see as many tokens.
      starts: A; numbers 1 … A are doubled.
      doublings: X; they are doubled 1 … X times.
      test: held-out starts to test on, besides 1; also as many that were trained on.
      model_dim: width.
      key_dim: of a head; there are model_dim / key_dim.
      layers: number of blocks, attention and MLP each.
      learning_rate: greatest; warm-up, then a cosine to zero.
      evaluate_every: steps between tests.
    """

    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 20_000
    batch_size: int = 16
    starts: int = 999
    doublings: int = 64
    test: int = 31
    model_dim: int = 128
    key_dim: int = 32
    layers: int = 3
    learning_rate: float = 1e-3
    evaluate_every: int = 1_000

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        for name in ("steps", "batch_size", "test", "model_dim", "layers", "evaluate_every"):
            check_int(name, getattr(self, name), least=1)
        check_int("starts", self.starts, least=16)
        check_int("doublings", self.doublings, least=1)
        if self.doublings >= 10**COUNTER:
            raise ValueError(f"doublings must be below {10**COUNTER}; got {self.doublings}.")
        check_int("key_dim", self.key_dim, least=1)
        if self.model_dim % self.key_dim:
            raise ValueError(
                f"key_dim must divide model_dim = {self.model_dim}; got {self.key_dim}."
            )
        check_real("learning_rate", self.learning_rate, above=0.0)
        if not self.seeds:
            raise ValueError("seeds must hold at least one seed; got none.")

    @property
    def width(self) -> int:
        """Digits of the largest value."""
        return len(str(self.starts << self.doublings))

    @property
    def record(self) -> int:
        """Tokens of a record: value, counter, comma."""
        return self.width + COUNTER + 1


def held_out(start: int) -> bool:
    """Whether a start is for tests alone: its odd part, which doubling keeps, is 1 modulo 8.

    Example:
      >>> [a for a in range(1, 37) if held_out(a)]
      [1, 2, 4, 8, 9, 16, 17, 18, 25, 32, 33, 34, 36]
    """
    return (start // (start & -start)) % 8 == 1


@dataclasses.dataclass(frozen=True)
class Doublings:
    """Batches of questions with their answers, looked up by step.

    `tokens` is `[batch, length]`; `asked` is true where a token is part of the answer.

    Example:
      >>> source = Doublings(ScratchpadConfig(starts=16, doublings=3, batch_size=2), "chain", 0)
      >>> tokens, asked = source.write(np.array([7]), np.array([2]))
      >>> print("".join("0123456789,"[t] for t in tokens[0]))
      00702,01401,02800,02800,
      >>> print("".join(" ^"[int(t)] for t in asked[0]).rstrip())
            ^^^^^^^^^^^^
    """

    config: ScratchpadConfig
    arm: str
    seed: int

    @cached_property
    def values(self) -> np.ndarray:
        """Digits of a·2^k, `[A + 1, X + 1, width]`."""
        config = self.config
        text = "".join(
            f"{a << k:0{config.width}d}"
            for a in range(config.starts + 1)
            for k in range(config.doublings + 1)
        )
        digits = np.frombuffer(text.encode(), np.uint8) - ord("0")
        return digits.reshape(config.starts + 1, config.doublings + 1, config.width)

    @cached_property
    def pool(self) -> np.ndarray:
        """The starts that are trained on."""
        return np.array([a for a in range(1, self.config.starts + 1) if not held_out(a)])

    def write(self, starts: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The text of questions `start · 2^times`, and which tokens of it answer them."""
        first = np.zeros_like(times)
        if self.arm == "direct":
            done = np.stack([first, times], 1)
        else:
            done = first[:, None] + np.arange(self.config.doublings + 1)
        real = done <= times[:, None]
        done = np.minimum(done, times[:, None])  # the last record again: not asked for
        left = times[:, None] - done
        records = np.concatenate(
            [
                self.values[starts[:, None], done],
                left[..., None] // 10 ** np.arange(COUNTER)[::-1] % 10,
                np.full((*done.shape, 1), COMMA),
            ],
            axis=-1,
        )
        real[:, 0] = False  # the question
        tokens = records.reshape(len(starts), -1).astype(np.int32)
        return tokens, np.repeat(real, self.config.record, axis=1)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, step))
        size = self.config.batch_size
        if self.arm == "direct":  # as many tokens as in chains
            size = size * (self.config.doublings + 1) // 2
        starts = rng.choice(self.pool, size)
        tokens, asked = self.write(starts, rng.integers(1, self.config.doublings + 1, size))
        return {"tokens": tokens, "asked": asked}

    def questions(self, starts: np.ndarray) -> dict[str, np.ndarray]:
        """All x = 1 … X for each start, `[X, starts, length]`."""
        times = np.arange(1, self.config.doublings + 1)
        tokens, asked = self.write(np.tile(starts, len(times)), np.repeat(times, len(starts)))
        shape = len(times), len(starts), -1
        return {"tokens": tokens.reshape(shape), "asked": asked.reshape(shape)}


def starts_to_test(config: ScratchpadConfig) -> dict[str, np.ndarray]:
    """Starts to test on: the card's own, held-out ones, and some that were trained on.

    Example:
      >>> {name: len(starts) for name, starts in starts_to_test(ScratchpadConfig()).items()}
      {'power': 1, 'held_out': 31, 'trained': 31}
    """
    rng = np.random.default_rng(2**32)
    every = np.arange(1, config.starts + 1)
    kept = np.array([held_out(a) for a in every.tolist()])
    draw = lambda pool: np.sort(rng.permutation(pool)[: config.test])
    return {
        "power": np.array([1]),
        "held_out": draw(every[kept & (every > 1)]),
        "trained": draw(every[~kept]),
    }


def build_model(config: ScratchpadConfig, key: jax.Array) -> VQTransformer:
    """A plain decoder: dense multi-head attention with a bias for each lag, and MLPs.

    Example:
      >>> config = ScratchpadConfig(starts=16, doublings=3, model_dim=8, key_dim=4, layers=1)
      >>> tokens = jnp.zeros((1, 5), jnp.int32)
      >>> jax.eval_shape(lambda: build_model(config, jax.random.key(0))(tokens)).shape
      (1, 5, 11)
    """
    return VQTransformer(
        VOCABULARY,
        dim=config.model_dim,
        layers=config.layers,
        head_type="mha",
        key_dim=config.key_dim,
        quantizer="none",
        num_codes=2,
        # Biases reach the record before this one.
        block_length=config.record + 1,
        bias="table",
        query_scale=2.0,
        rngs=nnx.Rngs(key),
    )


def answers(model: VQTransformer, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of the answers' tokens, and which answers greedy decoding gets right.

    Greedy decoding writes exactly the right answer if and only if, given the right tokens so far,
    the most likely next one is right everywhere: one pass tells.
    """
    tokens, asked = batch["tokens"], batch["asked"][..., 1:]
    logits, targets = model(tokens[..., :-1]), tokens[..., 1:]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = (jnp.argmax(logits, -1).astype(targets.dtype) == targets) | ~asked
    weight = asked.astype(nats.dtype)
    return jnp.sum(nats * weight) / jnp.sum(weight), jnp.all(right, axis=-1)


def loss(model: VQTransformer, batch: Any, key: jax.Array) -> Any:
    """Cross-entropy of the answers, and how many of them are right."""
    value, right = answers(model, batch)
    return value, {"accuracy": jnp.mean(right.astype(value.dtype))}


def accuracy_by_x(
    counts: Mapping[str, int], model: VQTransformer, questions: Any
) -> dict[str, jax.Array]:
    """Share of right answers for each number of doublings, `[X]`, for each kind of start."""
    right = jax.lax.map(lambda batch: answers(model, batch)[1], questions)
    ends = np.cumsum(list(counts.values()))
    parts = jnp.split(right.astype(jnp.float32), ends[:-1], axis=1)
    return {name: jnp.mean(part, axis=1) for name, part in zip(counts, parts, strict=True)}


def evaluate(
    counts: Mapping[str, int], model: VQTransformer, questions: Any
) -> dict[str, jax.Array]:
    """Accuracy over all x, for each kind of start."""
    return jax.tree.map(jnp.mean, accuracy_by_x(counts, model, questions))


def reach(accuracy: np.ndarray) -> int:
    """The largest x up to which more than half of the answers are right for every x.

    Example:
      >>> reach(np.array([1.0, 0.9, 0.2, 0.8])), reach(np.array([0.1, 1.0]))
      (2, 0)
    """
    wrong = np.flatnonzero(accuracy <= 0.5)
    return int(wrong[0]) if wrong.size else len(accuracy)


class Scratchpad(Experiment):
    """Train both arms on the same questions."""

    name = "attention-scratchpad"
    title = "What a decoder of constant state can do at once, and what with a scratchpad"
    description = (
        "Digits of a · 2^x, at once or by writing down the doublings, on starts a that were never "
        "trained on. `reach` is the x up to which most answers are right; `power` is a = 1."
    )
    sources = (SOURCE,)
    config_class = ScratchpadConfig
    arms = ARMS
    columns = ("held_out", "power", "trained", "reach", "last", "steps_per_second")
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": ScratchpadConfig(
            seeds=(0,),
            steps=4,
            batch_size=4,
            starts=16,
            doublings=3,
            test=2,
            model_dim=8,
            key_dim=4,
            layers=1,
            evaluate_every=4,
        ),
        "cpu": ScratchpadConfig(
            seeds=(0,),
            steps=800,
            batch_size=32,
            doublings=8,
            test=15,
            model_dim=64,
            key_dim=16,
            layers=2,
            learning_rate=4e-3,
            evaluate_every=200,
        ),
        "gpu": ScratchpadConfig(),
    }

    def run_arm(self, config: Any, arm: str, ctx: Context) -> Mapping[str, list[float]]:
        starts = starts_to_test(config)
        counts = {name: len(some) for name, some in starts.items()}
        questions = Doublings(config, arm, 0).questions(np.concatenate(list(starts.values())))
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.steps // 20, config.steps
        )
        result = train(
            init=partial(build_model, config),
            loss=loss,
            optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
            batches=lambda seed: Doublings(config, arm, seed),
            steps=config.steps,
            seeds=config.seeds,
            evaluate=partial(evaluate, counts),
            evaluation_data=questions,
            evaluate_every=config.evaluate_every,
            chunk=min(50, config.evaluate_every, config.steps),
            ctx=ctx,
            name=arm,
        )
        graph = result.graphdef

        @jax.jit
        def by_x(values: Any, questions: Any) -> dict[str, jax.Array]:
            return accuracy_by_x(counts, nnx.merge(graph, *values, copy=True), questions)

        every = result.params, result.other
        kept = [
            by_x(jax.tree.map(lambda leaf, i=i: leaf[i], every), questions)
            for i in range(len(config.seeds))
        ]
        arrays = {name: np.stack([np.asarray(each[name]) for each in kept]) for name in counts}
        ctx.save_arrays(f"accuracy-{arm}", **arrays)
        metrics = {name: values.mean(1).tolist() for name, values in arrays.items()}
        metrics["reach"] = [float(reach(row)) for row in arrays["held_out"]]
        # The last quarter of all x.
        metrics["last"] = arrays["held_out"][:, 3 * config.doublings // 4 :].mean(1).tolist()
        metrics["steps_per_second"] = [result.steps_per_second] * len(config.seeds)
        return metrics

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        files = training_curves(ctx)
        kept = {}
        for arm in results.arms:
            try:
                kept[arm] = ctx.load_arrays(f"accuracy-{arm}")
            except KeyError:
                continue
        if not kept:
            return files
        path = ctx.run_dir / "plots" / "accuracy.png"
        with figure(path) as axis:
            for arm, arrays in kept.items():
                color = f"C{ARMS.index(arm)}"
                times = np.arange(1, arrays["held_out"].shape[1] + 1)
                for name, style in (("held_out", "-"), ("trained", ":"), ("power", "--")):
                    label = f"{arm}, {'a = 1' if name == 'power' else name.replace('_', ' ')}"
                    axis.plot(times, arrays[name].mean(0), style, color=color, label=label)
                low, high = arrays["held_out"].min(0), arrays["held_out"].max(0)
                axis.fill_between(times, low, high, color=color, alpha=0.15, lw=0)
            axis.set_xlabel("x, doublings")
            axis.set_ylabel("answers that are right")
            axis.set_ylim(-0.03, 1.03)
            axis.set_title("The digits of a · 2^x", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=7)
        return [*files, path]


# --- claims ------------------------------------------------------------------------------------


def _long_enough(results: Results) -> Verdict | None:
    steps = results.config.steps
    return None if steps >= 500 else Verdict("not testable", f"{steps} steps of training")


def _direct_fails(results: Results) -> Verdict:
    if (short := _long_enough(results)) is not None:
        return short
    far, last = results.metric("direct", "reach"), results.mean("direct", "last")
    most = results.config.doublings
    return Verdict.of(
        bool((far < most).all()) and last <= 0.1,
        f"most answers right up to x = {far.min():.0f} … {far.max():.0f} of {most}; in the last "
        f"quarter {100 * last:.1f} % (at most 10 % asked)",
    )


def _chain_holds(results: Results) -> Verdict:
    if (short := _long_enough(results)) is not None:
        return short
    far, last = results.metric("chain", "reach"), results.mean("chain", "last")
    most = results.config.doublings
    return Verdict.of(
        bool((far == most).all()) and last >= 0.9,
        f"most answers right up to x = {far.min():.0f} of {most}; in the last quarter "
        f"{100 * last:.1f} % (at least 90 % asked)",
    )


def _further(results: Results) -> Verdict:
    if (short := _long_enough(results)) is not None:
        return short
    direct, chain = results.metric("direct", "reach"), results.metric("chain", "reach")
    return Verdict.of(
        bool((chain > direct).all()), f"direct {direct.max():.0f}, chain {chain.min():.0f}"
    )


Scratchpad.claims = (
    Claim("Asked at once, the answer fails beyond some x.", SOURCE, _direct_fails),
    Claim("By a chain of doublings it holds up to the largest x.", SOURCE, _chain_holds),
    Claim("The chain goes further than the direct answer, for every seed.", SOURCE, _further),
)
