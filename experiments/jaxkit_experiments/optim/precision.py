"""Half precision on the digits: gradients that vanish, batches that overflow, constants that break.

    jaxkit run mixed-precision --preset cpu

Four questions, one group of arms each. *Tiny gradients*: the loss is multiplied by 2^-18, so that
float16 holds almost none of its gradients; does a scaled loss bring them back? *Faults*: the
gradients of some batches are infinite; what is left of the model? *Traps*: a transformer with
paddings in float16, whose mask and ε are those of float32. *Language model*: the toolkit's
Transformer-VQ on the pixels, one after the other; does half precision cost anything?

Sources: Micikevicius et al. 2018 (arXiv 1710.03740); kexue.fm 9059.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.attention.vq import VQTransformer
from jaxkit.optim.loss_scaling import (
    dynamic_loss_scale,
    loss_scale,
    loss_scale_state,
    scaled_value_and_grad,
    static_loss_scale,
)
from jaxkit.optim.precision import Policy, layer_norm, masked_softmax
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.optim.classifiers import Batches, digits
from jaxkit_experiments.plots import figure

__all__ = ["MixedPrecision", "MixedPrecisionConfig"]

TINY = ("float32", "bfloat16", "float16", "float16-static", "float16-dynamic")
FAULTS = ("fault-none", "fault-apply-if-finite", "fault-skip")
TRAPS = ("traps-both", "traps-mask", "traps-epsilon", "traps-none")
LANGUAGE = ("vq-float32", "vq-bfloat16", "vq-float16")
# The card's pilot, the middles of its ranges.
CARD: Mapping[str, tuple[float, float, float]] = {
    "float32": (0.989, 0.0023, 0.109),
    "bfloat16": (0.989, 0.0023, 0.109),
    "float16": (0.092, 2.395, 1.0),
    "float16-static": (0.9885, 0.0025, 0.23),
    "float16-dynamic": (0.9885, 0.0023, 0.12),
}


@dataclasses.dataclass(frozen=True)
class MixedPrecisionConfig:
    """How everything is trained.

    Attributes:
      arms: of the three groups.
      seeds: of weights and batches.
      steps: updates.
      batch_size: images of an update.
      width: of the hidden layers.
      learning_rate: of Adam, whose ε is 1e-12.
      loss_exponent: the loss is multiplied by 2 to this power.
      static_scale: S of `float16-static`.
      growth_interval: of dynamic scaling.
      fault_rate: share of batches whose gradients are infinite.
      fault_run: so many bad batches come in a row half-way; `apply_if_finite` bears five.
      language_layers: of the language model.
      language_steps: its updates.
      language_batch: images of one of them.
      report_every: steps between two reports.
    """

    arms: tuple[str, ...] = TINY + FAULTS + TRAPS + LANGUAGE
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 800
    batch_size: int = 256
    width: int = 64
    learning_rate: float = 3e-3
    loss_exponent: int = -18
    static_scale: float = 1000.0
    growth_interval: int = 100
    fault_rate: float = 0.01
    fault_run: int = 10
    language_layers: int = 2
    language_steps: int = 60
    language_batch: int = 8
    report_every: int = 100

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, MixedPrecision.arms)
        for name in (
            "steps",
            "batch_size",
            "width",
            "growth_interval",
            "language_layers",
            "language_steps",
            "language_batch",
            "report_every",
        ):
            check_int(name, getattr(self, name), least=1)
        check_int("fault_run", self.fault_run, least=0)
        check_real("learning_rate", self.learning_rate, above=0.0)
        check_real("static_scale", self.static_scale, above=0.0)
        check_real("fault_rate", self.fault_rate, least=0.0, most=1.0)


def init_mlp(config: MixedPrecisionConfig, key: jax.Array) -> Any:
    """Three tanh layers' weights, float32."""
    sizes = (64, config.width, config.width, 10)
    keys = jax.random.split(key, 3)
    return {
        f"layer{number}": {
            "w": jax.random.normal(k, (a, b), jnp.float32) / np.float32(np.sqrt(a)),
            "b": jnp.zeros(b, jnp.float32),
        }
        for number, (k, a, b) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def mlp(params: Any, images: jax.Array) -> jax.Array:
    """Logits of images `[batch, 64]`, in the type of the weights."""
    x = images
    for number in range(3):
        layer = params[f"layer{number}"]
        x = x @ layer["w"] + layer["b"][None]
        x = jnp.tanh(x) if number < 2 else x
    return x


def init_transformer(config: MixedPrecisionConfig, key: jax.Array) -> Any:
    """Two blocks of one head on the columns of an image, float32."""
    dim = config.width
    draw = lambda k, a, b: jax.random.normal(k, (a, b), jnp.float32) / np.float32(np.sqrt(a))
    keys = iter(jax.random.split(key, 12))
    blocks = [
        {name: draw(next(keys), dim, dim) for name in ("q", "k", "v", "o", "mlp")} for _ in range(2)
    ]
    return {"embed": draw(next(keys), 8, dim), "blocks": blocks, "read": draw(next(keys), dim, 10)}


def _naive_norm(x: jax.Array) -> jax.Array:
    """Layer norm as float32 code has it: in float16 its ε is zero."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(variance + jnp.asarray(1e-12, jnp.float32).astype(x.dtype))


def _naive_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Masking as float32 code has it, by a constant of 1e12: in float16 that is infinite."""
    hidden = 1 - mask.astype(scores.dtype)
    return jax.nn.softmax(scores - hidden * jnp.asarray(np.inf, scores.dtype), axis=-1)


def transformer(params: Any, images: jax.Array, *, traps: tuple[str, ...]) -> jax.Array:
    """Logits of images `[batch, 64]`, whose columns are tokens; the blank ones are padding."""
    norm = _naive_norm if "epsilon" in traps else layer_norm
    softmax = _naive_softmax if "mask" in traps else masked_softmax
    columns = images.reshape(-1, 8, 8).swapaxes(1, 2)
    seen = jnp.any(columns > 0.1, axis=-1)  # the outer ones are often blank, the rows never
    mask = jnp.broadcast_to(seen[:, None, :], (len(columns), 8, 8))
    x = columns @ params["embed"]
    x = (
        x
        + jnp.sin(
            jnp.arange(8, dtype=x.dtype)[:, None]
            * jnp.linspace(0.1, 1, x.shape[-1]).astype(x.dtype)[None]
        )[None]
    )
    # Padding is a constant row, as it is where padding has an embedding of zeros.
    x = jnp.where(seen[..., None], x, jnp.zeros_like(x))
    for block in params["blocks"]:
        y = norm(x)
        q, k, v = (y @ block[name] for name in ("q", "k", "v"))
        scores = jnp.einsum("bid,bjd->bij", q, k) / jnp.asarray(np.sqrt(q.shape[-1]), q.dtype)
        x = x + jnp.einsum("bij,bjd->bid", softmax(scores, mask), v) @ block["o"]
        x = x + jax.nn.gelu(norm(x) @ block["mlp"])
    pooled = jnp.sum(jnp.where(seen[..., None], x, jnp.zeros_like(x)), axis=1)
    return norm(pooled) @ params["read"]


class Task(NamedTuple):
    """What an arm trains, in which types, and how.

    Attributes:
      init: weights of a random key, and what else the model has that no gradient moves.
      logits: of weights, the rest, and inputs: logits and the rest after them.
      policy: the types.
      optimizer: what moves the weights.
      factor: of the loss.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    logits: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
    policy: Policy
    optimizer: Any
    factor: float = 1.0


def language_model(config: MixedPrecisionConfig, policy: Policy) -> tuple[Any, Any]:
    """`init` and `logits` of the toolkit's Transformer-VQ; its codebooks follow its keys."""

    def build(key: jax.Array) -> VQTransformer:
        return VQTransformer(
            17,
            dim=config.width,
            layers=config.language_layers,
            key_dim=16,
            num_codes=16,
            block_length=8,
            dtype=policy.compute_dtype,
            rngs=nnx.Rngs(key),
        )

    def parts(model: VQTransformer) -> Any:
        return nnx.split(model, nnx.Param, ...)[1:]

    graph = nnx.graphdef(nnx.eval_shape(build, jax.random.key(0)))

    def logits(params: Any, rest: Any, tokens: jax.Array) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        out, statistics = model(tokens, statistics=True)
        model.update_codebooks(statistics)
        return out, parts(model)[1]

    return lambda key: parts(build(key)), logits


def task(config: MixedPrecisionConfig, arm: str) -> Task:
    """The task of an arm."""
    adam = optax.adam(config.learning_rate, eps=1e-12)
    dynamic = partial(dynamic_loss_scale, growth_interval=config.growth_interval)
    half = Policy.parse("float16-mixed")
    policies = {"float32": Policy(), "bfloat16": Policy.parse("bfloat16-mixed")}

    def plain(
        init: Callable[..., Any], logits: Callable[..., Any], *given: Any, **options: Any
    ) -> Task:
        return Task(
            lambda key: (init(config, key), ()),
            lambda params, rest, images: (logits(params, images), rest),
            *given,
            **options,
        )

    if arm in TINY:
        optimizer = {
            "float16-static": static_loss_scale(adam, config.static_scale),
            "float16-dynamic": dynamic(adam),
        }.get(arm, static_loss_scale(adam, 1.0))
        factor = 2.0**config.loss_exponent
        return plain(init_mlp, mlp, policies.get(arm, half), optimizer, factor=factor)
    if arm in FAULTS:
        optimizer = {
            "fault-none": adam,
            "fault-apply-if-finite": optax.apply_if_finite(adam, 5),
            "fault-skip": dynamic(adam),
        }[arm]
        return plain(init_mlp, mlp, half if arm == "fault-skip" else Policy(), optimizer)
    if arm in TRAPS:
        traps = {
            "traps-both": ("mask", "epsilon"),
            "traps-mask": ("mask",),
            "traps-epsilon": ("epsilon",),
            "traps-none": (),
        }[arm]
        return plain(init_transformer, partial(transformer, traps=traps), half, dynamic(adam))
    policy = policies.get(arm.removeprefix("vq-"), half)
    optimizer = dynamic(adam) if policy is half else static_loss_scale(adam, 1.0)
    return Task(*language_model(config, policy), policy, optimizer)


def data(arm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and targets to train on, then to test on: images and digits, or pixel by pixel."""
    images = digits()
    train, test = (x.reshape(-1, 64) for x in (images.train_images, images.test_images))
    if arm not in LANGUAGE:
        return train, images.train_labels, test, images.test_labels
    tokens = [np.rint(16 * x).astype(np.int32) for x in (train, test)]
    return tokens[0][:, :-1], tokens[0][:, 1:], tokens[1][:, :-1], tokens[1][:, 1:]


def faulty(config: MixedPrecisionConfig, seed: int, number: int) -> bool:
    """Whether a step's gradients are infinite in the arms with faults."""
    run = range(config.steps // 2, config.steps // 2 + config.fault_run)
    return number in run or np.random.default_rng((seed, number)).random() < config.fault_rate


def first_layer(grads: Any) -> jax.Array:
    """The gradients of the layer that the inputs meet first."""
    if "layer0" in grads:
        return grads["layer0"]["w"]
    return jnp.asarray(jax.tree.leaves(grads["embedding" if "embedding" in grads else "embed"])[0])


def _scale(opt_state: Any) -> jax.Array:
    """S, or 1 for an optimizer that has none."""
    try:
        return loss_scale(opt_state)
    except ValueError:
        return jnp.ones((), jnp.float32)


class MixedPrecision(Experiment):
    """Train every arm on the same batches."""

    name = "mixed-precision"
    title = "Half precision: loss scaling, bad batches, and constants that float16 cannot hold"
    description = (
        "The digits, 1400 to train and 397 to test. `zeros` is the share of zeros among the "
        "gradients of the first layer, over all steps (some pixels are always blank). For the "
        "language model, `accuracy` is that of the next pixel, one of 17 greys."
    )
    sources = ("arXiv 1710.03740", "kexue.fm 9059")
    config_class = MixedPrecisionConfig
    arms = TINY + FAULTS + TRAPS + LANGUAGE
    columns = ("accuracy", "train_loss", "zeros", "final_scale", "skipped", "seconds")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        arm: dict(zip(("accuracy", "train_loss", "zeros"), values, strict=True))
        for arm, values in CARD.items()
    }
    paper_note = "The numbers beside are the methods card's, the middles of their ranges, 3 seeds."
    presets: ClassVar[Mapping[str, Any]] = {}
    claims: ClassVar[tuple[Claim, ...]] = ()

    def run_arm(self, config: Any, arm: str, ctx: Context) -> Mapping[str, list[float]]:
        init, logits, policy, optimizer, factor = task(config, arm)
        train_x, train_y, test_x, test_y = data(arm)
        language = arm in LANGUAGE
        count = config.language_steps if language else config.steps
        batch_size = min(config.language_batch if language else config.batch_size, len(train_y))
        sources = [Batches(train_x, train_y, batch_size, seed) for seed in config.seeds]

        def mean_loss(out: jax.Array, y: jax.Array) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(out.astype(jnp.float32), y)
            return jnp.mean(losses)

        def step(carry: Any, batch: Any) -> Any:
            params, rest, state = carry
            x, y, bad = batch

            def loss(params: Any, x: jax.Array) -> Any:
                out, after = logits(params, rest, x)
                value = mean_loss(out, y)
                return value * np.float32(factor), (value, after)

            gradients = scaled_value_and_grad(loss, policy=policy, has_aux=True)
            (_, (value, rest)), grads, _ = gradients(_scale(state), params, x)
            zeros = jnp.mean(first_layer(grads) == 0, dtype=jnp.float32)
            if arm in FAULTS:
                grads = jax.tree.map(lambda g: jnp.where(bad, jnp.inf, g), grads)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), rest, state), (value, zeros)

        @jax.jit
        def start(keys: jax.Array) -> Any:
            return jax.vmap(lambda key: (*(made := init(key)), optimizer.init(made[0])))(keys)

        @jax.jit
        def steps(carry: Any, batches: Any) -> Any:
            return jax.vmap(lambda *given: jax.lax.scan(step, *given))(carry, batches)

        @jax.jit
        def evaluate(params: Any, rest: Any, x: jax.Array, y: jax.Array) -> Any:
            def of(params: Any, rest: Any) -> tuple[jax.Array, jax.Array]:
                params, inputs = policy.cast_to_compute(params), policy.cast_to_compute(x)
                out = logits(params, rest, inputs)[0]
                # What is NaN is no answer, and argmax would take it for class 0.
                right = (jnp.argmax(out, axis=-1) == y) & jnp.isfinite(out).all(axis=-1)
                return jnp.mean(right, dtype=jnp.float32), mean_loss(out, y)

            return jax.vmap(of)(params, rest)

        def batches(numbers: range) -> Any:
            found = [[source[number] for number in numbers] for source in sources]
            stack = lambda name: np.asarray([[each[name] for each in row] for row in found])
            bad = [[faulty(config, seed, number) for number in numbers] for seed in config.seeds]
            return stack("images"), stack("labels"), np.asarray(bad)

        carry = start(jnp.stack([jax.random.key(seed) for seed in config.seeds]))
        zeros: list[np.ndarray] = []
        began = time.perf_counter()
        with ctx.progress(arm, count) as progress:
            for first in range(0, count, config.report_every):
                numbers = range(first, min(first + config.report_every, count))
                carry, (values, shares) = steps(carry, batches(numbers))
                zeros.append(np.asarray(shares))
                mean = np.asarray(values).mean(1)
                ctx.log(step=numbers[-1] + 1, split="train", loss=mean.tolist())
                progress.advance(len(numbers), loss=float(mean.mean()))
        params, rest, opt_state = carry
        accuracy, _ = evaluate(params, rest, test_x, test_y)
        seen = slice(len(test_x)) if language else slice(None)  # one compilation less
        _, train_loss = evaluate(params, rest, train_x[seen], train_y[seen])
        seconds = time.perf_counter() - began
        metrics = {
            "accuracy": np.asarray(accuracy, np.float64).tolist(),
            "train_loss": np.asarray(train_loss, np.float64).tolist(),
            "zeros": np.concatenate(zeros, axis=1).mean(1).tolist(),
            "seconds": [seconds] * len(config.seeds),
        }
        try:
            scaling = loss_scale_state(opt_state)
        except ValueError:
            return metrics
        return metrics | {
            "final_scale": np.asarray(scaling.scale, np.float64).tolist(),
            "skipped": np.asarray(scaling.skipped_total, np.float64).tolist(),
        }

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        path = ctx.run_dir / "plots" / "accuracy.png"
        with figure(path, figsize=(6.2, 0.5 + 0.32 * len(results.arms))) as axis:
            for row, arm in enumerate(results.arms):
                values = results.metric(arm, "accuracy")
                groups = (TINY, FAULTS, TRAPS, LANGUAGE)
                color = f"C{next(n for n, group in enumerate(groups) if arm in group)}"
                axis.barh(row, values.mean(), color=color, alpha=0.6)
                axis.plot(values, [row] * len(values), ".", color="0.2", ms=4)
            axis.set_yticks(range(len(results.arms)), results.arms, fontsize=8)
            axis.invert_yaxis()
            axis.set_xlabel("test accuracy (a point a seed)")
            axis.spines[["top", "right"]].set_visible(False)
        return [path, *super().plot(results, ctx)]


def _accuracy(results: Results, arm: str) -> float:
    return results.mean(arm, "accuracy")


def _dies(results: Results) -> Verdict:
    alone, full = _accuracy(results, "float16"), _accuracy(results, "float32")
    zeros = results.mean("float16", "zeros")
    return Verdict.of(
        alone < 0.2 < full and zeros > 0.95,
        f"float16 {alone:.3f}, float32 {full:.3f}; zeros {zeros:.3f}, 0.95 asked",
    )


def _restored(arm: str) -> Callable[[Results], Verdict]:
    def check(results: Results) -> Verdict:
        a, b = _accuracy(results, arm), _accuracy(results, "float32")
        return Verdict.of(a >= b - 0.01, f"{arm} {a:.3f}, float32 {b:.3f}, 0.01 allowed")

    return check


def _faults(results: Results) -> Verdict:
    skip, none = _accuracy(results, "fault-skip"), _accuracy(results, "fault-none")
    return Verdict.of(skip > 0.9 and none < 0.2, f"skip {skip:.3f}, none {none:.3f}")


def _gives_up(results: Results) -> Verdict:
    other = _accuracy(results, "fault-apply-if-finite")
    if results.config.fault_run <= 5:
        return Verdict("not testable", "needs more than five bad batches in a row")
    return Verdict.of(other < 0.2, f"apply_if_finite {other:.3f}")


def _traps(results: Results) -> Verdict:
    without = _accuracy(results, "traps-none")
    caught = {arm: _accuracy(results, arm) for arm in TRAPS[:-1]}
    return Verdict.of(
        without > 0.8 and max(caught.values()) < 0.2,
        f"safe {without:.3f}; " + ", ".join(f"{arm} {value:.3f}" for arm, value in caught.items()),
    )


def _language(results: Results) -> Verdict:
    full, *half = (results.mean(arm, "train_loss") for arm in LANGUAGE)
    return Verdict.of(
        all(abs(value / full - 1) < 0.02 for value in half),
        f"loss in float32 {full:.4f}, bfloat16 {half[0]:.4f}, float16 {half[1]:.4f}; 2 % allowed",
    )


MixedPrecision.claims = (
    Claim("In float16 tiny gradients die, and training with them.", "arXiv 1710.03740", _dies),
    Claim(
        "A dynamic scale brings float16 to within a point of float32.",
        "arXiv 1710.03740",
        _restored("float16-dynamic"),
    ),
    Claim("So does a factor of 1000, set by hand.", "kexue.fm 9059", _restored("float16-static")),
    Claim(
        "bfloat16 needs no scale.", "arXiv 1905.12322 (Kalamkar et al. 2019)", _restored("bfloat16")
    ),
    Claim("Skipped, infinite gradients do no harm; applied, they end it.", "jaxkit", _faults),
    Claim(
        "optax.apply_if_finite applies them in the end, after five in a row.", "optax", _gives_up
    ),
    Claim(
        "Each of a mask of 1e12 and an epsilon of 1e-12 ends training in float16.",
        "kexue.fm 9059",
        _traps,
    ),
    Claim(
        "The toolkit's Transformer-VQ learns in bfloat16, and in float16 with a dynamic scale, as "
        "in float32.",
        "jaxkit",
        _language,
    ),
)

MixedPrecision.presets = {
    "smoke": MixedPrecisionConfig(
        arms=("float32", "float16-dynamic", "fault-skip", "traps-none", "vq-float16"),
        seeds=(0,),
        steps=10,
        batch_size=16,
        width=8,
        growth_interval=4,
        fault_run=1,
        language_layers=1,
        language_steps=5,
        language_batch=4,
        report_every=5,
    ),
    "cpu": MixedPrecisionConfig(),
    "gpu": MixedPrecisionConfig(
        steps=8000,
        width=1024,
        batch_size=1024,
        growth_interval=500,
        language_steps=2000,
        language_batch=256,
    ),
}
