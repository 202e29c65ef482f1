"""Does the cache of codes bring back what a window forgets? In-context Markov chains.

Each sequence has a transition matrix of its own, so that a model can only count, and the counts
that matter lie anywhere in the past. A window of two blocks sees some 24 transitions; the cache of
Transformer-VQ keeps, for every code, how many older keys had it and the mean of their values. Here
a key that tells the previous symbol is all that a code must resolve: 8 codes would do.

One gated single-head layer and a read-out, on the sum of an embedding of x_t and one of x_{t−1}.
The best predictor for what each arm may see is known in closed form (arms `bayes`).

    jaxkit run vq-markov --preset cpu      two minutes on two cores; too short to use few codes well
    jaxkit run vq-markov --preset pilot    five minutes: the card's own steps and batches

Sources: Lingle 2023 (arXiv 2309.16354); post 9844 on kexue.fm.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.attention.vq import VQAttention
from jaxkit.attention.vq.layers import rms_norm
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.plots import figure, training_curves
from jaxkit_experiments.speed import measure
from jaxkit_experiments.training import train
from jaxkit_experiments.vq.chains import Chains, bayes_bits, chains, first_visible

__all__ = ["ARMS", "ChainModel", "Markov", "MarkovConfig"]

BAYES = ("bayes", "bayes-31", "bayes-24", "bayes-window")
CODES = {"vq-32": 32, "vq-8": 8, "vq-4": 4, "vq-2": 2, "vq-1": 1}
TRAINED = ("full", *CODES, "no-cache")
ARMS = (*BAYES, *TRAINED)
TIMED = ("full", "vq-32")


@dataclasses.dataclass(frozen=True)
class MarkovConfig:
    """In-context Markov chains.

    Attributes:
      arms: predictors to compare.
      seeds: one model for each; trained side by side.
      steps: training steps.
      batch_size: chains in a batch, fresh ones in every step.
      test: chains to test on, the same for every arm.
      symbols: of a chain.
      concentration: α of the Dirichlet distribution of each row.
      length: T, transitions of a chain.
      block_length: L, also the window of the bias.
      model_dim: width; values have twice as many features.
      key_dim: of queries and keys.
      learning_rate: of Adam, by a cosine schedule to zero.
      commitment: weight of the commitment loss.
      decay: γ of the codebook's moving averages.
      evaluate_every: steps between tests.
      lengths: where the seconds of a training step are measured; empty for nowhere.
    """

    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 500
    batch_size: int = 32
    test: int = 256
    symbols: int = 8
    concentration: float = 0.3
    length: int = 256
    block_length: int = 16
    model_dim: int = 32
    key_dim: int = 16
    learning_rate: float = 4e-3
    commitment: float = 1e-2
    decay: float = 0.99
    evaluate_every: int = 100
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        for name in ("steps", "batch_size", "test", "model_dim", "key_dim", "evaluate_every"):
            check_int(name, getattr(self, name), least=1)
        check_int("block_length", self.block_length, least=1)
        check_int("length", self.length, least=2)
        check_int("symbols", self.symbols, least=2)
        for length in self.lengths:
            check_int("lengths", length, least=1)
        for name in ("concentration", "learning_rate"):
            check_real(name, getattr(self, name), above=0.0)
        check_real("commitment", self.commitment, least=0.0)
        check_real("decay", self.decay, least=0.0, most=1.0)


class ChainModel(nnx.Module):
    """Embeddings of x_t and x_{t−1}, one gated single-head layer, a read-out.

    The layer is the paper's, with a table of biases over the lags 0 … L and one thing more: queries
    have a learnt scale, e at first, since |q · k| ≤ √dk = 4 leaves the softmax too flat to count.

    Args:
      config: sizes.
      arm: "full" (no codes), "vq-S" or "no-cache" (32 codes, attention within two blocks).
      rngs: source of the initial parameters and codes.

    Example:
      >>> model = ChainModel(MarkovConfig(length=8, block_length=2), "vq-4", rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((3, 8), jnp.int32)).shape
      (3, 8, 8)
    """

    def __init__(self, config: MarkovConfig, arm: str, *, rngs: nnx.Rngs):
        check_choice("arm", arm, TRAINED)
        width = config.model_dim
        self.symbols = config.symbols
        self.now = nnx.Embed(config.symbols, width, rngs=rngs)
        # One more: nothing stands before the first symbol.
        self.before = nnx.Embed(config.symbols + 1, width, rngs=rngs)
        self.layer = VQAttention(
            width,
            key_dim=config.key_dim,
            num_codes=CODES.get(arm, 32),
            block_length=config.block_length,
            bias="table",
            quantizer="none" if arm == "full" else "hard",
            cache=arm != "no-cache",
            query_scale=math.e,
            decay=config.decay,
            rngs=rngs,
        )
        self.head = nnx.Linear(width, config.symbols, rngs=rngs)

    @property
    def quantized(self) -> bool:
        """Whether keys have codes."""
        return self.layer.quantizer == "hard"

    def embed(self, tokens: jax.Array) -> jax.Array:
        """What the layer sees, `[batch, length, model_dim]`."""
        previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=self.symbols)
        return self.now(tokens) + self.before(previous)

    def __call__(self, tokens: jax.Array, *, statistics: bool = False) -> Any:
        """Logits of the next symbol `[batch, length, symbols]`, and the layer's statistics."""
        x = self.embed(tokens)
        if not statistics:
            return self.head(rms_norm(x + self.layer(x)))
        y, found = self.layer(x, statistics=True)
        return self.head(rms_norm(x + y)), found


def per_token_bits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """−log₂ of the probability given to each target."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets) / math.log(2)


def split(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inputs x_0 … x_{T−1} and targets x_1 … x_T."""
    return tokens[:, :-1], tokens[:, 1:]


def loss(config: MarkovConfig, model: ChainModel, batch: Any, key: jax.Array) -> Any:
    """Cross-entropy plus the weighted commitment loss; the codes move by their keys."""
    inputs, targets = split(batch["tokens"])
    commitment = 0.0
    if model.quantized:
        logits, found = model(inputs, statistics=True)
        commitment = found.commitment
        model.layer.update_codebook(found)
    else:
        logits = model(inputs)
    bits = jnp.mean(per_token_bits(logits, targets))
    return bits * math.log(2) + config.commitment * commitment, {"bits": bits}


def evaluate(model: ChainModel, batch: Any) -> dict[str, jax.Array]:
    """Bits per token over the second half; how far keys are from their codes; codes in use."""
    inputs, targets = split(batch["tokens"])
    metrics = {}
    if model.quantized:
        logits, found = model(inputs, statistics=True)
        used = jnp.sum(found.counts > 0, dtype=jnp.int32).astype(logits.dtype)
        metrics = {"commitment": found.commitment, "codes": used}
    else:
        logits = model(inputs)
    bits = per_token_bits(logits, targets)
    return {"bits": jnp.mean(bits[:, targets.shape[1] // 2 :])} | metrics


def held_out_chains(config: MarkovConfig) -> np.ndarray:
    """The chains that every arm is tested on, `[test, T + 1]`; no training seed draws them."""
    return chains(
        np.random.default_rng(2**32),
        config.test,
        config.length,
        symbols=config.symbols,
        concentration=config.concentration,
    )


def reference_bits(config: MarkovConfig, arm: str, tokens: np.ndarray) -> np.ndarray:
    """Bits `[chains, T]` of the best predictor that sees what the arm sees."""
    sees: Mapping[str, Mapping[str, int]] = {
        "bayes": {},
        "bayes-31": {"last": 31},
        "bayes-24": {"last": 24},
        "bayes-window": {"block_length": config.block_length},
    }
    check_choice("arm", arm, sees)
    return bayes_bits(
        tokens,
        first_visible(config.length, **sees[arm]),
        symbols=config.symbols,
        concentration=config.concentration,
    )


def second_half(bits: np.ndarray) -> float:
    """Mean over all chains and the positions from T/2 on."""
    return float(bits[:, bits.shape[1] // 2 :].mean())


def step_times(config: MarkovConfig, arm: str) -> np.ndarray:
    """Seconds of loss and gradient of one chain, for each of `config.lengths`."""
    model = ChainModel(config, arm, rngs=nnx.Rngs(0))
    parts: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = parts

    @jax.jit
    def gradient(params: Any, tokens: jax.Array) -> Any:
        def objective(params: Any) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            return loss(config, model, {"tokens": tokens}, jax.random.key(0))[0]

        return jax.value_and_grad(objective)(params)

    calls = {}
    for length in config.lengths:
        drawn = Chains(0, 1, length, config.symbols, config.concentration)[0]["tokens"]
        calls[str(length)] = partial(gradient, params, jnp.asarray(drawn))
    timings = measure.compare(calls, repeats=3)
    return np.array([timings[str(length)].median for length in config.lengths])


class Markov(Experiment):
    """Train every arm on chains that no model has seen before."""

    name = "vq-markov"
    title = "In-context Markov chains: what the cache of codes remembers"
    description = (
        "Chains with a fresh transition matrix each; bits per token over the second half. The arms "
        "`bayes` are the best that is possible: with all of the past, with the last 31 or 24 "
        "transitions, and with the two blocks that attention without a cache sees."
    )
    sources = ("arXiv 2309.16354", "kexue.fm 9844")
    config_class = MarkovConfig
    arms = ARMS
    columns = ("bits", "excess", "codes", "commitment", "slope", "seconds")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "bayes": {"bits": 1.967},
        "bayes-31": {"bits": 2.346},
        "bayes-24": {"bits": 2.417},
        "full": {"bits": 2.000},
        "vq-32": {"bits": 2.017},
        "vq-8": {"bits": 2.031},
        "vq-4": {"bits": 2.133},
        "vq-2": {"bits": 2.147},
        "vq-1": {"bits": 2.350},
        "no-cache": {"bits": 2.433},
    }
    paper_note = (
        "Not the paper's: a pilot of one seed (500 steps, batches of 32) on 128 chains, which were "
        "harder than most: the mean of the Bayes predictor over many chains is 1.909."
    )
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": MarkovConfig(
            arms=("bayes", "bayes-window", "full", "vq-4"),
            seeds=(0,),
            steps=10,
            batch_size=4,
            test=8,
            length=32,
            block_length=4,
            model_dim=8,
            key_dim=4,
            evaluate_every=10,
            lengths=(),
        ),
        "cpu": MarkovConfig(steps=300, batch_size=16, lengths=(512, 1024, 2048, 4096)),
        "pilot": MarkovConfig(),
        "gpu": MarkovConfig(steps=5000, batch_size=128, length=1024, test=1024),
    }

    def run_arm(self, config: Any, arm: str, ctx: Context) -> Mapping[str, list[float]]:
        test = held_out_chains(config)
        best = reference_bits(config, "bayes", test)
        if arm in BAYES:
            bits = reference_bits(config, arm, test)
            ctx.save_arrays(f"positions-{arm}", bits=bits.mean(0)[None])
            half = second_half(bits)
            excess = half - second_half(best)
            return {
                "bits": [half] * len(config.seeds),
                "excess": [excess] * len(config.seeds),
            }
        start = time.perf_counter()
        result = train(
            init=lambda key: ChainModel(config, arm, rngs=nnx.Rngs(key)),
            loss=partial(loss, config),
            optimizer=optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)),
            batches=lambda seed: Chains(
                seed, config.batch_size, config.length, config.symbols, config.concentration
            ),
            steps=config.steps,
            seeds=config.seeds,
            evaluate=evaluate,
            evaluation_data={"tokens": test},
            evaluate_every=config.evaluate_every,
            chunk=min(50, config.evaluate_every, config.steps),
            ctx=ctx,
            name=arm,
        )
        seconds = time.perf_counter() - start
        count = len(config.seeds)
        metrics = {name: values.tolist() for name, values in result.metrics.items()}
        metrics["excess"] = [bits - second_half(best) for bits in metrics["bits"]]
        self._keep_profiles(config, arm, [result.model(i) for i in range(count)], ctx)
        metrics["steps_per_second"] = [result.steps_per_second] * count
        metrics["seconds"] = [seconds] * count
        if arm in TIMED and config.lengths:
            times = step_times(config, arm)
            ctx.save_arrays(f"times-{arm}", lengths=np.array(config.lengths), seconds=times)
            if len(times) > 1:
                metrics["slope"] = [measure.fit_slope(config.lengths, times)] * count
        return metrics

    def _keep_profiles(
        self, config: MarkovConfig, arm: str, models: list[ChainModel], ctx: Context
    ) -> None:
        """Bits at every position, and how many keys of the test fall to each code."""
        inputs, targets = split(jnp.asarray(held_out_chains(config)))
        graph = nnx.graphdef(models[0])

        @jax.jit
        def profiles(values: Any) -> Any:
            model = nnx.merge(graph, values, copy=True)
            if not model.quantized:
                logits, counts = model(inputs), None
            else:
                logits, found = model(inputs, statistics=True)
                counts = found.counts[0]
            return jnp.mean(per_token_bits(logits, targets), axis=0), counts

        kept = [profiles(nnx.state(model)) for model in models]
        ctx.save_arrays(f"positions-{arm}", bits=np.stack([bits for bits, _ in kept]))
        if models[0].quantized:
            ctx.save_arrays(f"codes-{arm}", counts=np.stack([counts for _, counts in kept]))

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        files = training_curves(ctx)
        for draw in (_plot_positions, _plot_codes, _plot_times):
            path = draw(results, ctx)
            files += [path] if path is not None else []
        return files


def _arrays(results: Results, ctx: Context, kind: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays that the arms have kept under `kind`."""
    found = {}
    for arm in results.arms:
        try:
            found[arm] = ctx.load_arrays(f"{kind}-{arm}")
        except KeyError:
            continue
    return found


def _plot_positions(results: Results, ctx: Context) -> Path | None:
    """Bits per token against the position, in bins of some positions."""
    kept = _arrays(results, ctx, "positions")
    if not kept:
        return None
    path = ctx.run_dir / "plots" / "positions.png"
    with figure(path) as axis:
        for arm, arrays in kept.items():
            bits = arrays["bits"]
            width = max(1, bits.shape[1] // 32)
            usable = bits.shape[1] - bits.shape[1] % width
            binned = bits[:, :usable].reshape(len(bits), -1, width).mean(-1)
            middle = (np.arange(binned.shape[1]) + 0.5) * width
            dashed = {"ls": "--", "color": "0.5"} if arm in BAYES else {}
            label = arm if arm not in BAYES[1:] else None
            (line,) = axis.plot(middle, binned.mean(0), label=label, lw=1.2, **dashed)
            if len(bits) > 1:
                axis.fill_between(
                    middle, binned.min(0), binned.max(0), color=line.get_color(), alpha=0.15, lw=0
                )
            if label is None:
                end = middle[-1], binned[0, -1]
                axis.annotate(arm, end, fontsize=6, color="0.4", ha="right", va="bottom")
        axis.set_xlabel("position")
        axis.set_ylabel("bits per token")
        axis.set_title("What each arm has learnt of the chain so far", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7, ncols=2)
    return path


def _plot_codes(results: Results, ctx: Context) -> Path | None:
    """How much of the keys falls to each code, most used first."""
    kept = _arrays(results, ctx, "codes")
    if not kept:
        return None
    path = ctx.run_dir / "plots" / "codes.png"
    with figure(path) as axis:
        for arm, arrays in kept.items():
            counts = arrays["counts"]
            share = np.sort(counts / counts.sum(1, keepdims=True), axis=1)[:, ::-1].mean(0)
            used = (counts > 0).sum(1).mean()
            axis.plot(
                np.arange(1, len(share) + 1), share, "o-", ms=3, lw=1, label=f"{arm}: {used:.3g}"
            )
        axis.set_xscale("log", base=2)
        axis.set_xlabel("code, by rank")
        axis.set_ylabel("share of the keys")
        axis.set_title("Codes used on the test chains", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, title="codes used", title_fontsize=8)
    return path


def _plot_times(results: Results, ctx: Context) -> Path | None:
    """Seconds of a training step of one chain against its length."""
    kept = _arrays(results, ctx, "times")
    if not kept:
        return None
    path = ctx.run_dir / "plots" / "times.png"
    with figure(path) as axis:
        for arm, arrays in kept.items():
            label = arm
            if results.has(arm, "slope"):
                label += f": slope {results.mean(arm, 'slope'):.2f}"
            axis.loglog(arrays["lengths"], arrays["seconds"] * 1e3, "o-", ms=3, label=label)
        axis.set_xlabel("length")
        axis.set_ylabel("milliseconds, loss and gradient of one chain")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    return path


# --- claims ------------------------------------------------------------------------------------

NOISE = 0.02  # bits; what the card asks to take for nothing


def _cache_gain(results: Results) -> Verdict:
    vq, local = results.mean("vq-32", "bits"), results.mean("no-cache", "bits")
    return Verdict.of(
        local - vq > 0.3,
        f"no-cache {local:.3f}, vq-32 {vq:.3f}: {local - vq:+.3f} bits, more than +0.3 asked",
    )


def _near_full(results: Results) -> Verdict:
    full, vq = results.mean("full", "bits"), results.mean("vq-32", "bits")
    return Verdict.of(
        abs(full - vq) < 0.05, f"full {full:.3f}, vq-32 {vq:.3f}: {vq - full:+.3f}, 0.05 allowed"
    )


def _rises_with_codes(results: Results) -> Verdict:
    """full < S32 ≤ S8 < {S4, S2} < S1 < no cache; the first two up to noise."""
    alike = (("full", "vq-32"), ("vq-32", "vq-8"))
    apart = (
        ("vq-8", "vq-4"),
        ("vq-8", "vq-2"),
        ("vq-4", "vq-1"),
        ("vq-2", "vq-1"),
        ("vq-1", "no-cache"),
    )
    mean = {arm: results.mean(arm, "bits") for arm in TRAINED}
    wrong = [
        f"{b} {mean[b]:.3f} < {a} {mean[a]:.3f}" for a, b in alike if mean[b] < mean[a] - NOISE
    ]
    wrong += [
        f"{b} {mean[b]:.3f} not above {a} {mean[a]:.3f}"
        for a, b in apart
        if mean[b] <= mean[a] + NOISE
    ]
    shown = ", ".join(f"{arm} {bits:.3f}" for arm, bits in mean.items())
    return Verdict.of(not wrong, "; ".join(wrong) or shown)


def _eight_suffice(results: Results) -> Verdict:
    eight, more = results.mean("vq-8", "bits"), results.mean("vq-32", "bits")
    return Verdict.of(
        abs(eight - more) < 0.05,
        f"vq-8 {eight:.3f}, vq-32 {more:.3f}: {eight - more:+.3f}, 0.05 allowed",
    )


def _local_optimum(results: Results) -> Verdict:
    local, best = results.mean("no-cache", "bits"), results.mean("bayes-window", "bits")
    return Verdict.of(
        best - NOISE <= local <= best + 0.1,
        f"no-cache {local:.3f}, best within two blocks {best:.3f}: {local - best:+.3f}, between "
        f"-{NOISE:g} and +0.1 asked",
    )


def _none_beats_bayes(results: Results) -> Verdict:
    best = results.mean("bayes", "bits")
    trained = [arm for arm in results.arms if arm in TRAINED]
    if not trained:
        return Verdict("not testable", "no trained arm")
    least = min(trained, key=lambda arm: results.mean(arm, "bits"))
    bits = results.mean(least, "bits")
    return Verdict.of(
        bits >= best - NOISE, f"the best is {least}: {bits:.3f}, Bayes {best:.3f} on these chains"
    )


def _slopes(results: Results) -> Verdict:
    lengths = results.config.lengths
    if len(lengths) < 2 or max(lengths) < 2048:
        return Verdict("not testable", f"times at lengths up to 2048 are needed; got {lengths}")
    full, vq = results.mean("full", "slope"), results.mean("vq-32", "slope")
    return Verdict.of(
        vq <= 1.25 and full >= 1.5,
        f"log-log slopes: vq-32 {vq:.2f} (at most 1.25 asked), full {full:.2f} (at least 1.5)",
    )


Markov.claims = (
    Claim(
        "The cache brings back what a window forgets: more than 0.3 bits.",
        "arXiv 2309.16354 (Enwik8, S = 256: 1.010 bits per byte with it, 1.026 without)",
        _cache_gain,
    ),
    Claim(
        "Quantised keys cost little: VQ with 32 codes is within 0.05 bits of full attention.",
        "arXiv 2309.16354; kexue.fm 9844",
        _near_full,
    ),
    Claim(
        "Quality rises with the number of codes: full < S=32 ≤ S=8 < S=4, S=2 < S=1 < no cache.",
        "arXiv 2309.16354, ablation of the codebook size",
        _rises_with_codes,
    ),
    Claim(
        "... until the codebook resolves the contexts: 8 codes for 8 symbols, within 0.05 bits.",
        "methods card, ablation",
        _eight_suffice,
    ),
    Claim(
        "Without the cache the layer does what can be done with two blocks, and no more.",
        "closed form (Pólya's urn)",
        _local_optimum,
    ),
    Claim("No arm beats the Bayes predictor.", "closed form (Pólya's urn)", _none_beats_bayes),
    Claim(
        "Time is linear in the length with quantised keys, quadratic without.",
        "arXiv 2309.16354, throughput tables",
        _slopes,
    ),
)
