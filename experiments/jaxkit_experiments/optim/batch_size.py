"""Batch size against the best learning rate, the decrease of a step, and the steps to a target.

* `quadratic-sgd`, `quadratic-sign`: one step on a noisy quadratic from 16 equal correlations, the
  best rate of a grid for every batch size beside the law; the sign's best rate peaks and falls.
* `digits-sgd`, `digits-adam`: a small tanh network on the digits, steps until the loss of all of
  them is 0.3, at the best rate of a grid for every batch size; S = S_min + E_min/B is fitted to the
  steps, and the same law to the rates: 1/η = (1 + B_noise/B)/η_max.
* `digits-noise`: the noise scale along one run, from the gradients of all examples, and from four
  microbatches as the training step has them.

    jaxkit run batch-size --preset cpu      half a minute on two cores
    jaxkit run batch-size --preset card     the card's whole sweep, about a minute

Sources: posts 10542, 11260 and 11280 on kexue.fm; McCandlish et al. 2018 (arXiv 1812.06162); Li et
al. 2024 (arXiv 2405.14578).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.theory import (
    fit_steps_data,
    optimal_lr_quadratic,
    simple_noise_scale,
    squared_norm,
    track_noise_scale,
)
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.plots import figure, number_log_ticks

__all__ = ["BatchSize", "BatchSizeConfig"]

QUADRATIC = {"quadratic-sgd": "sgd", "quadratic-sign": "sign"}
SWEEPS = ("digits-sgd", "digits-adam")
ARMS = (*QUADRATIC, *SWEEPS, "digits-noise")
_RATES = np.geomspace(1e-4, 10, 1157)  # one percent apart, whatever the law says
_CHECK_EVERY = 5


@dataclasses.dataclass(frozen=True)
class BatchSizeConfig:
    """Quadratics, sweeps and one run.

    Attributes:
      arms: what to measure.
      seeds: of gradients, networks and batches.
      trials: steps on the quadratic, each from the same point.
      dim: of the quadratic.
      correlation: off-diagonal of its Hessian, whose diagonal is 1.
      sigma: noise of each component of one example's gradient.
      quadratic_sizes: batch sizes on the quadratic, growing.
      sizes: batch sizes of the sweep, growing.
      caps: most steps for each of them.
      rates: learning rates of SGD, growing.
      adam_rates: learning rates of Adam, growing.
      hidden: units of the network.
      target: loss of all examples at which a run has arrived.
      noise_size: batch size of the run whose noise is followed, a multiple of 4.
      noise_rate: its learning rate.
      noise_steps: where its noise scale is taken, growing.
    """

    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 65536
    dim: int = 16
    correlation: float = 0.8
    sigma: float = 10.0
    quadratic_sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
    caps: tuple[int, ...] = (1200, 400, 200, 100, 100)
    rates: tuple[float, ...] = tuple(2.0**k for k in range(-4, 2))
    adam_rates: tuple[float, ...] = tuple(2.0**k for k in range(-9, -2))
    hidden: int = 32
    target: float = 0.3
    noise_size: int = 32
    noise_rate: float = 0.25
    noise_steps: tuple[int, ...] = (0, 10, 25, 50, 100, 200, 400)

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        for name in ("quadratic_sizes", "sizes", "rates", "adam_rates", "noise_steps"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)) or values[0] < 0:
                raise ValueError(f"{name} must be growing numbers, not negative; got {values!r}.")
        for name in ("quadratic_sizes", "sizes"):
            check_int(name, getattr(self, name)[0], least=1)
        if len(self.caps) != len(self.sizes) or len(self.sizes) < 3:
            raise ValueError(
                f"caps must have one entry for each of three or more sizes; got {self.caps!r}."
            )
        if self.noise_size < 4 or self.noise_size % 4:
            raise ValueError(f"noise_size must be a multiple of 4; got {self.noise_size}.")
        if not self.seeds:
            raise ValueError("seeds must hold at least one value; got none.")
        for name in ("trials", "dim", "hidden"):
            check_int(name, getattr(self, name), least=1)
        check_real("correlation", self.correlation, least=0, most=1)
        for name in ("sigma", "target", "noise_rate"):
            check_real(name, getattr(self, name), above=0)


# --- the quadratic -----------------------------------------------------------------------------


def quadratic(config: BatchSizeConfig, seed: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradient, Hessian and variances: all of one sign, so that the correlations add up."""
    g = jnp.exp(0.5 * jax.random.normal(jax.random.key(seed), (config.dim,)))
    H = (1 - config.correlation) * jnp.eye(config.dim) + config.correlation
    return g, H, jnp.full(config.dim, config.sigma**2)


def best_of_grid(config: BatchSizeConfig, seed: int, kind: str, B: int) -> tuple[float, float]:
    """The rate with the largest mean decrease over the trials, and that decrease."""
    slope, curvature = map(float, _mean_decrease(config, kind, seed, float(B)))
    found = _RATES * slope - _RATES**2 / 2 * curvature
    return float(_RATES[found.argmax()]), float(found.max())


@partial(jax.jit, static_argnums=(0, 1))
def _mean_decrease(
    config: BatchSizeConfig, kind: str, seed: jax.Array, B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A step decreases the loss by η u·g - η² uᵀHu/2: the means of u·g and uᵀHu over the trials."""
    g, H, variance = quadratic(config, seed)
    key = jax.random.fold_in(jax.random.key(seed), B.astype(jnp.uint32))
    noise = jax.random.normal(key, (config.trials, config.dim)) * jnp.sqrt(variance / B)[None]
    u = g[None] + noise
    u = jnp.sign(u) if kind == "sign" else u
    return jnp.mean(u @ g), jnp.mean(jnp.sum((u @ H) * u, axis=1))


@partial(jax.jit, static_argnums=(0, 1))
def _laws(config: BatchSizeConfig, kind: str, seed: jax.Array) -> Any:
    """The law's best rate and decrease at every batch size."""
    sizes = jnp.asarray(config.quadratic_sizes, jnp.float32)
    return optimal_lr_quadratic(*quadratic(config, seed), sizes, kind)


# --- the digits --------------------------------------------------------------------------------


class Examples(NamedTuple):
    """Inputs `[n, d]`, labels `[n]`, and how many labels there are."""

    x: jax.Array
    y: jax.Array
    classes: int


def load(path: Path | None) -> Examples:
    """The digits `[1797, 64]` in [0, 1], or `features` and `labels` of an npz file."""
    if path is None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        features, labels = bunch.data / 16, bunch.target
    else:
        with np.load(path) as stored:
            features, labels = stored["features"], stored["labels"]
    classes = int(labels.max()) + 1
    return Examples(jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.int32), classes)


def network(key: jax.Array, width: int, hidden: int, classes: int) -> dict[str, jax.Array]:
    """A tanh network of one hidden layer, variances 1/fan-in."""
    one, two = jax.random.split(key)
    return {
        "w1": jax.random.normal(one, (width, hidden)) / math.sqrt(width),
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(two, (hidden, classes)) / math.sqrt(hidden),
        "b2": jnp.zeros(classes),
    }


def loss(params: Mapping[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
    logits = hidden @ params["w2"] + params["b2"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def steps_to_target(
    config: BatchSizeConfig,
    data: Examples,
    optimizer: str,
    B: int,
    cap: int,
) -> np.ndarray:
    """Steps until the loss of all examples is at the target, `[seeds, rates]`; inf if it is not.

    Batches are drawn independently. The loss is looked at every five steps.
    """
    x, y, classes = data
    rates = config.rates if optimizer == "sgd" else config.adam_rates
    steps = cap // _CHECK_EVERY * _CHECK_EVERY
    rows = _drawn(config.seeds, B, (steps // _CHECK_EVERY, _CHECK_EVERY, B), len(y))
    starts = _starts(jnp.asarray(config.seeds, jnp.uint32), x.shape[1], config.hidden, classes)
    losses = _losses_along(starts, jnp.asarray(rates, jnp.float32), rows, data, optimizer)
    arrived = np.asarray(losses) <= config.target
    first = _CHECK_EVERY * (np.argmax(arrived, axis=-1) + 1.0)
    return np.where(arrived.any(axis=-1), first, np.inf)


def _drawn(seeds: tuple[int, ...], B: int, shape: tuple[int, ...], n: int) -> jax.Array:
    """Rows of independent batches, `[seeds, *shape]`; from NumPy, which compiles nothing."""
    draw = lambda seed: np.random.default_rng((seed, B)).integers(n, size=shape, dtype=np.int32)
    return jnp.asarray(np.stack([draw(seed) for seed in seeds]))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _starts(seeds: jax.Array, width: int, hidden: int, classes: int) -> Any:
    """A network for every seed."""
    return jax.vmap(lambda seed: network(jax.random.key(seed), width, hidden, classes))(seeds)


@partial(jax.jit, static_argnames="optimizer")
def _losses_along(
    starts: Any, rates: jax.Array, rows: jax.Array, data: Examples, optimizer: str
) -> jax.Array:
    """Loss of all examples after every five steps, `[seeds, rates, looks]`."""
    x, y, _ = data
    make = {"sgd": optax.sgd, "adam": optax.adam}[optimizer]

    def run(params: Any, rows: jax.Array, rate: jax.Array) -> jax.Array:
        tx = make(rate)

        def step(carry: Any, rows: jax.Array) -> Any:
            params, state = carry
            grads = jax.grad(loss)(params, x[rows], y[rows])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def five(carry: Any, rows: jax.Array) -> Any:
            carry, _ = jax.lax.scan(step, carry, rows)
            return carry, loss(carry[0], x, y)

        return jax.lax.scan(five, (params, tx.init(params)), rows)[1]

    return jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None))(starts, rows, rates)


_fit = jax.jit(fit_steps_data)


def noise_along(config: BatchSizeConfig, data: Examples) -> dict[int, dict[str, list[float]]]:
    """Loss and noise scale of every seed's run, at `config.noise_steps`.

    `exact` is from the gradients of all examples; `online` the running average of what the
    microbatches of the training step tell, no further gradient taken.
    """
    tx = optax.chain(track_noise_scale(), optax.sgd(config.noise_rate))
    x, y, classes = data
    b, length = config.noise_size // 4, max(1, config.noise_steps[-1])
    rows = _drawn(config.seeds, config.noise_size, (length, 4, b), len(y))

    def step(carry: Any, rows: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        params, state = carry
        micro = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x[rows], y[rows])
        grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), micro)
        updates, state = tx.update(grads, state, params, micro_grads=micro, b_small=b)
        return optax.apply_updates(params, updates), state

    def advance(carry: Any, rows: Any, begin: Any, end: Any, x: jax.Array, y: jax.Array) -> Any:
        one = lambda of, rows: jax.lax.fori_loop(
            begin, end, lambda t, c: step(c, rows[t], x, y), of
        )
        return jax.vmap(one)(carry, rows)

    def look(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        """One seed after the other, some examples at a time: no gradient is kept."""

        def one(of: Any) -> Any:
            params, state = of
            # Batches are drawn from these examples, so that their mean gradient is g itself.
            value, g = jax.value_and_grad(loss)(params, x, y)

            def apart(row: Any) -> jax.Array:
                each = jax.grad(loss)(params, row[0][None], row[1][None])
                return squared_norm(jax.tree.map(jnp.subtract, each, g))

            spread = jnp.mean(jax.lax.map(apart, (x, y), batch_size=64))
            return value, spread / squared_norm(g), simple_noise_scale(state[0])

        return jax.lax.map(one, carry)

    advance, look = jax.jit(advance), jax.jit(look)
    params = _starts(jnp.asarray(config.seeds, jnp.uint32), x.shape[1], config.hidden, classes)
    carry, done, seen = (params, jax.vmap(tx.init)(params)), 0, {}
    for stop in config.noise_steps:
        carry, done = advance(carry, rows, done, stop, x, y), stop
        names = ("loss", "exact", "online")
        values = (np.asarray(of, np.float64).tolist() for of in look(carry, x, y))
        seen[stop] = dict(zip(names, values, strict=True))
    return seen


class BatchSize(Experiment):
    """Laws of the batch size.

    Metrics of `quadratic-*`: `lr[B]` and `decrease[B]` from the grid, `lr_error[B]` and
    `decrease_error[B]` relative to the law. Of `digits-*`: `steps[B]` at the rate `lr[B]` that is
    best by the median over seeds, the fits `S_min`, `E_min`, `B_crit`, and `lr_max`, `lr_noise`
    (B_noise) of the law fitted to the rates. Of `digits-noise`: `loss[t]`, `exact[t]`, `online[t]`,
    and `B_simple`, the mean of `exact` up to the target.
    """

    name = "batch-size"
    title = "Batch size, best learning rate and noise scale"
    description = (
        "The best rate and decrease of one step on a noisy quadratic against the laws for SGD and "
        "sign; steps to a loss of 0.3 on the digits at the best rate of every batch size, with the "
        "fitted law; the gradient noise scale along a run. With --data, features and labels of an "
        "npz file."
    )
    sources = ("kexue.fm 10542, 11260, 11280", "arXiv 1812.06162", "arXiv 2405.14578")
    config_class = BatchSizeConfig
    arms = ARMS
    columns = ("worst_lr_error", "worst_decrease_error", "S_min", "E_min", "B_crit", "lr_noise")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "digits-sgd": {"S_min": 33.8, "E_min": 565, "B_crit": 16.7}
    }
    paper_note = "The numbers beside are the methods card's, of its whole sweep (preset card)."
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": BatchSizeConfig(
            seeds=(0, 1),
            trials=256,
            quadratic_sizes=(4, 256),
            sizes=(4, 16, 64),
            caps=(60, 40, 20),
            rates=(0.25, 1.0),
            adam_rates=(0.03,),
            hidden=8,
            target=1.5,
            noise_steps=(0, 5, 10),
        ),
        "cpu": BatchSizeConfig(),
        "card": BatchSizeConfig(
            sizes=tuple(2**k for k in range(10)),
            caps=(1500, 800, 400, 400, 200, 200, 100, 100, 100, 100),
            rates=tuple(2.0**k for k in range(-8, 4)),
            adam_rates=tuple(2.0**k for k in range(-12, -1)),
        ),
        "gpu": BatchSizeConfig(
            seeds=tuple(range(8)),
            trials=2**20,
            quadratic_sizes=tuple(2**k for k in range(15)),
            sizes=tuple(2**k for k in range(13)),
            caps=(20_000, 10_000, 5000, *(2500,) * 10),
            rates=tuple(2.0**k for k in range(-9, 4)),
            adam_rates=tuple(2.0**k for k in range(-14, -1)),
            hidden=1024,
            target=0.1,
            noise_steps=(0, 10, 30, 100, 300, 1000, 3000, 10_000),
        ),
    }

    def run_arm(self, config: BatchSizeConfig, arm: str, ctx: Context) -> Mapping[str, list[float]]:
        if arm in QUADRATIC:
            return self._quadratic(config, QUADRATIC[arm], ctx)
        data = load(ctx.data)
        if arm in SWEEPS:
            return self._sweep(config, arm.removeprefix("digits-"), data, ctx)
        return self._noise(config, data, ctx)

    @staticmethod
    def _quadratic(config: BatchSizeConfig, kind: str, ctx: Context) -> dict[str, list[float]]:
        metrics: dict[str, list[float]] = {}
        with ctx.progress(f"quadratic-{kind}", len(config.quadratic_sizes)) as task:
            laws = np.array([_laws(config, kind, seed) for seed in config.seeds], np.float64)
            for at, B in enumerate(config.quadratic_sizes):
                found = [best_of_grid(config, seed, kind, B) for seed in config.seeds]
                for i, name in enumerate(("lr", "decrease")):
                    law = laws[:, i, at]
                    values = np.array([of[i] for of in found])
                    metrics[f"{name}[{B}]"] = values.tolist()
                    metrics[f"{name}_law[{B}]"] = law.tolist()
                    metrics[f"{name}_error[{B}]"] = np.abs(values / law - 1).tolist()
                ctx.log(B=B, lr=metrics[f"lr[{B}]"], law=metrics[f"lr_law[{B}]"])
                task.advance()
        for name in ("lr", "decrease"):
            errors = [metrics[f"{name}_error[{B}]"] for B in config.quadratic_sizes]
            metrics[f"worst_{name}_error"] = np.max(errors, axis=0).tolist()
        return metrics

    @staticmethod
    def _sweep(
        config: BatchSizeConfig, optimizer: str, data: Any, ctx: Context
    ) -> dict[str, list[float]]:
        rates = np.asarray(config.rates if optimizer == "sgd" else config.adam_rates)
        metrics: dict[str, list[float]] = {}
        seeds = len(config.seeds)
        medians, best = [], []
        with ctx.progress(f"digits-{optimizer}", len(config.sizes)) as task:
            for B, cap in zip(config.sizes, config.caps, strict=True):
                counts = steps_to_target(config, data, optimizer, B, cap)
                median = np.median(counts, axis=0)
                at = int(np.argmin(median))
                medians.append(median[at])
                best.append(rates[at])
                # Nothing is said of a size at which most runs never arrive.
                reached = np.isfinite(median[at]) & np.isfinite(counts[:, at])
                metrics[f"steps[{B}]"] = np.where(reached, counts[:, at], np.nan).tolist()
                metrics[f"lr[{B}]"] = [rates[at] if reached.any() else math.nan] * seeds
                ctx.log(B=B, rates=rates.tolist(), median=[float(count) for count in median])
                task.advance()
        sizes, S, lrs = np.asarray(config.sizes, float), np.asarray(medians), np.asarray(best)
        there = np.isfinite(S)
        if there.sum() >= 3:
            fit = _fit(jnp.asarray(sizes[there]), jnp.asarray(S[there]))
            law = _fit(jnp.asarray(sizes[there]), jnp.asarray(1 / lrs[there]))
            numbers = {
                "S_min": fit.S_min,
                "E_min": fit.E_min,
                "B_crit": fit.B_crit,
                "B_crit_low": fit.interval[0],
                "B_crit_high": fit.interval[1],
                "rms_residual": jnp.sqrt(jnp.mean(fit.residuals**2)),
                "lr_max": 1 / law.S_min,
                "lr_noise": law.B_crit,
            }
            metrics |= {name: [float(value)] * seeds for name, value in numbers.items()}
        return metrics

    @staticmethod
    def _noise(config: BatchSizeConfig, data: Any, ctx: Context) -> dict[str, list[float]]:
        metrics: dict[str, list[float]] = {}
        run = noise_along(config, data)
        for t, of in run.items():
            metrics |= {f"{name}[{t}]": values for name, values in of.items()}
            ctx.log(step=t, **of)
        loss = np.array([of["loss"] for of in run.values()])
        exact = np.array([of["exact"] for of in run.values()])
        before = [of[above] for of, above in zip(exact.T, (loss > config.target).T, strict=True)]
        metrics["B_simple"] = [float(np.mean(of)) if of.size else math.nan for of in before]
        return metrics

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """Best rate against batch size, steps against examples, noise scale against step."""
        draws = {
            "rates": self._plot_rates,
            "steps": self._plot_steps,
            "noise": self._plot_noise,
        }
        needs = {"rates": QUADRATIC, "steps": SWEEPS, "noise": ("digits-noise",)}
        paths = []
        for name, draw in draws.items():
            arms = [arm for arm in results.arms if arm in needs[name]]
            if arms:
                paths.append(ctx.run_dir / "plots" / f"{name}.png")
                with figure(paths[-1]) as axis:
                    draw(axis, results, arms)
                    axis.spines[["top", "right"]].set_visible(False)
                    axis.legend(frameon=False, fontsize=9)
        return paths

    @staticmethod
    def _plot_rates(axis: Any, results: Results, arms: list[str]) -> None:
        sizes = results.config.quadratic_sizes
        for arm in arms:
            mean = lambda name, arm=arm: [results.mean(arm, f"{name}[{B}]") for B in sizes]
            (line,) = axis.plot(sizes, mean("lr"), "o", ms=4, label=QUADRATIC[arm])
            axis.plot(sizes, mean("lr_law"), color=line.get_color(), lw=1, label="its law")
        axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel="best learning rate")
        number_log_ticks(axis.yaxis)

    @staticmethod
    def _plot_steps(axis: Any, results: Results, arms: list[str]) -> None:
        sizes = np.asarray(results.config.sizes)
        for arm in arms:
            there = [B for B in sizes.tolist() if results.has(arm, f"steps[{B}]")]
            S = [float(np.median(results.metric(arm, f"steps[{B}]"))) for B in there]
            (line,) = axis.plot(S, np.asarray(there) * S, "o", ms=4, label=arm)
            if results.has(arm, "B_crit"):
                B = np.geomspace(sizes[0], sizes[-1], 100)
                fitted = results.mean(arm, "S_min") + results.mean(arm, "E_min") / B
                axis.plot(fitted, B * fitted, color=line.get_color(), lw=1, label="fitted")
        axis.set(xscale="log", yscale="log", xlabel="steps to the target", ylabel="examples")
        number_log_ticks(axis.xaxis, axis.yaxis)

    @staticmethod
    def _plot_noise(axis: Any, results: Results, arms: list[str]) -> None:
        steps = results.config.noise_steps
        for name, label in (("exact", "all examples"), ("online", "training step")):
            there = [t for t in steps if results.has("digits-noise", f"{name}[{t}]")]
            values = [results.mean("digits-noise", f"{name}[{t}]") for t in there]
            axis.plot(there, values, "o-", ms=4, label=label)
        axis.set(yscale="log", xlabel="step", ylabel="noise scale (examples)")
        number_log_ticks(axis.yaxis)

    def epilogue(self, results: Results, ctx: Context) -> str | None:
        """Median steps and best rate of every batch size."""
        lines = []
        for arm in results.arms:
            if arm in SWEEPS:
                cells = [
                    f"{B}: {np.median(results.metric(arm, f'steps[{B}]')):.0f} steps at "
                    f"{results.mean(arm, f'lr[{B}]'):.3g}"
                    if results.has(arm, f"steps[{B}]")
                    else f"{B}: not reached"
                    for B in results.config.sizes
                ]
                lines.append(f"{arm}, by batch size: " + ", ".join(cells))
        return "\n".join(lines) or None


# --- claims ------------------------------------------------------------------------------------


def _law(arm: str, most: float, results: Results) -> Verdict:
    if results.config.trials < 4096:
        return Verdict("not testable", "needs 4096 trials")
    worst = [float(results.metric(arm, f"worst_{name}_error").max()) for name in ("lr", "decrease")]
    return Verdict.of(
        max(worst) <= most,
        f"largest deviation: rate {worst[0]:.1%}, decrease {worst[1]:.1%} (to {most:.0%})",
    )


def _surge(results: Results) -> Verdict:
    sizes = results.config.quadratic_sizes
    if len(sizes) < 5:
        return Verdict("not testable", "needs 5 batch sizes")
    rates = {arm: [results.mean(arm, f"lr[{B}]") for B in sizes] for arm in QUADRATIC}
    sign, sgd = np.asarray(rates["quadratic-sign"]), np.asarray(rates["quadratic-sgd"])
    top = int(sign.argmax())
    return Verdict.of(
        0 < top < len(sizes) - 1 and sign[-1] < 0.9 * sign[top] and sgd[-1] >= 0.98 * sgd.max(),
        f"sign: {sign[top]:.3g} at {sizes[top]}, {sign[-1]:.3g} at {sizes[-1]}; "
        f"SGD: {sgd[-1]:.3g} at {sizes[-1]}, the largest {sgd.max():.3g}",
    )


def _steps(results: Results, arm: str) -> np.ndarray:
    sizes = results.config.sizes
    return np.array([np.median(results.metric(arm, f"steps[{B}]")) for B in sizes])


def _monotone(results: Results) -> Verdict:
    if results.config.target > 1:
        return Verdict("not testable", "the target is reached at once")
    S = _steps(results, "digits-sgd")
    # The loss is looked at every five steps.
    return Verdict.of(
        (np.diff(S) <= _CHECK_EVERY).all() and S[0] > 2 * S[-1],
        ", ".join(f"{s:.0f}" for s in S) + " (to the resolution of 5)",
    )


def _critical(results: Results) -> Verdict:
    crit, simple = results.mean("digits-sgd", "B_crit"), results.mean("digits-noise", "B_simple")
    if results.config.target > 1:
        return Verdict("not testable", "the target is reached at once")
    return Verdict.of(
        1 / 5 <= crit / simple <= 5,
        f"B_crit {crit:.3g}, mean B_simple up to the target {simple:.3g} (to a factor of 5)",
    )


def _flat(results: Results) -> Verdict:
    sizes = results.config.sizes
    if sizes[0] * 64 > sizes[-1] or results.config.target > 1:
        return Verdict("not testable", "needs batch sizes that differ 64-fold")
    lr = np.array([results.mean("digits-sgd", f"lr[{B}]") for B in sizes])
    rises = lr[-1] >= 2 * lr[0]
    slope = lambda a, b: math.log(lr[b] / lr[a]) / math.log(sizes[b] / sizes[a])
    middle = len(sizes) // 2
    early, late = slope(0, middle), slope(middle, len(sizes) - 1)
    return Verdict.of(
        rises and late < early,
        ", ".join(f"{B}: {rate:.3g}" for B, rate in zip(sizes, lr, strict=True))
        + f"; exponent {early:.2f}, then {late:.2f}",
    )


def _rises(results: Results) -> Verdict:
    steps = results.config.noise_steps
    if steps[-1] < 400:
        return Verdict("not testable", "needs 400 steps")
    values = [results.mean("digits-noise", f"exact[{t}]") for t in steps]
    return Verdict.of(
        values[-1] > 2 * values[0],
        ", ".join(f"{t}: {value:.0f}" for t, value in zip(steps, values, strict=True)),
    )


def _online(results: Results) -> Verdict:
    config = results.config
    if config.noise_steps[-1] < 100:
        return Verdict("not testable", "needs 100 steps to average over")
    # An average over some 100 steps lags behind a scale that rises: it is held against the range
    # that the exact one had in that time. One seed's g2 may be near 0, hence medians over seeds;
    # NaN, where the average of g2 is not above 0, counts as infinity.
    good, shown = True, []
    for t in (t for t in config.noise_steps if t >= 100):
        window = [s for s in config.noise_steps if t - 200 <= s <= t]
        exact = [np.median(results.metric("digits-noise", f"exact[{s}]")) for s in window]
        online = results.metric("digits-noise", f"online[{t}]")
        missing = np.full(len(config.seeds) - online.size, np.inf)
        value = float(np.median(np.append(online, missing)))
        good &= min(exact) / 1.5 <= value <= 1.5 * max(exact)
        shown.append(f"{t}: {value:.0f}, exact {min(exact):.0f} to {max(exact):.0f}")
    return Verdict.of(good, "; ".join(shown) + " in 200 steps (to 1.5)")


def _card(results: Results) -> Verdict:
    config = results.config
    if (config.sizes, config.target, config.hidden) != (BatchSize.presets["card"].sizes, 0.3, 32):
        return Verdict("not testable", "the card's fit is of the preset card")
    card = BatchSize.paper["digits-sgd"]
    got = {name: results.mean("digits-sgd", name) for name in card}
    return Verdict.of(
        all(1 / 1.5 <= got[name] / card[name] <= 1.5 for name in card),
        ", ".join(f"{name} {got[name]:.4g} for {card[name]:g}" for name in card) + " (to 1.5)",
    )


BatchSize.claims = tuple(
    Claim(text, source, check)
    for text, source, check in (
        (
            "SGD's best rate is η_max/(1 + B_noise/B), its decrease likewise",
            "arXiv 1812.06162",
            partial(_law, "quadratic-sgd", 0.05),
        ),
        (
            "the sign's best rate and decrease follow the erf law",
            "kexue.fm 10542",
            partial(_law, "quadratic-sign", 0.03),
        ),
        (
            "the sign's best rate peaks and falls (surge), SGD's only grows",
            "arXiv 2405.14578",
            _surge,
        ),
        ("steps to the target fall with the batch size", "arXiv 1812.06162", _monotone),
        (
            "B_crit of the steps is B_simple of the gradients, to a factor",
            "arXiv 1812.06162",
            _critical,
        ),
        ("SGD's best rate grows with the batch size, then flattens", "kexue.fm 10542", _flat),
        ("the noise scale rises as the loss falls", "arXiv 1812.06162", _rises),
        (
            "the training step's own microbatches tell it as well, with an average's lag",
            "methods card",
            _online,
        ),
        ("the fit is the card's", "methods card", _card),
    )
)
