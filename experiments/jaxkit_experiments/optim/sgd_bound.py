"""The classical bound on SGD's average loss beside the loss that was measured.

Multinomial logistic regression in a ball of radius 10, so that everything that the bound asks for
is known: convex losses, D = 20, G = √2 (rows of norm 1 at most). Three schedules, each at the scale
that its bound likes best, and one arm to which no bound applies.

* `constant`: η = D/(G√T);
* `inverse-sqrt`: η_t = D/(G√(2t)), the same at any time;
* `linear-decay`: η_t = α (1 - t/(T+1)): the bound of the average is vacuous, those of the weighted
  average and of the last iterate are not;
* `mlp`: two layers, not convex. The certificate has to refuse.

    jaxkit run sgd-bound --preset cpu      half a minute on two cores

Sources: post 9902 on kexue.fm; Zinkevich 2003 (ICML); posts 11469, 11480 and 11494.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.theory import (
    Domain,
    RegretState,
    RegretTracker,
    ball,
    bound,
    certify,
    closed_form,
    norm,
    sampled_convexity,
    solve_comparator,
)
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.plots import figure

__all__ = ["SGDBound", "SGDBoundConfig"]

CONVEX = ("constant", "inverse-sqrt", "linear-decay")
ARMS = (*CONVEX, "mlp")
LEAST_LOSS = 1.51117  # the card's, of the digits in the ball of radius 10

# The card, mean over 3 seeds: gap, a-posteriori bound, bound.
CARD: dict[int, dict[str, tuple[float, float, float]]] = {
    300: {"constant": (0.192, 0.219, 1.633), "inverse-sqrt": (0.0530, 0.0703, 2.262)},
    3000: {"constant": (0.0607, 0.0688, 0.516), "inverse-sqrt": (0.0071, 0.0112, 0.725)},
}


@dataclasses.dataclass(frozen=True)
class SGDBoundConfig:
    """Runs of projected SGD.

    Attributes:
      arms: schedules, and the model that is not convex.
      seeds: of the batches; run side by side.
      steps: lengths T of the runs, growing.
      batch_size: examples in a batch, drawn independently.
      radius: of the ball Θ; D is twice that.
      comparator_steps: accelerated gradient steps to θ*.
      hidden: units of the MLP.
      mlp_rate: its step size.
    """

    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: tuple[int, ...] = (300, 3000)
    batch_size: int = 16
    radius: float = 10.0
    comparator_steps: int = 1500
    hidden: int = 32
    mlp_rate: float = 0.5

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 2:
            raise ValueError(f"steps must be growing integers from 2 on; got {self.steps!r}.")
        if not self.seeds:
            raise ValueError("seeds must hold at least one value; got none.")
        for name in ("batch_size", "comparator_steps", "hidden"):
            check_int(name, getattr(self, name), least=1)
        for name in ("radius", "mlp_rate"):
            check_real(name, getattr(self, name), above=0)


class Examples(NamedTuple):
    """Rows of norm 1 at most, a bias among their entries, and labels."""

    x: jax.Array
    y: jax.Array


def load(path: Path | None) -> Examples:
    """The digits, or arrays `features` [n, d] and `labels` [n] of an npz file."""
    if path is None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        features, labels = bunch.data / 16, bunch.target
    else:
        with np.load(path) as stored:
            features, labels = stored["features"].astype(np.float64), stored["labels"]
    rows = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    rows /= np.linalg.norm(rows, axis=1).max()
    return Examples(jnp.asarray(rows, jnp.float32), jnp.asarray(labels, jnp.int32))


def logistic(params: Any, batch: Examples) -> jax.Array:
    """Mean cross-entropy of a linear model; every gradient's norm is √2 max ||x|| at most."""
    return _cross_entropy(batch.x @ params["w"], batch.y)


def mlp(params: Any, batch: Examples) -> jax.Array:
    """Mean cross-entropy of two layers."""
    return _cross_entropy(jnp.tanh(batch.x @ params["in"]) @ params["out"], batch.y)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


class Task(NamedTuple):
    """A loss over a ball, its start and its minimum, and what is known of them beforehand."""

    data: Examples
    loss: Callable[[Any, Examples], jax.Array]
    domain: Domain
    start: Any
    best: Any
    least: float
    """The loss at `best`."""
    slack: float
    """Least convexity slack between points of the ball; negative: not convex."""


def make_task(config: SGDBoundConfig, arm: str, path: Path | None = None) -> Task:
    """The task of an arm, θ* found by accelerated projected gradient on all examples."""
    # All schedules share one task: θ* is solved for once, and their runs share a compilation.
    layers = (config.hidden, config.mlp_rate) if arm == "mlp" else None
    return _make_task(config.radius, config.comparator_steps, layers, path)


@functools.lru_cache(maxsize=2)
def _make_task(
    radius: float, comparator_steps: int, layers: tuple[int, float] | None, path: Path | None
) -> Task:
    data, domain = load(path), ball(radius)
    classes = int(data.y.max()) + 1
    width = data.x.shape[1]
    # The cross-entropy's Hessian in the logits is at most 1/2.
    curvature = 0.5 * float(np.linalg.eigvalsh(np.asarray(data.x.T @ data.x)).max()) / len(data.x)
    if layers is not None:
        hidden, step = layers
        keys = jax.random.split(jax.random.key(2**32 - 1))
        start = {
            "in": jax.random.normal(keys[0], (width, hidden)) / math.sqrt(width),
            "out": jax.random.normal(keys[1], (hidden, classes)) / math.sqrt(hidden),
        }
        start, loss = domain.project(start), mlp
    else:
        start, loss, step = {"w": jnp.zeros((width, classes))}, logistic, 1 / curvature

    @jax.jit
    def solve(start: Any, data: Examples) -> Any:
        of = lambda params: loss(params, data)
        best = solve_comparator(of, start, domain, step_size=step, steps=comparator_steps)
        # Convexity is checked where it matters: between points of Θ.
        direction = lambda key: jax.tree.map(lambda x: 10 * jax.random.normal(key, x.shape), start)
        points = jax.vmap(lambda key: domain.project(direction(key)))(
            jax.random.split(jax.random.key(1), 8)
        )
        return best, of(best), sampled_convexity(of, points)

    best, least, slack = solve(start, data)
    return Task(data, loss, domain, start, best, float(least), float(slack))


def schedule(config: SGDBoundConfig, arm: str, T: int) -> np.ndarray:
    """η_1..η_T, each at the scale for which its bound is least."""
    D, G, t = 2 * config.radius, math.sqrt(2), np.arange(1, T + 1)
    if arm == "constant":
        return np.full(T, closed_form("constant", T, D, G)[0])
    if arm == "inverse-sqrt":
        return closed_form("inverse_sqrt", T, D, G)[0] / np.sqrt(t)
    if arm == "linear-decay":
        return closed_form("linear_decay", T, config.radius, G)[0] * (1 - t / (T + 1))
    return np.full(T, config.mlp_rate)


class Run(NamedTuple):
    """Projected SGD of every seed."""

    regret: RegretState
    """What the tracker saw."""
    excess: jax.Array
    """Running sums of L_t(θ_t) - L_t(θ*), `[seeds, T]`."""
    last: jax.Array
    """Loss of all examples at θ_T, before the last step, as the last-iterate bound has it."""


def follow(
    task: Task,
    eta: np.ndarray,
    *,
    batch_size: int,
    seeds: tuple[int, ...],
    longest: int | None = None,
) -> Run:
    """Projected SGD with steps `eta`; runs of one `longest` share a compilation."""
    T = len(eta)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    padded = np.pad(eta, (0, max(T, longest or 0) - T)).astype(np.float32)
    regret, excess, last = _follow(
        keys, task.start, task.best, task.data, padded, T, task.loss, task.domain, batch_size
    )
    return Run(regret, jnp.cumsum(excess[:, :T], axis=1), last)


@functools.partial(jax.jit, static_argnames=("loss", "domain", "batch_size"))
def _follow(
    keys: jax.Array,
    start: Any,
    best: Any,
    data: Examples,
    eta: jax.Array,
    steps: jax.Array,
    loss: Callable[[Any, Examples], jax.Array],
    domain: Domain,
    batch_size: int,
) -> Any:
    tracker = RegretTracker(domain, best)

    def run(key: jax.Array) -> Any:
        def step(t: jax.Array, carry: Any) -> Any:
            theta, _, state, excess = carry
            rows = jax.random.randint(jax.random.fold_in(key, t), (batch_size,), 0, len(data.y))
            batch = Examples(data.x[rows], data.y[rows])
            value, grads = jax.value_and_grad(loss)(theta, batch)
            other = loss(best, batch)
            new = domain.project(jax.tree.map(lambda p, g: p - eta[t] * g, theta, grads))
            state = tracker.update(
                state, value, grads, eta[t], theta, comparator_loss=other, next_params=new
            )
            return new, theta, state, excess.at[t].set(value - other)

        carry = (start, start, tracker.init(), jnp.zeros_like(eta))
        _, last, state, excess = jax.lax.fori_loop(0, steps, step, carry)
        return state, excess, loss(last, data)

    return jax.vmap(run)(keys)


def running_bound(eta: np.ndarray, D: float, G: float) -> np.ndarray:
    """The bound of the average over the first t steps, for every t."""
    t = np.arange(1, len(eta) + 1)
    return D**2 / (2 * t * eta) + G**2 / (2 * t) * np.cumsum(eta)


@jax.jit
def _last_bound(eta: jax.Array, distance: jax.Array, G: jax.Array) -> jax.Array:
    """The refined bound of the last iterate, for every G."""
    return jax.vmap(lambda G: bound(eta, eta.size, distance, G, "last_refined"))(G)


class SGDBound(Experiment):
    """Gap, a-posteriori bound and bound of every schedule and length.

    Metrics of an arm, for every T: `gap[T]` of the average loss, its `bound[T]` and
    `a_posteriori[T]`; `weighted[T]` and `weighted_bound[T]`; `last[T]` of the last iterate on all
    examples, and `last_bound[T]`; `certified[T]` and `refused_convexity[T]`, 0 or 1; `max_grad[T]`;
    `least_loss`, the loss at θ*.
    """

    name = "sgd-bound"
    title = "The bound on SGD's average loss, and the loss that was measured"
    description = (
        "Projected SGD on multinomial logistic regression of the digits, in a ball of radius 10, "
        "under three schedules; certificates of the classical bound; an MLP that has none. With "
        "--data, features and labels of an npz file."
    )
    sources = ("kexue.fm 9902", "Zinkevich 2003", "kexue.fm 11469, 11480, 11494")
    config_class = SGDBoundConfig
    arms = ARMS
    columns = tuple(
        f"{name}[{T}]" for T in (300, 3000) for name in ("gap", "a_posteriori", "bound")
    )
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        arm: {
            f"{name}[{T}]": value
            for T in CARD
            for name, value in zip(("gap", "a_posteriori", "bound"), CARD[T][arm], strict=True)
        }
        for arm in ("constant", "inverse-sqrt")
    }
    paper_note = "The numbers beside are the methods card's, 3 seeds."
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": SGDBoundConfig(seeds=(0, 1), steps=(10, 40), comparator_steps=300, hidden=4),
        "cpu": SGDBoundConfig(),
        "gpu": SGDBoundConfig(
            seeds=(0, 1, 2, 3, 4),
            steps=(1000, 10_000, 100_000, 1_000_000),
            batch_size=64,
            comparator_steps=20_000,
            hidden=512,
        ),
    }

    def run_arm(self, config: SGDBoundConfig, arm: str, ctx: Context) -> Mapping[str, list[float]]:
        task = make_task(config, arm, ctx.data)
        convex = "checked by sampled inequality" if task.slack >= -1e-5 else False
        G = None if arm == "mlp" else math.sqrt(2)
        distance = float(norm(jax.tree.map(jnp.subtract, task.start, task.best)))

        metrics: dict[str, list[float]] = {"least_loss": [task.least] * len(config.seeds)}
        with ctx.progress(arm, len(config.steps)) as progress:
            for T in config.steps:
                eta = schedule(config, arm, T)
                run = follow(
                    task,
                    eta,
                    batch_size=config.batch_size,
                    seeds=config.seeds,
                    longest=config.steps[-1],
                )
                regret = jax.tree.map(np.asarray, run.regret)
                certificates = [
                    certify(
                        jax.tree.map(lambda x, i=i: x[i], regret),
                        task.domain,
                        G,
                        task.best,
                        convex=convex,
                    )
                    for i in range(len(config.seeds))
                ]
                last_bound = _last_bound(eta, distance, np.array([of.G for of in certificates]))
                values = {
                    "gap": [of.gap for of in certificates],
                    "bound": [of.bound for of in certificates],
                    "a_posteriori": [of.bounds["a_posteriori"] for of in certificates],
                    "weighted": [of.weighted_gap for of in certificates],
                    "weighted_bound": [of.bounds["weighted"] for of in certificates],
                    "last": (np.asarray(run.last, np.float64) - task.least).tolist(),
                    "last_bound": np.asarray(last_bound, np.float64).tolist(),
                    "certified": [float(of.status == "certified") for of in certificates],
                    "refused_convexity": [float("convexity" in of.reasons) for of in certificates],
                    "max_grad": np.asarray(regret.grad_max, np.float64).tolist(),
                }
                metrics |= {f"{name}[{T}]": list(of) for name, of in values.items()}
                ctx.log(T=T, convexity_slack=task.slack, certificate=str(certificates[0]), **values)
                progress.advance()
        t = np.arange(1, len(eta) + 1)
        keep = np.unique(np.geomspace(1, len(eta), 400).astype(int)) - 1
        curve = (np.asarray(run.excess, np.float64) / t)[:, keep]
        limit = running_bound(eta, 2 * config.radius, certificates[0].G)[keep]
        ctx.save_arrays(f"curve-{arm}", t=t[keep], gap=curve, bound=limit)
        return metrics

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """Gap of the running average and its bound, for every schedule."""
        shown = [arm for arm in results.arms if arm in CONVEX]
        path = ctx.run_dir / "plots" / "bound.png"
        if not shown:
            return []
        with figure(path) as axis:
            for arm in shown:
                of = ctx.load_arrays(f"curve-{arm}")
                (line,) = axis.plot(of["t"], of["gap"].mean(0), label=arm)
                axis.plot(of["t"], of["bound"], color=line.get_color(), ls="--", lw=1)
            axis.set(xscale="log", yscale="log", xlabel="step", ylabel="average loss above θ*")
            axis.set_title("measured, and the bound (dashed)", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=9)
        return [path]

    def epilogue(self, results: Results, ctx: Context) -> str | None:
        """What the bound is good for."""
        if not {"constant", "inverse-sqrt"} <= set(results.arms):
            return None
        T = results.config.steps[-1]
        ratio = {
            arm: results.mean(arm, f"gap[{T}]") / results.mean(arm, f"bound[{T}]")
            for arm in ("constant", "inverse-sqrt")
        }
        return (
            f"At T = {T} the gap is {ratio['constant']:.3f} of the bound for constant steps and "
            f"{ratio['inverse-sqrt']:.3f} for 1/√t: D = {2 * results.config.radius:g} and G = √2 "
            f"are far from max ||θ - θ*|| and max ||g|| = "
            f"{results.mean('constant', f'max_grad[{T}]'):.2f}. An order of schedules by their "
            "bounds is no order of the schedules."
        )


# --- claims ------------------------------------------------------------------------------------


def _pairs(results: Results) -> list[tuple[str, int]]:
    return [(arm, T) for arm in results.arms if arm in CONVEX for T in results.config.steps]


def _below(results: Results) -> Verdict:
    pairs = _pairs(results)
    if not pairs:
        return Verdict("not testable", "no convex arm was run")
    worst, good = 0.0, True
    for arm, T in pairs:
        gap = results.metric(arm, f"gap[{T}]")
        posterior = results.metric(arm, f"a_posteriori[{T}]")
        plain = results.metric(arm, f"bound[{T}]")
        good &= bool((gap <= posterior).all() and (posterior <= plain).all())
        worst = max(worst, float((gap / posterior).max()))
    return Verdict.of(good, f"largest gap / a-posteriori bound: {worst:.3f}")


def _certified(results: Results) -> Verdict:
    pairs = _pairs(results)
    if not pairs:
        return Verdict("not testable", "no convex arm was run")
    shares = [results.mean(arm, f"certified[{T}]") for arm, T in pairs]
    return Verdict.of(min(shares) == 1, f"{np.mean(shares):.0%} of the runs")


def _refused(results: Results) -> Verdict:
    steps = results.config.steps
    refused = [results.mean("mlp", f"refused_convexity[{T}]") for T in steps]
    certified = [results.mean("mlp", f"certified[{T}]") for T in steps]
    return Verdict.of(
        min(refused) == 1 and max(certified) == 0, f"{np.mean(refused):.0%} of the runs"
    )


def _order(results: Results) -> Verdict:
    T = results.config.steps[-1]
    gap, limit = (
        [results.mean(arm, f"{name}[{T}]") for arm in ("constant", "inverse-sqrt")]
        for name in ("gap", "bound")
    )
    return Verdict.of(
        limit[0] < limit[1] and gap[0] > gap[1],
        f"T = {T}: bounds {limit[0]:.3g} and {limit[1]:.3g}, gaps {gap[0]:.3g} and {gap[1]:.3g}",
    )


def _slope(results: Results) -> Verdict:
    steps = results.config.steps
    if steps[-1] < 10 * steps[0] or steps[0] < 100:
        return Verdict("not testable", "needs 100 steps and ten times as many")
    slopes = {
        arm: np.polyfit(np.log(steps), np.log([results.mean(arm, f"gap[{T}]") for T in steps]), 1)[
            0
        ]
        for arm in ("constant", "inverse-sqrt")
    }
    return Verdict.of(
        max(slopes.values()) <= -0.5 + 0.02,
        ", ".join(f"{arm} {slope:.3f}" for arm, slope in slopes.items()) + " (to 0.02)",
    )


def _vacuous(results: Results) -> Verdict:
    T = results.config.steps[-1]
    get = lambda name: results.mean("linear-decay", f"{name}[{T}]")
    average, weighted, last = get("bound"), get("weighted_bound"), get("last_bound")
    good = average > 10 * max(weighted, last)
    good &= get("weighted") <= weighted and get("last") <= last
    return Verdict.of(
        good,
        f"bounds: average {average:.3g}, weighted {weighted:.3g} (measured {get('weighted'):.3g}),"
        f" last {last:.3g} (measured {get('last'):.3g})",
    )


def _card(results: Results) -> Verdict:
    config = results.config
    if config != dataclasses.replace(SGDBoundConfig(), arms=config.arms):
        return Verdict("not testable", "the card's numbers are those of the preset cpu")
    compared, wrong = 0, []
    for T, row in CARD.items():
        for arm, card in row.items():
            names = ("gap", "a_posteriori", "bound")
            for name, value, room in zip(names, card, (0.15, 0.15, 1e-3), strict=True):
                if results.has(arm, f"{name}[{T}]"):
                    got = results.mean(arm, f"{name}[{T}]")
                    compared += 1
                    if abs(got - value) > room * value:
                        wrong.append(f"{arm} {name}[{T}] {got:.4g} for {value:g}")
    if not compared:
        return Verdict("not testable", "no arm of the card was run")
    least = results.mean(next(arm for arm in results.arms if arm in CONVEX), "least_loss")
    if abs(least - LEAST_LOSS) > 1e-4:
        wrong.append(f"least loss {least:.5f} for {LEAST_LOSS}")
    text = f"{compared} numbers, to 15 % for other batches and 0.1 % for the bound"
    return Verdict.of(not wrong, "; ".join([text, *wrong]))


SGDBound.claims = tuple(
    Claim(text, source, check)
    for text, source, check in (
        (
            "the gap is below its a-posteriori bound, and that below the bound, in every run",
            "kexue.fm 9902",
            _below,
        ),
        ("every convex run is certified", "methods card", _certified),
        ("the MLP is refused for its convexity", "methods card", _refused),
        (
            "the bound prefers constant steps to 1/√t, and the measured order is the reverse",
            "methods card",
            _order,
        ),
        ("the gap falls at least as fast as 1/√T", "kexue.fm 9902", _slope),
        (
            "steps that decay to zero: the average's bound is vacuous, weighted and last are not",
            "kexue.fm 11469, 11494",
            _vacuous,
        ),
        ("the numbers are the card's", "methods card", _card),
    )
)
