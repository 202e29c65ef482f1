"""Half precision on the digits: gradients that vanish, batches that overflow, constants that break.

    jaxkit run mixed-precision --preset cpu

Three questions, one group of arms each. *Tiny gradients*: the loss is multiplied by 2^-18, so that
float16 holds almost none of its gradients; does a scaled loss bring them back? *Faults*: the
gradients of some batches are infinite; what is left of the model? *Traps*: a transformer with
paddings in float16, whose mask and ε are those of float32.

Sources: Micikevicius et al. 2018 (arXiv 1710.03740); kexue.fm 9059.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.optim.loss_scaling import (
    dynamic_loss_scale,
    loss_scale,
    loss_scale_state,
    scaled_value_and_grad,
    static_loss_scale,
)
from jaxkit.optim.precision import Policy, layer_norm, masked_softmax
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.optim.classifiers import digits
from jaxkit_experiments.plots import figure

__all__ = ["MixedPrecision", "MixedPrecisionConfig"]

TINY = ("float32", "bfloat16", "float16", "float16-static", "float16-dynamic")
FAULTS = ("fault-none", "fault-apply-if-finite", "fault-skip")
TRAPS = ("traps-both", "traps-mask", "traps-epsilon", "traps-none")


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
      report_every: steps between two reports.
    """

    arms: tuple[str, ...] = TINY + FAULTS + TRAPS
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
    report_every: int = 100

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, MixedPrecision.arms)
        for name in ("steps", "batch_size", "width", "growth_interval", "report_every"):
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


def setting(
    config: MixedPrecisionConfig, arm: str
) -> tuple[Callable[..., Any], Callable[..., Any], Policy, Any, float]:
    """Of an arm: weights, logits, types, optimizer, and the factor of the loss."""
    adam = optax.adam(config.learning_rate, eps=1e-12)
    dynamic = partial(dynamic_loss_scale, growth_interval=config.growth_interval)
    half = Policy.parse("float16-mixed")
    if arm in TINY:
        policy = {"float32": Policy(), "bfloat16": Policy.parse("bfloat16-mixed")}.get(arm, half)
        optimizer = {
            "float16-static": static_loss_scale(adam, config.static_scale),
            "float16-dynamic": dynamic(adam),
        }.get(arm, static_loss_scale(adam, 1.0))
        return init_mlp, mlp, policy, optimizer, 2.0**config.loss_exponent
    if arm in FAULTS:
        optimizer = {
            "fault-none": adam,
            "fault-apply-if-finite": optax.apply_if_finite(adam, 5),
            "fault-skip": dynamic(adam),
        }[arm]
        return init_mlp, mlp, half if arm == "fault-skip" else Policy(), optimizer, 1.0
    traps = {
        "traps-both": ("mask", "epsilon"),
        "traps-mask": ("mask",),
        "traps-epsilon": ("epsilon",),
        "traps-none": (),
    }[arm]
    return init_transformer, partial(transformer, traps=traps), half, dynamic(adam), 1.0


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
        "gradients of the first layer, over all steps (some pixels are always blank)."
    )
    sources = ("arXiv 1710.03740", "kexue.fm 9059")
    config_class = MixedPrecisionConfig
    arms = TINY + FAULTS + TRAPS
    columns = ("accuracy", "train_loss", "zeros", "final_scale", "skipped", "seconds")
    presets: ClassVar[Mapping[str, Any]] = {}
    claims: ClassVar[tuple[Claim, ...]] = ()

    def run_arm(self, config: Any, arm: str, ctx: Context) -> Mapping[str, list[float]]:
        init, logits, policy, optimizer, factor = setting(config, arm)
        images = digits()
        train_x, train_y = images.train_images.reshape(-1, 64), images.train_labels
        test_x, test_y = images.test_images.reshape(-1, 64), images.test_labels
        batch_size = min(config.batch_size, len(train_y))

        def mean_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            out = logits(params, x).astype(jnp.float32)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, y))

        def loss(params: Any, x: jax.Array, y: jax.Array) -> Any:
            value = mean_loss(params, x, y)
            return value * np.float32(factor), value

        value_and_grad = scaled_value_and_grad(loss, policy=policy, has_aux=True)

        def step(carry: Any, number: jax.Array) -> Any:
            params, state, key = carry
            own = jax.random.fold_in(key, number)
            index = jax.random.choice(own, len(train_y), (batch_size,), replace=False)
            x, y = jnp.asarray(train_x)[index], jnp.asarray(train_y)[index]
            (_, value), grads, _ = value_and_grad(_scale(state), params, x, y)
            first = jax.tree.leaves(grads)[-1] if arm in TRAPS else grads["layer0"]["w"]
            zeros = jnp.mean(first == 0, dtype=jnp.float32)
            if arm in FAULTS:
                start = config.steps // 2
                bad = jax.random.bernoulli(jax.random.fold_in(own, 1), config.fault_rate)
                bad |= (number >= start) & (number < start + config.fault_run)
                grads = jax.tree.map(lambda g: jnp.where(bad, jnp.inf, g), grads)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state, key), (value, zeros)

        @jax.jit
        def steps(carry: Any, numbers: jax.Array) -> Any:
            return jax.vmap(lambda c: jax.lax.scan(step, c, numbers))(carry)

        @jax.jit
        def evaluate(params: Any) -> tuple[jax.Array, jax.Array]:
            def of(params: Any) -> tuple[jax.Array, jax.Array]:
                half = policy.cast_to_compute(params)
                out = logits(half, policy.cast_to_compute(jnp.asarray(test_x)))
                # What is NaN is no answer, and argmax would take it for class 0.
                right = (jnp.argmax(out, axis=-1) == test_y) & jnp.isfinite(out).all(axis=-1)
                inputs = policy.cast_to_compute(jnp.asarray(train_x))
                return jnp.mean(right, dtype=jnp.float32), mean_loss(
                    half, inputs, jnp.asarray(train_y)
                )

            return jax.vmap(of)(params)

        keys = jnp.stack([jax.random.key(seed) for seed in config.seeds])
        params = jax.vmap(partial(init, config))(keys)
        carry = params, jax.vmap(optimizer.init)(params), keys
        zeros: list[np.ndarray] = []
        began = time.perf_counter()
        with ctx.progress(arm, config.steps) as progress:
            for start in range(0, config.steps, config.report_every):
                numbers = jnp.arange(start, min(start + config.report_every, config.steps))
                carry, (values, shares) = steps(carry, numbers)
                zeros.append(np.asarray(shares))
                mean = np.asarray(values).mean(1)
                ctx.log(step=int(numbers[-1]) + 1, split="train", loss=mean.tolist())
                progress.advance(len(numbers), loss=float(mean.mean()))
        accuracy, train_loss = evaluate(carry[0])
        seconds = time.perf_counter() - began
        count = len(config.seeds)
        metrics = {
            "accuracy": np.asarray(accuracy, np.float64).tolist(),
            "train_loss": np.asarray(train_loss, np.float64).tolist(),
            "zeros": np.concatenate(zeros, axis=1).mean(1).tolist(),
            "seconds": [seconds] * count,
        }
        try:
            scaling = loss_scale_state(carry[1])
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
                color = {"f": "C0", "b": "C0", "t": "C2"}[arm[0]] if arm not in FAULTS else "C1"
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
)

MixedPrecision.presets = {
    "smoke": MixedPrecisionConfig(
        arms=("float32", "float16-dynamic", "fault-skip", "traps-none"),
        seeds=(0,),
        steps=10,
        batch_size=16,
        width=8,
        growth_interval=4,
        fault_run=1,
        report_every=5,
    ),
    "cpu": MixedPrecisionConfig(),
    "gpu": MixedPrecisionConfig(steps=8000, width=1024, batch_size=1024, growth_interval=500),
}
