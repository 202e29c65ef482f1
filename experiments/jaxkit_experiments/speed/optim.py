"""`jaxkit bench optim`: what an optimizer holds, what an update costs, what task weights cost.

Four parts, all in one process: bytes of state for each parameter, counted from the state itself;
time of an update on the parameters of a language model against `optax.lion` and `optax.adamw`;
time of a window of accumulated gradients against `optax.MultiSteps`; and the min-norm solve
against the Gram matrix that it needs anyway. A target is judged only at the size it is stated for.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jaxkit.optim import (
    accumulated_adam,
    dynamic_loss_scale,
    eg,
    eg_sgd,
    eg_stepsize,
    egdd,
    lazy_rows,
    tiger,
)
from jaxkit.optim.multitask import aggregate_rows, gram_matrix, mgda
from jaxkit_experiments.speed import measure, roofline
from jaxkit_experiments.speed.bench import Line, Part, command, milliseconds, roofline_rows, run

__all__ = [
    "Sizes",
    "bench",
    "language_model_shapes",
    "main",
    "multi_steps",
    "optimizers",
    "state_bytes",
    "task_rows",
]

WINDOW = 4
"""Micro-batches to an update, where gradients are accumulated."""


@dataclass(frozen=True)
class Sizes:
    """Problem sizes of one run of the benchmark.

    Example:
        >>> FULL.tasks, QUICK.judged
        (8, False)
    """

    vocabulary: int = 36864
    width: int = 512
    layers: int = 10
    tasks: int = 8
    task_parameters: int = 10_000_000
    repeats: int = 9
    budget: float = 60.0
    judged: bool = True
    """Whether these are the sizes that the targets are stated for."""


FULL = Sizes()
QUICK = Sizes(
    vocabulary=64,
    width=16,
    layers=2,
    task_parameters=3000,
    repeats=3,
    budget=5.0,
    judged=False,
)


def language_model_shapes(sizes: Sizes) -> dict[str, Any]:
    """Shapes of the parameters of a transformer, 50 million of them at full size.

    Example:
        >>> shapes = language_model_shapes(FULL)
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
        50398208
    """
    d = sizes.width
    shapes: dict[str, Any] = {"embed": {"embedding": (sizes.vocabulary, d)}}
    for layer in range(sizes.layers):
        shapes[f"layer_{layer}"] = {
            "norm": {"scale": (d,), "bias": (d,)},
            "qkv": {"kernel": (d, 3 * d), "bias": (3 * d,)},
            "out": {"kernel": (d, d), "bias": (d,)},
            "mlp_norm": {"scale": (d,), "bias": (d,)},
            "up": {"kernel": (d, 4 * d), "bias": (4 * d,)},
            "down": {"kernel": (4 * d, d), "bias": (d,)},
        }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def _normal(shapes: Any, seed: int, scale: float) -> Any:
    """Numbers of a standard deviation, of given shapes; NumPy draws them without a compilation."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(draw, shapes)


def multi_steps(inner: optax.GradientTransformation, k: int) -> optax.GradientTransformation:
    """`inner` in `optax.MultiSteps`: `k` micro-batches to an update, in a buffer of their own."""
    steps = optax.MultiSteps(inner, k)
    return optax.GradientTransformation(steps.init, steps.update)


def optimizers() -> dict[str, optax.GradientTransformation]:
    """What is counted and timed: the toolkit's optimizers beside those of optax."""
    lion, adamw = optax.lion(1e-4, weight_decay=0.01), optax.adamw(1e-3)
    return {
        "tiger": tiger(1e-3),
        f"tiger, {WINDOW} accumulated": tiger(1e-3, accumulation_steps=WINDOW),
        "tiger, bfloat16 momentum": tiger(1e-3, mu_dtype=jnp.bfloat16),
        "optax.lion": lion,
        f"optax.lion in MultiSteps({WINDOW})": multi_steps(lion, WINDOW),
        "optax.adamw": adamw,
        f"optax.adamw in MultiSteps({WINDOW})": multi_steps(adamw, WINDOW),
        f"optax.lamb in MultiSteps({WINDOW})": multi_steps(optax.lamb(1e-3), WINDOW),
        f"accumulated_adam, {WINDOW} accumulated": accumulated_adam(
            1e-3, accumulation_steps=WINDOW
        ),
        "lazy_rows(optax.lion)": lazy_rows(lion),
        "dynamic_loss_scale(optax.lion)": dynamic_loss_scale(lion),
        "eg, hypentropy": eg(1e-3, constraint="hypentropy", beta=1.0),
        "eg, signed": eg(1e-3, constraint="signed"),
        "eg_sgd": eg_sgd(1e-3, gamma=1e-3),
        "egdd": egdd(1e-3),
        "eg_stepsize(optax.lion)": eg_stepsize(lion),
    }


def state_bytes(optimizer: optax.GradientTransformation, params: Any) -> float:
    """Bytes of state for each parameter, scalars such as step counts aside; nothing is allocated.

    Args:
        optimizer: any optax transformation.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.

    Example:
        >>> state_bytes(optax.adam(1e-3), {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
        8.0
    """
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.ndim)
    return held / sum(leaf.size for leaf in jax.tree.leaves(params))


def state(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """Bytes of state for each parameter, of every optimizer."""
    shapes = language_model_shapes(sizes)
    held = {name: state_bytes(optimizer, shapes) for name, optimizer in optimizers().items()}
    limits = {"tiger": 4.0, f"tiger, {WINDOW} accumulated": 4.0}  # one buffer
    lines = [
        Line(f"state of {name}", value, "B/param", most=limits.get(name))
        for name, value in held.items()
    ]
    return lines, held


def _step(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """New parameters and state, as a training step computes them."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _in_turn(
    names: Mapping[str, str], sizes: Sizes, micro_steps: int = 1
) -> dict[str, measure.Timing]:
    """Time updates in place, as in training, `micro_steps` of them to a call."""
    known, shapes = optimizers(), language_model_shapes(sizes)
    params, grads = _normal(shapes, 0, 0.02), _normal(shapes, 1, 1e-3)

    def updates(optimizer: optax.GradientTransformation) -> Callable[[], Any]:
        step = jax.jit(_step(optimizer), donate_argnums=(0, 1))
        # Donated below, so that every optimizer needs a copy of its own.
        held = jax.tree.map(jnp.copy, params)
        state = jax.jit(optimizer.init)(held)

        def call() -> Any:
            nonlocal held, state
            for _ in range(micro_steps):
                held, state = step(held, state, grads)
            return held, state

        return call

    calls = {short: updates(known[name]) for short, name in names.items()}
    return measure.compare(calls, repeats=sizes.repeats, budget=sizes.budget)


def update(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """Time of an update, parameters applied, with donated buffers."""
    names = {"tiger": "tiger", "lion": "optax.lion", "adamw": "optax.adamw"}
    timings = _in_turn(names, sizes)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(language_model_shapes(sizes)))
    size = f"{parameters / 1e6:.3g}M parameters"
    against = measure.speedup(timings["tiger"], timings["lion"])
    lines = [
        Line(
            f"update of tiger against lion, {size}", against, "x", milliseconds(timings), most=1.1
        ),
        Line(
            f"update of tiger against adamw, {size}",
            measure.speedup(timings["tiger"], timings["adamw"]),
            "x",
        ),
    ]
    return lines, timings


def accumulation(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """Time of a whole window of accumulated gradients."""
    names = {
        "tiger": f"tiger, {WINDOW} accumulated",
        "lion": f"optax.lion in MultiSteps({WINDOW})",
        "adamw": f"optax.adamw in MultiSteps({WINDOW})",
    }
    timings = _in_turn(names, sizes, WINDOW)
    lines = [
        Line(
            f"window of {WINDOW} of tiger against {peer} in MultiSteps",
            measure.speedup(timings["tiger"], timings[peer]),
            "x",
            milliseconds(timings) if peer == "lion" else "",
        )
        for peer in ("lion", "adamw")
    ]
    return lines, timings


def task_rows(sizes: Sizes) -> dict[str, jax.Array]:
    """Gradients of several tasks, `[tasks, ...]` in four leaves, correlated as those of a model."""
    rng = np.random.default_rng(0)
    count = sizes.task_parameters // 4
    rows = {}
    for leaf in range(4):
        shared = rng.standard_normal(count, np.float32)
        own = rng.standard_normal((sizes.tasks, count), np.float32)
        lengths = np.linspace(0.5, 2.0, sizes.tasks, dtype=np.float32)[:, None]
        rows[f"leaf_{leaf}"] = jnp.asarray(lengths * (own + 0.1 * shared))
    return rows


def min_norm(sizes: Sizes) -> tuple[list[Line], dict[str, Any]]:
    """The exact min-norm weights against the Gram matrix, and against the whole aggregation."""
    rows = task_rows(sizes)
    gram = jax.jit(gram_matrix)
    weigh = jax.jit(lambda rows: mgda(gram_matrix(rows)))
    G, w = gram(rows), np.asarray(weigh(rows), np.float64)
    calls = {
        "gram": partial(gram, rows),
        "gram and solve": partial(weigh, rows),
        "solve": partial(jax.jit(mgda), G),
        "direction": partial(jax.jit(lambda rows: aggregate_rows(rows, method="mgda")[0]), rows),
    }
    timings = measure.compare(calls, repeats=sizes.repeats, budget=sizes.budget)
    # The optimum: every task falls at least as fast as the squared length of the direction.
    products = np.asarray(G, np.float64) @ w
    gap = max(0.0, float(w @ products - products.min())) / float(np.trace(G))
    size = f"{sizes.tasks} tasks, {sizes.task_parameters / 1e6:.3g}M parameters"
    lines = [
        Line(
            f"Gram matrix and min-norm solve against the Gram matrix, {size}",
            measure.speedup(timings["gram and solve"], timings["gram"]),
            "x",
            milliseconds(timings),
            most=1.3,
        ),
        Line(
            "the solve alone",
            measure.speedup(timings["solve"], timings["gram"]),
            "x",
            "of the Gram matrix",
        ),
        Line(
            "min-norm weights and direction against the Gram matrix",
            measure.speedup(timings["direction"], timings["gram"]),
            "x",
        ),
        Line("distance from the optimum", gap, "", "w'Gw - min Gw, of the trace", most=1e-6),
    ]
    return lines, {"weights": w.tolist(), **timings}


PARTS: dict[str, Part] = {
    "state": state,
    "update": update,
    "accumulation": accumulation,
    "min-norm": min_norm,
}


def update_work(sizes: Sizes) -> dict[str, roofline.Work]:
    """Counted work of an update, and of the Gram matrix."""
    shapes = language_model_shapes(sizes)
    known = optimizers()
    work = {}
    for short, name in (("tiger", "tiger"), ("lion", "optax.lion"), ("adamw", "optax.adamw")):
        state = jax.eval_shape(known[name].init, shapes)
        work[short] = roofline.count(_step(known[name]), shapes, state, shapes)
    rows = jax.ShapeDtypeStruct((sizes.tasks, sizes.task_parameters), jnp.float32)
    work["gram"] = roofline.count(gram_matrix, rows)
    return work


def _rooflines(sizes: Sizes, details: Mapping[str, Any]) -> list[dict[str, Any]]:
    timings = {**details.get("update", {}), **details.get("min-norm", {})}
    work = update_work(sizes)
    return roofline_rows(work, {name: timings[name].median for name in work if name in timings})


def bench(
    sizes: Sizes = FULL,
    *,
    parts: Sequence[str] = (*PARTS, "roofline"),
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the benchmark and print its tables.

    Args:
        sizes: problem sizes; targets count only where `sizes.judged`.
        parts: which of "state", "update", "accumulation", "min-norm", "roofline".
        console: where to print; standard output by default.

    Returns:
        The record that `main` writes as JSON: environment, sizes, lines, timings, roofline.

    Example:
        >>> import io
        >>> record = bench(QUICK, parts=("state",), console=Console(file=io.StringIO()))
        >>> {line["name"]: round(line["value"], 2) for line in record["lines"]}["state of tiger"]
        4.0
    """
    return run("optim", sizes, PARTS, chosen=parts, rooflines=_rooflines, console=console)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `jaxkit bench optim [--quick] [--parts ...] [--out FILE]`.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        Exit status: 0 when everything ran, whatever the numbers say.
    """
    parser, finish = command(
        "optim",
        "Optimizers' state and time against optax, and the min-norm solve against its Gram matrix.",
        (*PARTS, "roofline"),
    )
    options = parser.parse_args(argv)
    return finish(options, partial(bench, QUICK if options.quick else FULL))


if __name__ == "__main__":
    sys.exit(main())
