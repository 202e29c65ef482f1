"""Byte-level language models: quantised keys against full attention and against a window alone.

All arms are the same transformer of gated single-head layers (two of them take the place of one
attention and its MLP); what differs is what a query sees: everything by one score a key (`full`),
the last two blocks by one score a key and everything older by one score a code (`vq`), or the last
two blocks alone (`no-cache`). After training, the models with codes write on from a prompt, byte
by byte, with a state whose size does not grow.

    jaxkit run vq-language-model --preset cpu
    jaxkit run vq-language-model --preset gpu --data enwik8

Sources: Lingle 2023 (arXiv 2309.16354); post 9844 on kexue.fm.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.attention.vq import VQTransformer, bits_per_byte, next_token_loss
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.plots import figure, training_curves
from jaxkit_experiments.speed import measure
from jaxkit_experiments.training import train
from jaxkit_experiments.vq.text import Windows, held_out, read_corpus, readable

__all__ = ["ARMS", "LanguageModel", "LanguageModelConfig", "build_model"]

# Options of the attention; "codes" multiplies the config's number of codes.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "vq": {"codes": 1},
    "vq-half": {"codes": 0.5},
    "vq-double": {"codes": 2},
    "full": {"quantizer": "none"},
    "no-cache": {"cache": False},
}
# Of a page of output.
COLUMNS = 100


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """A byte-level language model.

    Attributes:
      arms: what to compare.
      seeds: one model for each; trained side by side.
      steps: training steps.
      batch_size: windows in a batch.
      length: T, predicted bytes of a window.
      block_length: L, also the window of the biases.
      codes: S.
      model_dim: width; values have twice as many features.
      key_dim: of queries and keys.
      layers: number of gated layers.
      bias: "xl" (Transformer-XL's), "table" or "none".
      learning_rate: greatest; warm-up, then a cosine to a tenth.
      warmup: steps of the warm-up.
      weight_decay: of AdamW.
      clip: greatest norm of the gradient.
      dropout: rate on what a layer adds to the residual stream.
      layer_drop: rate at which a sequence skips a layer.
      commitment: weight of the commitment loss.
      decay: γ of the codebooks' moving averages.
      dtype: of the activations.
      remat: compute a layer's activations again in the backward pass instead of keeping them.
      evaluate_every: steps between evaluations on the validation part.
      windows: held-out windows, spread over the part.
      prompt: bytes that a sample goes on from.
      sample: bytes to write.
      temperature: of the samples.
      lengths: where the speed of a training step is measured, besides T; empty for nowhere.
    """

    arms: tuple[str, ...] = ("vq", "full", "no-cache")
    seeds: tuple[int, ...] = (0,)
    steps: int = 600
    batch_size: int = 4
    length: int = 512
    block_length: int = 32
    codes: int = 64
    model_dim: int = 128
    key_dim: int = 32
    layers: int = 2
    bias: str = "xl"
    learning_rate: float = 4e-3
    warmup: int = 50
    weight_decay: float = 2e-4
    clip: float = 1.0
    dropout: float = 0.0
    layer_drop: float = 0.0
    commitment: float = 1e-4
    decay: float = 0.99
    dtype: str = "float32"
    remat: bool = False
    evaluate_every: int = 100
    windows: int = 64
    prompt: int = 128
    sample: int = 400
    temperature: float = 0.8
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        for name in (
            "steps",
            "batch_size",
            "length",
            "block_length",
            "model_dim",
            "key_dim",
            "layers",
            "evaluate_every",
            "windows",
            "prompt",
            "sample",
        ):
            check_int(name, getattr(self, name), least=1)
        check_int("codes", self.codes, least=2)
        check_int("warmup", self.warmup, least=0)
        for length in self.lengths:
            check_int("lengths", length, least=1)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("learning_rate", "clip"):
            check_real(name, getattr(self, name), above=0.0)
        for name in ("weight_decay", "dropout", "layer_drop", "commitment", "temperature"):
            check_real(name, getattr(self, name), least=0.0)
        if self.prompt > self.length:
            raise ValueError(f"prompt must be at most length = {self.length}; got {self.prompt}.")


class _Remat(nnx.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block: Any):
        self.block = block

    @property
    def attention(self) -> Any:
        return self.block.attention

    def __call__(self, x: jax.Array, *, mask: Any, statistics: bool, key: Any) -> Any:
        graph, values = nnx.split(self.block)

        @jax.checkpoint
        def run(values: Any, x: jax.Array, key: Any) -> Any:
            return nnx.merge(graph, values)(x, mask=mask, statistics=statistics, key=key)

        return run(values, x, key)

    def step(self, *arguments: Any, **options: Any) -> Any:
        return self.block.step(*arguments, **options)

    def prefill(self, *arguments: Any, **options: Any) -> Any:
        return self.block.prefill(*arguments, **options)


def build_model(config: LanguageModelConfig, arm: str, key: jax.Array) -> VQTransformer:
    """The model of one arm.

    Example:
      >>> tiny = LanguageModelConfig(length=16, prompt=4, block_length=4, codes=4, model_dim=8)
      >>> model = build_model(tiny, "no-cache", jax.random.key(0))
      >>> model(jnp.zeros((1, 16), jnp.int32)).shape
      (1, 16, 256)
    """
    check_choice("arm", arm, ARMS)
    options = dict(ARMS[arm])
    codes = max(1, round(config.codes * options.pop("codes", 1)))
    model = VQTransformer(
        256,
        dim=config.model_dim,
        layers=config.layers,
        dropout=config.dropout,
        layer_drop=config.layer_drop,
        key_dim=config.key_dim,
        num_codes=codes,
        block_length=config.block_length,
        bias=config.bias,
        decay=config.decay,
        dtype=jnp.dtype(config.dtype),
        rngs=nnx.Rngs(key),
        **options,
    )
    if config.remat:
        blocks: list[Any] = [_Remat(block) for block in model.blocks]
        model.blocks = nnx.List(blocks)
    return model


def build_optimizer(config: LanguageModelConfig) -> optax.GradientTransformation:
    """AdamW as in the paper: clipped gradients, warm-up, a cosine to a tenth of the rate."""
    warmup = min(config.warmup, config.steps - 1)
    rate = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.learning_rate,
        config.learning_rate,
        warmup,
        config.steps,
        config.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=config.weight_decay),
    )


def split(windows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bytes of a window, and what follows each."""
    return windows[..., :-1], windows[..., 1:]


def loss(config: LanguageModelConfig, model: VQTransformer, batch: Any, key: jax.Array) -> Any:
    """Cross-entropy plus the weighted commitment loss; the codes move by their keys."""
    inputs, targets = split(batch["bytes"])
    drops = config.dropout > 0 or config.layer_drop > 0
    value, aux = next_token_loss(
        model,
        inputs,
        targets=targets,
        commitment_weight=config.commitment,
        key=key if drops else None,
    )
    model.update_codebooks(aux.statistics)
    return value, {"bits_per_byte": bits_per_byte(aux.cross_entropy)}


def evaluate(model: VQTransformer, windows: jax.Array) -> dict[str, jax.Array]:
    """Bits per byte over windows `[batches, batch, T + 1]`; commitment and codes in use a layer."""

    def one(batch: jax.Array) -> Any:
        inputs, targets = split(batch)
        _, aux = next_token_loss(model, inputs, targets=targets)
        return aux.cross_entropy, aux.commitment, tuple(each.counts for each in aux.statistics)

    nats, commitment, counts = jax.lax.map(one, windows)
    metrics = {"bits_per_byte": bits_per_byte(jnp.mean(nats))}
    if counts:
        used = [jnp.sum(jnp.any(each > 0, axis=0), dtype=jnp.int32) for each in counts]
        metrics |= {
            "commitment": jnp.mean(commitment) / len(counts),
            "codes": jnp.mean(jnp.stack(used).astype(nats.dtype)),
        }
    return metrics


def decode_logits(model: VQTransformer, tokens: jax.Array) -> jax.Array:
    """Logits `[batch, length, 256]` of the stream: byte by byte, in a state of fixed size."""
    graph, values = nnx.split(model)

    def body(state: Any, token: jax.Array) -> Any:
        logits, state = nnx.merge(graph, values).step(state, token)
        return state, logits

    _, logits = jax.lax.scan(body, model.init_state(tokens.shape[:1]), tokens.T)
    return jnp.moveaxis(logits, 0, 1)


def step_speed(config: LanguageModelConfig, arm: str, length: int) -> float:
    """Bytes per second of a training step on one window of `length`; NaN where it does not fit."""
    config = dataclasses.replace(config, length=length)
    parts: Any = nnx.split(build_model(config, arm, jax.random.key(0)), nnx.Param, ...)
    graph, params, rest = parts

    def gradient(params: Any, rest: Any, window: jax.Array, key: jax.Array) -> Any:
        def objective(params: Any) -> Any:
            return loss(config, nnx.merge(graph, params, rest, copy=True), {"bytes": window}, key)

        return jax.value_and_grad(objective, has_aux=True)(params)

    window = jnp.zeros((1, length + 1), jnp.int32)
    arguments = params, rest, window, jax.random.key(0)
    compiled = jax.jit(gradient).lower(*arguments).compile()
    plan, room = compiled.memory_analysis(), measure.available_memory()
    if plan is not None and room is not None and plan.temp_size_in_bytes > room:
        return math.nan
    timing = measure.compare({arm: partial(compiled, *arguments)}, repeats=3)[arm]
    return length / timing.median


class LanguageModel(Experiment):
    """Train every arm on the same bytes."""

    name = "vq-language-model"
    title = "Byte-level language models with quantised keys"
    description = (
        "The source of the Python standard library (or --data: enwik8, any file, any folder of "
        ".py files), 90 % to train, 5 % to validate, 5 % to test. Test windows start without "
        "context."
    )
    sources = ("arXiv 2309.16354", "kexue.fm 9844")
    config_class = LanguageModelConfig
    arms = tuple(ARMS)
    columns = ("bits_per_byte", "perplexity", "codes", "bytes_per_second", "seconds")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "vq": {"bits_per_byte": 1.010},
        "no-cache": {"bits_per_byte": 1.026},
    }
    paper_note = (
        "The paper's numbers: Enwik8, validation, 190 million parameters, T = 8192, L = 512, "
        "S = 256 (0.99 on the test part with the final model)."
    )
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": LanguageModelConfig(
            arms=("vq", "full"),
            steps=10,
            layers=1,
            batch_size=2,
            length=32,
            block_length=8,
            codes=8,
            model_dim=16,
            key_dim=8,
            warmup=2,
            evaluate_every=10,
            windows=4,
            prompt=16,
            sample=32,
        ),
        "cpu": LanguageModelConfig(),
        "gpu": LanguageModelConfig(
            arms=("vq", "vq-half", "vq-double", "full", "no-cache"),
            steps=50_000,
            batch_size=8,
            length=8192,
            block_length=512,
            codes=512,
            model_dim=768,
            key_dim=128,
            layers=24,
            learning_rate=4e-4,
            warmup=5000,
            clip=0.1,
            dropout=0.5,
            layer_drop=0.3,
            dtype="bfloat16",
            remat=True,
            evaluate_every=1000,
            windows=608,
            prompt=512,
            sample=2000,
            lengths=(2048, 8192, 32_768, 131_072),
        ),
    }

    def run_arm(self, config: Any, arm: str, ctx: Context) -> Mapping[str, list[float]]:
        corpus = read_corpus(ctx.data)
        parts = {
            name: held_out(
                getattr(corpus, name),
                config.length,
                count=config.windows,
                batch_size=min(config.batch_size, config.windows),
            )
            for name in ("validation", "test")
        }
        start = time.perf_counter()
        result = train(
            init=partial(build_model, config, arm),
            loss=partial(loss, config),
            optimizer=build_optimizer(config),
            batches=lambda seed: Windows(corpus.train, seed, config.batch_size, config.length),
            steps=config.steps,
            seeds=config.seeds,
            evaluate=evaluate,
            evaluation_data=parts["validation"],
            evaluate_every=config.evaluate_every,
            chunk=min(50, config.evaluate_every, config.steps),
            ctx=ctx,
            name=arm,
        )
        seconds = time.perf_counter() - start
        count = len(config.seeds)
        models = [result.model(index) for index in range(count)]
        graph = nnx.graphdef(models[0])
        test = jnp.asarray(parts["test"])
        on_test = jax.jit(lambda values: evaluate(nnx.merge(graph, values), test))
        metrics: dict[str, list[float]] = {}
        for model in models:
            for name, value in on_test(nnx.state(model)).items():
                metrics.setdefault(name, []).append(float(value))
        metrics["perplexity"] = [2.0**bits for bits in metrics["bits_per_byte"]]
        metrics["validation"] = result.metrics["bits_per_byte"].tolist()
        size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(models[0], nnx.Param)))
        metrics["parameters"] = [float(size)] * count
        speed = result.steps_per_second * config.batch_size * config.length
        metrics["bytes_per_second"] = [speed] * count
        metrics["seconds"] = [seconds] * count
        if models[0].quantized:
            metrics |= self._write_on(config, arm, models, parts["test"], ctx)
        if config.lengths:
            speeds = [step_speed(config, arm, length) for length in config.lengths]
            ctx.save_arrays(f"speed-{arm}", lengths=np.array(config.lengths), speeds=speeds)
            for length, of in zip(config.lengths, speeds, strict=True):
                metrics[f"bytes_per_second_{length}"] = [of] * count
        return metrics

    def _write_on(
        self,
        config: LanguageModelConfig,
        arm: str,
        models: list[VQTransformer],
        windows: np.ndarray,
        ctx: Context,
    ) -> dict[str, list[float]]:
        """A sample from every model, and how far its stream is from the form it was trained in."""
        window = jnp.asarray(windows[0, :1, :-1])
        prompt = window[:, : config.prompt]
        graph = nnx.graphdef(models[0])

        @jax.jit
        def write(values: Any, key: jax.Array) -> jax.Array:
            model = nnx.merge(graph, values)
            return model.generate(prompt, config.sample, key=key, temperature=config.temperature)

        @jax.jit
        def difference(values: Any) -> jax.Array:
            model = nnx.merge(graph, values)
            whole, stream = model(window), decode_logits(model, window)
            return jnp.max(jnp.abs(whole - stream)) / jnp.max(jnp.abs(whole))

        metrics: dict[str, list[float]] = {"decode_difference": [], "decode_microseconds": []}
        samples = []
        for seed, model in zip(config.seeds, models, strict=True):
            values, key = nnx.state(model), jax.random.key(seed)
            samples.append(np.asarray(write(values, key))[0])
            start = time.perf_counter()
            jax.block_until_ready(write(values, key))
            seconds = time.perf_counter() - start
            metrics["decode_microseconds"].append(1e6 * seconds / config.sample)
            metrics["decode_difference"].append(float(difference(values)))
        ctx.save_arrays(f"sample-{arm}", prompt=prompt[0], samples=np.stack(samples))
        return metrics

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        files = training_curves(ctx)
        speeds = _kept(results, ctx, "speed")
        if speeds:
            files.append(ctx.run_dir / "plots" / "speed.png")
            with figure(files[-1]) as axis:
                for arm, arrays in speeds.items():
                    axis.loglog(arrays["lengths"], arrays["speeds"], "o-", ms=3, label=arm)
                axis.set_xlabel("length of a window")
                axis.set_ylabel("bytes per second, loss and gradient")
                axis.spines[["top", "right"]].set_visible(False)
                axis.legend(frameon=False, fontsize=8)
        return files

    def epilogue(self, results: Results, ctx: Context) -> str | None:
        texts = []
        for arm, arrays in _kept(results, ctx, "sample").items():
            prompt, sample = readable(arrays["prompt"]), readable(arrays["samples"][0])
            bits = results.mean(arm, "bits_per_byte")
            texts.append(
                f"{arm}, {bits:.3f} bits per byte, goes on from ┃, "
                f"{len(arrays['samples'][0])} bytes by a state of fixed size:\n\n{prompt}┃{sample}"
            )
        return ("\n\n" + "─" * COLUMNS + "\n").join(texts) or None


def _kept(results: Results, ctx: Context, kind: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays that the arms have kept under `kind`."""
    found = {}
    for arm in results.arms:
        try:
            found[arm] = ctx.load_arrays(f"{kind}-{arm}")
        except KeyError:
            continue
    return found


# --- claims ------------------------------------------------------------------------------------


def _cache_gain(results: Results) -> Verdict:
    vq, local = (results.mean(arm, "bits_per_byte") for arm in ("vq", "no-cache"))
    detail = f"no-cache {local:.3f}, vq {vq:.3f}: {local - vq:+.3f} bits, at least +0.01 asked"
    if results.has("full", "bits_per_byte"):
        # What there is to be had of the past, for a model of this size after these steps.
        detail += f"; full attention: {local - results.mean('full', 'bits_per_byte'):+.3f}"
    return Verdict.of(local - vq >= 0.01, detail)


def _near_full(results: Results) -> Verdict:
    vq, full = (results.mean(arm, "bits_per_byte") for arm in ("vq", "full"))
    if full > 5:  # the bytes one by one need less
        return Verdict("not testable", f"full attention has learnt nothing yet: {full:.3f} bits")
    return Verdict.of(vq - full <= 0.05, f"vq {vq:.3f}, full {full:.3f}: {vq - full:+.3f} bits")


def _more_codes(results: Results) -> Verdict:
    few, some, many = (results.mean(arm, "bits_per_byte") for arm in ("vq-half", "vq", "vq-double"))
    return Verdict.of(
        few >= some - 0.002 and some >= many - 0.002,
        f"{few:.3f}, {some:.3f}, {many:.3f} bits as the number of codes doubles; 0.002 allowed",
    )


def _stream(results: Results) -> Verdict:
    worst = {
        arm: float(results.metric(arm, "decode_difference").max())
        for arm in results.arms
        if results.has(arm, "decode_difference")
    }
    if not worst:
        return Verdict("not testable", "no arm with a state of fixed size")
    allowed = 1e-3 if results.config.dtype == "float32" else 5e-2
    arm = max(worst, key=lambda arm: worst[arm])
    return Verdict.of(
        worst[arm] <= allowed,
        f"logits differ by at most {worst[arm]:.1e} of the largest ({arm}), {allowed:g} allowed",
    )


def _faster(length: int, factor: float) -> Callable[[Results], Verdict]:
    def check(results: Results) -> Verdict:
        if length not in results.config.lengths:
            return Verdict("not testable", f"speed was not measured at length {length}")
        name = f"bytes_per_second_{length}"
        vq, full = results.mean("vq", name), results.mean("full", name)
        return Verdict.of(
            vq > factor * full,
            f"T={length}: vq {vq:.3g}, full {full:.3g} bytes per second: {vq / full:.2f}x, more "
            f"than {factor:g}x asked",
        )

    return check


LanguageModel.claims = (
    Claim(
        "The cache of codes is worth at least 0.01 bits per byte over a window alone.",
        "arXiv 2309.16354 (Enwik8, S = 256: 1.010 with it, 1.026 without)",
        _cache_gain,
    ),
    Claim(
        "Quantised keys cost at most 0.05 bits per byte against full attention.",
        "kexue.fm 9844; arXiv 2309.16354",
        _near_full,
    ),
    Claim(
        "More codes are not worse.", "arXiv 2309.16354, ablation of the codebook size", _more_codes
    ),
    Claim(
        "The model that writes byte by byte in a state of fixed size is the one that was trained.",
        "arXiv 2309.16354, section 3",
        _stream,
    ),
    Claim("Training is more than 3 times as fast at 8k.", "arXiv 2309.16354", _faster(8192, 3.0)),
    Claim(
        "Training is more than 12 times as fast at 32k.", "arXiv 2309.16354", _faster(32_768, 12.0)
    ),
)
