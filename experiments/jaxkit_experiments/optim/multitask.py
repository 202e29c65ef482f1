"""Conflicting tasks: where do sums of losses get stuck, and which directions reach the Pareto set?

`multitask-toy` is CAGrad's landscape in two dimensions: a valley where the gradients of the two
losses are opposed, and below it the Pareto set, a segment. Every arm starts from five points, with
the first loss as it is and multiplied by 0.1.

`multitask-digits` trains one network with three heads on the digits (which digit, odd or even, how
much ink), with the third loss as it is and multiplied by 100.

    jaxkit run multitask-toy --preset cpu
    jaxkit run multitask-digits --preset cpu

Sources: Liu et al. 2021, CAGrad (arXiv 2110.14048); Sener & Koltun 2018 (1810.04650); Yu et al.
2020, PCGrad (2001.06782); Navon et al. 2022, Nash-MTL (2202.01017); kexue.fm 8870, 8896, 8907.
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
from jaxkit.optim import multitask
from jaxkit_experiments import data
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.plots import figure, number_log_ticks

__all__ = ["STARTS", "Digits", "DigitsConfig", "Toy", "ToyConfig", "pareto_x2", "toy_losses"]

TOY_ARMS = ("mean", "normalized_sum", "mgda", "imtl_g", "nash", "pcgrad", "cagrad", "upgrad")
STARTS = ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))


def pareto_x2(x1: np.ndarray | float) -> np.ndarray:
    """Second coordinate of the Pareto set of the toy problem, which goes over |x1| <= 7.

    There the gradients are opposed: with weights 7 ± x1 those of the q cancel along x1, and x2
    solves c2' q + c2 q' = 0 for the weighted mean q. It bends from −8.355 in the middle to −8.434.

    Example:
      >>> pareto_x2(np.array([0.0, 7.0])).round(3).tolist()
      [-8.355, -8.434]
    """
    x2 = np.full(np.shape(x1), -8.4)
    for _ in range(60):  # contracts by a third a step
        q = (49 - np.square(x1)) / 10 + (x2 + 8) ** 2 / 100 - 20
        x2 = -8 + 25 * q / np.cosh(x2 / 2) ** 2 / np.tanh(-x2 / 2)
    return x2


def toy_losses(x: jax.Array, scale: jax.Array | float = 1.0) -> jax.Array:
    """The two losses of CAGrad's toy problem at `x` `[2]`, the first times `scale`.

    Example:
      >>> print(jnp.array_str(toy_losses(jnp.array([0.0, -8.3552])), precision=2))
      [-15.09 -15.09]
    """
    x1, x2 = x
    f1 = jnp.log(jnp.maximum(jnp.abs(0.5 * (-x1 - 7) - jnp.tanh(-x2)), 5e-6)) + 6
    f2 = jnp.log(jnp.maximum(jnp.abs(0.5 * (-x1 + 3) + jnp.tanh(-x2) + 2), 5e-6)) + 6
    q1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    q2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    c1, c2 = jnp.maximum(jnp.tanh(x2 / 2), 0), jnp.maximum(jnp.tanh(-x2 / 2), 0)
    return jnp.stack([scale * (c1 * f1 + c2 * q1), c1 * f2 + c2 * q2])


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Descents on the toy problem by Adam.

    Attributes:
      arms: methods of `jaxkit.optim.multitask`.
      seeds: which of the five starts.
      scales: factors of the first loss.
      steps: of Adam.
      learning_rate: of Adam.
      kept: points of each path to keep, beside the start.
    """

    arms: tuple[str, ...] = TOY_ARMS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    scales: tuple[float, ...] = (1.0, 0.1)
    steps: int = 50_000
    learning_rate: float = 1e-3
    kept: int = 500

    def __post_init__(self) -> None:
        _check_arms(self.arms, TOY_ARMS)
        for name in ("steps", "kept"):
            check_int(name, getattr(self, name), least=1)
        if self.steps % self.kept:
            raise ValueError(f"kept must divide steps = {self.steps}; got {self.kept}.")
        check_real("learning_rate", self.learning_rate, above=0)
        if not self.seeds or not set(self.seeds) <= set(range(len(STARTS))):
            raise ValueError(f"seeds must be starts from 0 to 4; got {self.seeds!r}.")
        _check_factors("scales", self.scales)


def _check_arms(arms: tuple[str, ...], known: Sequence[str]) -> None:
    for arm in arms:
        check_choice("arms", arm, known)


def _check_factors(name: str, factors: tuple[float, ...]) -> None:
    if not factors:
        raise ValueError(f"{name} must hold at least one factor; got none.")
    for factor in factors:
        check_real(name, factor, above=0)


@partial(jax.jit, static_argnames=("arm", "steps", "kept"))
def descend(
    arm: str, starts: jax.Array, scale: Any, learning_rate: Any, *, steps: int, kept: int
) -> jax.Array:
    """Paths `[starts, kept + 1, 2]` of Adam on the toy problem."""
    optimizer = optax.adam(learning_rate)

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        x, state = carry
        grads, _ = multitask.aggregate(partial(toy_losses, scale=scale), x, method=arm)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(x, updates), state), None

    def stretch(carry: Any, _: Any) -> tuple[Any, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, length=steps // kept)
        return carry, carry[0]

    def path(start: jax.Array) -> jax.Array:
        _, points = jax.lax.scan(stretch, (start, optimizer.init(start)), length=kept)
        return jnp.concatenate([start[None], points])

    return jax.vmap(path)(starts)


def _at(name: str, factor: float) -> str:
    return f"{name}@{factor:g}"


class Toy(Experiment):
    """Metrics of an arm at the end of every path: `x1@s`, `x2@s`, `mean@s` (of the two losses).

    `distance@s` is how far x is from the Pareto set.
    """

    name = "multitask-toy"
    title = "Two conflicting losses in two dimensions: which directions reach the Pareto set?"
    description = (
        "CAGrad's toy problem, Adam from five starts; the columns are the means over the starts. "
        "@0.1: with the first loss multiplied by 0.1."
    )
    sources = ("arXiv 2110.14048", "arXiv 1810.04650", "arXiv 2202.01017", "kexue.fm 8896")
    config_class = ToyConfig
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": ToyConfig(arms=("mean", "mgda"), seeds=(0, 1), steps=200, kept=20),
        "cpu": ToyConfig(),
        "gpu": ToyConfig(steps=200_000, kept=1000),
    }
    arms = TOY_ARMS
    columns = ("x1@1", "x2@1", "mean@1", "distance@1", "distance@0.1")

    def run_arm(self, config: ToyConfig, arm: str, ctx: Context) -> Mapping[str, Sequence[float]]:
        metrics: dict[str, list[float]] = {}
        with ctx.progress(arm, len(config.scales)) as task:
            for scale in config.scales:
                # Beside the valley's singular lines, and along the Pareto set, rounding in
                # single precision moves the ends by a tenth.
                with jax.enable_x64(True):
                    starts = jnp.asarray([STARTS[seed] for seed in config.seeds], jnp.float64)
                    s, rate = jnp.float64(scale), jnp.float64(config.learning_rate)
                    paths = descend(arm, starts, s, rate, steps=config.steps, kept=config.kept)
                    losses = np.asarray(jax.vmap(jax.vmap(toy_losses))(paths))
                ctx.save_arrays(_at(f"path-{arm}", scale), x=paths, losses=losses)
                x = np.asarray(paths[:, -1])
                near = np.clip(x[:, 0], -7, 7)
                gaps = x[:, 0] - near, x[:, 1] - pareto_x2(near)
                metrics[_at("x1", scale)] = x[:, 0].tolist()
                metrics[_at("x2", scale)] = x[:, 1].tolist()
                metrics[_at("mean", scale)] = losses[:, -1].mean(-1).tolist()
                metrics[_at("distance", scale)] = np.hypot(*gaps).tolist()
                task.advance()
        return metrics

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """The paths over the landscape, and in the plane of the losses with the Pareto front."""
        files = []
        for scale in results.config.scales:
            paths = {arm: ctx.load_arrays(_at(f"path-{arm}", scale)) for arm in results.arms}
            files.append(_plot_paths(paths, ctx.run_dir / "plots" / f"paths-{scale:g}.png"))
            files.append(_plot_front(paths, ctx.run_dir / "plots" / f"front-{scale:g}.png"))
        return files


def _panels(path: Path, count: int) -> Any:
    columns = min(4, count)
    rows = -(-count // columns)
    size = (3.1 * columns, 2.9 * rows)
    return figure(path, rows=rows, columns=columns, figsize=size, squeeze=False)


def _pareto_set() -> np.ndarray:
    x1 = np.linspace(-7, 7, 101)
    return np.stack([x1, pareto_x2(x1)], axis=-1)


def _plot_paths(paths: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> Path:
    grid = np.stack(np.meshgrid(np.linspace(-10, 10, 81), np.linspace(-11, 10, 85)), axis=-1)
    mean = np.asarray(jax.vmap(jax.vmap(toy_losses))(jnp.asarray(grid, jnp.float32))).mean(-1)
    with _panels(path, len(paths)) as axes:
        for axis, arm in zip(axes.ravel(), paths, strict=False):
            axis.contour(grid[..., 0], grid[..., 1], mean, 16, colors="0.8", linewidths=0.7)
            axis.plot(*_pareto_set().T, color="0.4", lw=3, label="Pareto set")
            for points in paths[arm]["x"]:
                (line,) = axis.plot(*points.T, lw=1.4)
                axis.plot(*points[0], "o", color=line.get_color(), ms=4)
                axis.plot(*points[-1], "*", color=line.get_color(), ms=9)
            axis.set_title(arm, fontsize=10)
        for axis in axes.ravel()[len(paths) :]:
            axis.set_axis_off()
        axes[-1, 0].set(xlabel="$x_1$", ylabel="$x_2$")
        axes[0, 0].legend(frameon=False, fontsize=8, loc="upper center")
    return path


def _plot_front(paths: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> Path:
    front = np.asarray(jax.vmap(toy_losses)(jnp.asarray(_pareto_set(), jnp.float32)))
    with _panels(path, len(paths)) as axes:
        for axis, arm in zip(axes.ravel(), paths, strict=False):
            axis.plot(*front.T, color="0.4", lw=3, label="Pareto front")
            for losses in paths[arm]["losses"]:
                (line,) = axis.plot(*losses.T, lw=1.2)
                axis.plot(*losses[-1], "*", color=line.get_color(), ms=9)
            axis.set_title(arm, fontsize=10)
        for axis in axes.ravel()[len(paths) :]:
            axis.set_axis_off()
        axes[-1, 0].set(xlabel="$L_1$", ylabel="$L_2$")
        axes[0, 0].legend(frameon=False, fontsize=8, loc="lower left")
    return path


def _full(check: Any) -> Any:
    """The check, if all starts went the card's way."""

    def checked(results: Results) -> Verdict:
        config = results.config
        if (config.steps, config.learning_rate) != (50_000, 1e-3) or len(config.seeds) < 5:
            return Verdict("not testable", "stated for 50 000 steps of 1e-3 from all five starts")
        return check(results)

    return checked


def _ends(results: Results, arm: str, name: str, scale: float = 1.0) -> np.ndarray:
    """Values by start."""
    values = results.metric(arm, _at(name, scale))
    return values[np.argsort(results.config.seeds)]


def _text(values: np.ndarray) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def _mean_stuck(results: Results) -> Verdict:
    x2 = _ends(results, "mean", "x2")
    good = (np.abs(x2[[0, 2]] - 2.5) < 1).all() and (x2[[1, 3, 4]] < -8).all()
    return Verdict.of(good, f"x2 = {_text(x2)}")


def _reach(results: Results) -> Verdict:
    arms = ("normalized_sum", "mgda", "imtl_g", "nash")
    x2 = {arm: _ends(results, arm, "x2") for arm in arms}
    x1 = {arm: np.abs(_ends(results, arm, "x1")) for arm in arms}
    good = all((np.abs(x2[arm] + 8.4) < 0.06).all() and (x1[arm] < 7.1).all() for arm in arms)
    return Verdict.of(good, "; ".join(f"{arm} x2 = {_text(x2[arm])}" for arm in arms))


def _pcgrad(results: Results) -> Verdict:
    x2 = _ends(results, "pcgrad", "x2")[[1, 3, 4]]
    return Verdict.of((np.abs(x2 + 8.4) < 0.06).all(), f"x2 = {_text(x2)}")


def _pcgrad_slow(results: Results) -> Verdict:
    # How long a path stays in the valley hangs on rounding: gradients written out by hand, with
    # the same optimizer in double precision, end at -8.38 and -5.39.
    x2 = _ends(results, "pcgrad", "x2")[[0, 2]]
    return Verdict.of((np.abs(x2 - [-7.6, -7.75]) < 0.1).all(), f"x2 = {_text(x2)}, within 0.1")


def _cagrad(results: Results) -> Verdict:
    mean = _ends(results, "cagrad", "mean")
    good = (np.abs(mean[[1, 3, 4]] + 15.09) < 0.02).all() and (mean[[0, 2]] > -15).all()
    return Verdict.of(good, f"mean loss {_text(mean)}")


def _invariant(results: Results) -> Verdict:
    if 0.1 not in results.config.scales:
        return Verdict("not testable", "needs the scale 0.1")
    gaps = {
        arm: max(
            np.abs(_ends(results, arm, name) - _ends(results, arm, name, 0.1)).max()
            for name in ("x1", "x2")
        )
        for arm in ("normalized_sum", "mean")
    }
    text = ", ".join(f"{arm} {gap:.2g}" for arm, gap in gaps.items())
    return Verdict.of(gaps["normalized_sum"] < 0.05 < gaps["mean"], f"ends differ by {text}")


def _mean_scaled(results: Results) -> Verdict:
    x1, x2 = _ends(results, "mean", "x1", 0.1), _ends(results, "mean", "x2", 0.1)
    good = (np.abs(x1[[0, 1, 3, 4]] + 5.73) < 0.05).all() and x2[2] > 0
    return Verdict.of(good, f"x1 = {_text(x1)}, x2 = {_text(x2)}")


Toy.claims = tuple(
    Claim(text, source, _full(check))
    for text, source, check in (
        (
            "The mean of the losses is stuck in the valley from (-8.5, 7.5) and (9, 9).",
            "arXiv 2110.14048; methods card (x2 = 2.5)",
            _mean_stuck,
        ),
        (
            "MGDA, the normalised sum, IMTL-G and Nash reach the Pareto set from all starts.",
            "methods card (x2 in [-8.44, -8.36])",
            _reach,
        ),
        ("PCGrad does too from the other three starts.", "methods card", _pcgrad),
        (
            "PCGrad is slow from (-8.5, 7.5) and (9, 9): by the end at x2 = -7.60 and -7.75.",
            "methods card",
            _pcgrad_slow,
        ),
        (
            "CAGrad goes to the minimum of the mean; from the hard starts it takes longer.",
            "arXiv 2110.14048; methods card (-15.09)",
            _cagrad,
        ),
        (
            "The normalised sum does not notice a factor of 0.1 on one loss; the mean does.",
            "kexue.fm 8870",
            _invariant,
        ),
        (
            "With that factor the mean ends at x1 = -5.73 from four starts and is stuck from one.",
            "methods card",
            _mean_scaled,
        ),
    )
)


# --- three heads on the digits -------------------------------------------------------------------

DIGITS_ARMS = ("mean", "normalized_sum", "mgda", "nash", "upgrad", "pcgrad", "cagrad", "imtl_g")
TASKS = ("digit", "parity", "ink")


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """A network with three heads, and its training.

    Attributes:
      arms: methods of `jaxkit.optim.multitask`.
      seeds: one model for each, side by side.
      factors: of the third loss.
      steps: of Adam.
      batch_size: images in a batch.
      learning_rate: of Adam.
      width: units of both shared layers.
    """

    arms: tuple[str, ...] = ("mean", "normalized_sum", "mgda", "nash", "upgrad")
    seeds: tuple[int, ...] = (0, 1, 2)
    factors: tuple[float, ...] = (1.0, 100.0)
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    width: int = 32

    def __post_init__(self) -> None:
        _check_arms(self.arms, DIGITS_ARMS)
        for name in ("steps", "batch_size", "width"):
            check_int(name, getattr(self, name), least=1)
        check_real("learning_rate", self.learning_rate, above=0)
        if not self.seeds:
            raise ValueError("seeds must hold at least one seed; got none.")
        _check_factors("factors", self.factors)


def _network(key: jax.Array, width: int) -> Any:
    """Two shared layers and a linear head for each task."""
    sizes = {"encoder": (64, width), "middle": (width, width)}
    sizes |= dict(zip(TASKS, ((width, 10), (width, 1), (width, 1)), strict=True))
    kernels = {
        name: {
            "kernel": jax.nn.initializers.he_normal()(jax.random.fold_in(key, i), size),
            "bias": jnp.zeros(size[1]),
        }
        for i, (name, size) in enumerate(sizes.items())
    }
    heads = {name: kernels.pop(name) for name in TASKS}
    return {"shared": kernels, "heads": heads}


def _outputs(params: Any, images: jax.Array) -> dict[str, jax.Array]:
    layer = lambda of, x: jnp.dot(x, of["kernel"]) + of["bias"][None]
    h = jax.nn.relu(layer(params["shared"]["encoder"], images))
    h = jax.nn.relu(layer(params["shared"]["middle"], h))
    return {name: layer(params["heads"][name], h) for name in TASKS}


def _targets(images: np.ndarray, labels: np.ndarray, ink: tuple[float, float]) -> dict[str, Any]:
    flat = images.reshape(len(images), -1)
    mass = (flat.sum(1) - ink[0]) / ink[1]
    return {"images": flat, "digit": labels, "parity": labels % 2, "ink": mass.astype(np.float32)}


def _digit_losses(params: Any, batch: Any, factor: jax.Array) -> jax.Array:
    out = _outputs(params, batch["images"])
    digit = optax.softmax_cross_entropy_with_integer_labels(out["digit"], batch["digit"])
    parity = optax.sigmoid_binary_cross_entropy(
        out["parity"][:, 0], batch["parity"].astype(jnp.float32)
    )
    ink = (out["ink"][:, 0] - batch["ink"]) ** 2
    return jnp.stack([jnp.mean(digit), jnp.mean(parity), factor * jnp.mean(ink)])


@partial(jax.jit, static_argnames=("arm", "config"))
def fit(arm: str, config: DigitsConfig, seeds: jax.Array, factor: Any, train: Any) -> Any:
    """Trained parameters of all seeds, and the losses `[seeds, steps, 3]` on the way."""
    optimizer = optax.adam(config.learning_rate)
    examples = len(train["images"])

    def one(seed: jax.Array) -> Any:
        start, draws = jax.random.split(jax.random.key(seed))
        params = _network(start, config.width)

        def step(carry: Any, number: jax.Array) -> Any:
            params, state = carry
            key = jax.random.fold_in(draws, number)
            index = jax.random.randint(key, (config.batch_size,), 0, examples)
            batch = jax.tree.map(lambda x: x[index], train)
            grads, aux = multitask.aggregate(
                lambda p: _digit_losses(p, batch, factor),
                params,
                method=arm,
                key=key,
                shared={"shared": True, "heads": False},
            )
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), aux.losses

        carry = (params, optimizer.init(params))
        (params, _), losses = jax.lax.scan(step, carry, jnp.arange(config.steps))
        return params, losses

    return jax.vmap(one)(seeds)


@jax.jit
def evaluate(params: Any, test: Any) -> dict[str, jax.Array]:
    """Error rates of the two classifiers, and the unexplained share of the variance of ink."""
    out = _outputs(params, test["images"])
    return {
        "digit": jnp.mean(jnp.argmax(out["digit"], -1) != test["digit"]),
        "parity": jnp.mean((out["parity"][:, 0] > 0) != (test["parity"] == 1)),
        "ink": jnp.mean((out["ink"][:, 0] - test["ink"]) ** 2) / jnp.var(test["ink"]),
    }


class Digits(Experiment):
    """Test errors of an arm, for each factor f of the third loss: `digit@f`, `parity@f`, `ink@f`.

    Error rates of the two classifiers, and the share of the variance of ink that is not explained.
    """

    name = "multitask-digits"
    title = "Three heads on the digits, one loss multiplied by 100"
    description = (
        "A network of two shared layers learns the digit, its parity and its amount of ink; 8×8 "
        "images, 1257 to train and 540 to test. Columns are test errors, @100 those with the third "
        "loss multiplied by 100. Heads follow their own losses; arms differ in the shared layers."
    )
    sources = ("kexue.fm 8870", "kexue.fm 8896", "arXiv 2202.01017")
    config_class = DigitsConfig
    presets: ClassVar[Mapping[str, Any]] = {
        "smoke": DigitsConfig(arms=("mean", "normalized_sum"), seeds=(0,), steps=20, width=8),
        "cpu": DigitsConfig(),
        "gpu": DigitsConfig(arms=DIGITS_ARMS, seeds=tuple(range(10)), steps=5000, width=128),
    }
    arms = DIGITS_ARMS
    columns = tuple(_at(task, factor) for factor in (1.0, 100.0) for task in TASKS)

    def run_arm(
        self, config: DigitsConfig, arm: str, ctx: Context
    ) -> Mapping[str, Sequence[float]]:
        images = data.digit_images()
        mass = images.train_images.reshape(len(images.train_images), -1).sum(1)
        ink = float(mass.mean()), float(mass.std())
        train = _targets(images.train_images, images.train_labels, ink)
        test = _targets(images.test_images, images.test_labels, ink)
        metrics: dict[str, list[float]] = {}
        # The method sees the same problem whatever the name of the run's other arms and factors.
        same = dataclasses.replace(config, arms=(arm,), factors=(1.0,))
        with ctx.progress(arm, len(config.factors)) as task:
            for factor in config.factors:
                params, losses = fit(
                    arm, same, jnp.asarray(config.seeds), jnp.float32(factor), train
                )
                for name, values in jax.vmap(evaluate, (0, None))(params, test).items():
                    metrics[_at(name, factor)] = np.asarray(values, np.float64).tolist()
                ctx.save_arrays(_at(f"losses-{arm}", factor), losses=losses)
                task.advance()
        return metrics

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """Errors of two tasks against each other: one point an arm, one panel a factor."""
        factors = results.config.factors
        path = ctx.run_dir / "plots" / "front.png"
        with figure(path, columns=len(factors), squeeze=False, sharex=True, sharey=True) as axes:
            for axis, factor in zip(axes[0], factors, strict=True):
                for arm in results.arms:
                    x, y = (results.metric(arm, _at(name, factor)) for name in ("ink", "digit"))
                    (line,) = axis.plot(x, y, ".", alpha=0.5)
                    axis.plot(x.mean(), y.mean(), "o", color=line.get_color(), label=arm)
                axis.set(xlabel="ink: unexplained variance", xscale="log", yscale="log")
                number_log_ticks(axis.xaxis, axis.yaxis)
                axis.set_title(f"third loss × {factor:g}", fontsize=10)
                axis.spines[["top", "right"]].set_visible(False)
            axes[0, 0].set_ylabel("digit: error rate")
            axes[0, -1].legend(frameon=False, fontsize=9)
        return [path]


def _trained(check: Any) -> Any:
    def checked(results: Results) -> Verdict:
        config = results.config
        if config.steps < 500 or not {1.0, 100.0} <= set(config.factors):
            return Verdict("not testable", "needs 500 steps and the factors 1 and 100")
        return check(results)

    return checked


def _cost(results: Results, arm: str) -> float:
    return results.mean(arm, "digit@100") - results.mean(arm, "digit@1")


def _immune(results: Results) -> Verdict:
    costs = {arm: _cost(results, arm) for arm in ("normalized_sum", "nash")}
    text = ", ".join(f"{arm} {cost:+.4f}" for arm, cost in costs.items())
    return Verdict.of(max(map(abs, costs.values())) <= 0.01, f"error with the factor: {text}")


def _mean_pays(results: Results) -> Verdict:
    cost = _cost(results, "mean")
    return Verdict.of(cost >= 0.01, f"error with the factor: {cost:+.4f}, asked +0.01")


def _balanced_ahead(results: Results) -> Verdict:
    a, b = (results.mean(arm, "digit@100") for arm in ("normalized_sum", "mean"))
    return Verdict.of(a < b, f"normalized_sum {a:.4f}, mean {b:.4f}")


Digits.claims = tuple(
    Claim(text, source, _trained(check))
    for text, source, check in (
        (
            "Nash and the normalised sum do not notice the factor: digit error within 0.01.",
            "kexue.fm 8870; arXiv 2202.01017",
            _immune,
        ),
        ("The mean pays for it: digit error up by 0.01.", "kexue.fm 8870", _mean_pays),
        (
            "With the factor the normalised sum has fewer digits wrong than the mean.",
            "kexue.fm 8870",
            _balanced_ahead,
        ),
    )
)
