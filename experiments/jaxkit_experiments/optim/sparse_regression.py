"""What a linear model with few non-zero weights pays for not knowing which: N, or log N.

Examples x ∈ {-1, +1}^N come one at a time; the target is Σ w_i x_i with three weights of ±1/3, plus
noise. Every prediction is paid for by its squared error before the weights learn from it. Gradient
descent (`gd`) pays in proportion to N, EG± (`eg`) to log N. Each has the best rate of a grid.

    jaxkit run eg-sparse-regression --preset cpu

Source: kexue.fm 8968; Kivinen & Warmuth 1997 (Inf. & Comput. 132).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.optim.exponentiated import exponentiated_gradient
from jaxkit_experiments.experiment import (
    Claim,
    Context,
    Experiment,
    MissingResult,
    Results,
    Verdict,
)
from jaxkit_experiments.plots import figure

__all__ = ["SparseRegression", "SparseRegressionConfig", "draw", "losses"]

ARMS = ("gd", "eg")

# The methods card: cumulative squared loss over 400 examples, mean of 3 seeds.
CARD: Mapping[str, Mapping[int, float]] = {
    "gd": {32: 18.0, 256: 78.4, 2048: 123.8},
    "eg": {32: 11.6, 256: 15.4, 2048: 19.6},
}


@dataclasses.dataclass(frozen=True)
class SparseRegressionConfig:
    """The stream and the grid of rates.

    Attributes:
      arms: gd, eg.
      seeds: of the streams.
      sizes: numbers N of weights, growing.
      examples: length T of a stream.
      relevant: non-zero weights, of ±1/`relevant` each.
      noise: standard deviation of the noise.
      rates: η for EG±; for gradient descent these over N, which is the scale of ‖x‖².
    """

    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (32, 256, 2048)
    examples: int = 400
    relevant: int = 3
    noise: float = 0.1
    rates: tuple[float, ...] = tuple(2.0**k for k in range(-8, 2))

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        for name in ("examples", "relevant"):
            check_int(name, getattr(self, name), least=1)
        check_real("noise", self.noise, least=0.0)
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"sizes must be growing integers; got {self.sizes!r}.")
        if self.sizes[0] < self.relevant:
            raise ValueError(
                f"sizes must be at least relevant = {self.relevant}; got {self.sizes!r}."
            )
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates must be positive numbers; got {self.rates!r}.")
        if not self.seeds:
            raise ValueError("seeds must hold at least one seed; got none.")


def draw(config: SparseRegressionConfig, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A stream: inputs `[examples, size]` of ±1 and targets `[examples]`, float32.

    Example:
      >>> x, y = draw(SparseRegressionConfig(examples=5), 32, 0)
      >>> x.shape, y.shape
      ((5, 32), (5,))
    """
    rng = np.random.default_rng((seed, size))
    x = rng.choice([-1.0, 1.0], (config.examples, size))
    w = np.zeros(size)
    w[: config.relevant] = rng.choice([-1.0, 1.0], config.relevant) / config.relevant
    y = x @ w + config.noise * rng.normal(size=config.examples)
    return x.astype(np.float32), y.astype(np.float32)


@partial(jax.jit, static_argnums=0)
def losses(arm: str, rates: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Squared error of every prediction, `[rates, seeds, examples]`, each made before learning.

    Args:
      arm: "gd" or "eg".
      rates: `[rates]`.
      x: `[seeds, examples, size]`.
      y: `[seeds, examples]`.
    """

    def stream(rate: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        optimizer = optax.sgd(rate) if arm == "gd" else exponentiated_gradient(rate, "signed")

        def body(carry: Any, example: Any) -> Any:
            w, state = carry
            x, y = example
            error, grad = jax.value_and_grad(lambda w: (jnp.dot(w, x) - y) ** 2)(w)
            updates, state = optimizer.update(grad, state, w)
            return (optax.apply_updates(w, updates), state), error

        w = jnp.zeros_like(x[0])
        return jax.lax.scan(body, (w, optimizer.init(w)), (x, y))[1]

    per_seed = jax.vmap(stream, (None, 0, 0))
    return jax.vmap(per_seed, (0, None, None))(rates, x, y)


def _pays_less(results: Results) -> Verdict:
    sizes = [n for n in results.config.sizes if n >= 256]
    if not sizes:
        return Verdict("not testable", "needs N of at least 256")
    pairs = [(n, *(results.mean(arm, f"loss[{n}]") for arm in ARMS)) for n in sizes]
    return Verdict.of(
        all(eg < gd / 3 for _, gd, eg in pairs),
        "; ".join(f"N={n}: eg {eg:.1f}, a third of gd {gd / 3:.1f}" for n, gd, eg in pairs),
    )


def _grows_as_logarithm(results: Results) -> Verdict:
    """What is paid beyond the noise, at the largest N against the smallest."""
    first, last = results.config.sizes[0], results.config.sizes[-1]
    if last < 8 * first:
        return Verdict("not testable", "needs sizes that are a factor of 8 apart")
    floor = results.config.examples * results.config.noise**2
    paid = [results.mean("eg", f"loss[{n}]") - floor for n in (first, last)]
    allowed = 1.25 * np.log(2 * last) / np.log(2 * first)
    return Verdict.of(
        paid[1] / paid[0] <= allowed,
        f"beyond the noise {paid[0]:.1f} at N={first}, {paid[1]:.1f} at N={last}: "
        f"{paid[1] / paid[0]:.2f} times, {allowed:.2f} allowed",
    )


def _card(results: Results) -> Verdict:
    if dataclasses.replace(results.config, arms=ARMS) != SparseRegressionConfig():
        return Verdict("not testable", "the card's numbers are those of the preset cpu")
    wrong, compared = [], 0
    for arm, of in CARD.items():
        for n, value in of.items():
            if not results.has(arm, f"loss[{n}]"):
                continue
            compared += 1
            got = results.mean(arm, f"loss[{n}]")
            if abs(got / value - 1) > 0.15:
                wrong.append(f"{arm} at N={n}: {got:.1f} for {value}")
    if not compared:
        raise MissingResult("no arm of the card was run")
    text = f"{compared - len(wrong)} of {compared} within 15 %"
    return Verdict.of(not wrong, "; ".join([text, *wrong]))


class SparseRegression(Experiment):
    """EG± against gradient descent on a stream with three relevant inputs.

    Metrics of an arm, for every N: `loss[N]`, cumulative over the stream, at the rate whose mean
    over the seeds is the least, and `rate[N]`, that rate.
    """

    name = "eg-sparse-regression"
    title = "Sparse online regression: EG± pays log N, gradient descent N"
    description = (
        "Linear prediction of a stream, three of N inputs relevant; cumulative squared loss of "
        "gradient descent and of exponentiated gradient, each at its best rate."
    )
    sources = ("kexue.fm 8968", "Kivinen & Warmuth 1997")
    arms = ARMS
    columns = ("loss[32]", "loss[256]", "loss[2048]")
    config_class = SparseRegressionConfig
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        arm: {f"loss[{n}]": value for n, value in of.items()} for arm, of in CARD.items()
    }
    paper_note = "The numbers beside are the methods card's, 3 seeds."
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": SparseRegressionConfig(
            seeds=(0,), sizes=(8, 64), examples=50, rates=(0.03, 0.1, 0.3)
        ),
        "cpu": SparseRegressionConfig(),
        "gpu": SparseRegressionConfig(
            seeds=tuple(range(20)),
            sizes=(32, 256, 2048, 16384, 65536),
            rates=tuple(2.0**k for k in range(-10, 3)),
        ),
    }
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim(
            "From N = 256 on EG± pays less than a third of what gradient descent pays.",
            "methods card",
            _pays_less,
        ),
        Claim(
            "EG± pays in proportion to log N: no more than that by 25 percent.",
            "Kivinen & Warmuth 1997",
            _grows_as_logarithm,
        ),
        Claim("The numbers are the card's, within 15 percent.", "methods card", _card),
    )

    def run_arm(
        self, config: SparseRegressionConfig, arm: str, ctx: Context
    ) -> Mapping[str, Sequence[float]]:
        metrics: dict[str, list[float]] = {}
        curves = {}
        with ctx.progress(arm, len(config.sizes)) as task:
            for n in config.sizes:
                x, y = map(np.stack, zip(*(draw(config, n, s) for s in config.seeds), strict=True))
                rates = np.asarray(config.rates, np.float32) / (n if arm == "gd" else 1)
                errors = np.asarray(losses(arm, jnp.asarray(rates), x, y), np.float64)
                # A rate that diverges is not the best.
                total = np.nan_to_num(errors.sum(-1), nan=np.inf)
                best = int(np.argmin(total.mean(1)))
                metrics[f"loss[{n}]"] = total[best].tolist()
                metrics[f"rate[{n}]"] = [float(rates[best])] * len(config.seeds)
                curves[str(n)] = np.cumsum(errors[best].mean(0))
                task.advance(loss=float(total[best].mean()))
        ctx.save_arrays(f"curves-{arm}", **curves)
        return metrics

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """Cumulative loss against N, and along the stream."""
        files = [ctx.run_dir / "plots" / f"{name}.png" for name in ("sizes", "streams")]
        sizes = list(results.config.sizes)
        with figure(files[0]) as axis:
            for arm in results.arms:
                paid = [results.mean(arm, f"loss[{n}]") for n in sizes]
                axis.plot(sizes, paid, marker="o", label=arm)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel("weights N")
            axis.set_title("cumulative squared loss", fontsize=10)
            axis.legend(frameon=False)
        with figure(files[1], columns=len(sizes), squeeze=False) as axes:
            for axis, n in zip(axes[0], sizes, strict=True):
                for arm in results.arms:
                    axis.plot(ctx.load_arrays(f"curves-{arm}")[str(n)], label=arm)
                axis.set_xlabel("examples")
                axis.set_title(f"cumulative squared loss, N = {n}", fontsize=10)
            axes[0][0].legend(frameon=False)
        return files
