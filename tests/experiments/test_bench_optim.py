"""`jaxkit bench optim`: what it counts, what it solves, and what it prints and writes."""

import json

import jax
import numpy as np
import pytest
import scipy.optimize
from jaxkit_experiments import cli
from jaxkit_experiments.speed import optim

TINY = optim.QUICK


def test_the_model_has_fifty_million_parameters():
    shapes = jax.tree.leaves(optim.language_model_shapes(optim.FULL))
    count = sum(leaf.size for leaf in shapes)
    assert abs(count - 50e6) < 0.01 * 50e6


@pytest.mark.x32
def test_state_is_that_of_the_card():
    # Bytes for each float32 parameter, from the cards of Tiger and of exponentiated gradient.
    wanted = {
        "tiger": 4,
        "tiger, 4 accumulated": 4,
        "tiger, bfloat16 momentum": 2,
        "optax.lion": 4,
        "optax.lion in MultiSteps(4)": 8,
        "optax.adamw": 8,
        "optax.adamw in MultiSteps(4)": 12,
        "optax.lamb in MultiSteps(4)": 12,
        "accumulated_adam, 4 accumulated": 8,
        "lazy_rows(optax.lion)": 4,
        "dynamic_loss_scale(optax.lion)": 4,
        "eg, hypentropy": 0,
        "eg, signed": 8,
        "eg_sgd": 8,
        "egdd": 12,
        "eg_stepsize(optax.lion)": 4 + 12,
    }
    shapes = optim.language_model_shapes(TINY)
    held = {name: optim.state_bytes(opt, shapes) for name, opt in optim.optimizers().items()}
    assert held == wanted


@pytest.mark.x32
def test_counted_traffic_of_an_update():
    shapes = optim.language_model_shapes(TINY)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # Optax's bias correction raises a float to an integer power.
    with jax.numpy_dtype_promotion("standard"):
        work = optim.update_work(TINY)
    # Gradient read, parameter and each moment read and written.
    assert work["tiger"].bytes == pytest.approx(20 * count, rel=0.01)
    assert work["lion"].bytes == pytest.approx(20 * count, rel=0.01)
    assert work["adamw"].bytes == pytest.approx(28 * count, rel=0.01)
    assert work["gram"].matrix == 2 * TINY.tasks**2 * TINY.task_parameters


@pytest.mark.slow
@pytest.mark.x32
def test_bench_prints_and_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "bench.json"
    with jax.numpy_dtype_promotion("standard"):
        assert cli.main(["bench", "optim", "--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "jaxkit bench optim" in printed
    assert "state of tiger" in printed
    record = json.loads(out.read_text())
    lines = {line["name"]: line for line in record["lines"]}
    assert all(line["met"] is None for line in lines.values()), "small sizes are not judged"
    assert {row["kernel"] for row in record["roofline"]} == {"tiger", "lion", "adamw", "gram"}
    assert all(row["measured"] > 0 for row in record["roofline"])

    # The weights whose time was taken are the hull's point of least norm.
    rows = optim.task_rows(TINY)
    J = np.concatenate([np.asarray(leaf, np.float64) for leaf in rows.values()], axis=1)
    G = J @ J.T / np.trace(J @ J.T)
    best = scipy.optimize.minimize(
        lambda w: w @ G @ w,
        np.full(TINY.tasks, 1 / TINY.tasks),
        jac=lambda w: 2 * G @ w,
        method="SLSQP",
        bounds=[(0, 1)] * TINY.tasks,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14},
    )
    w = np.asarray(record["details"]["min-norm"]["weights"])
    assert w.sum() == pytest.approx(1, abs=1e-6)
    assert w @ G @ w == pytest.approx(best.fun, rel=1e-5)
    assert lines["distance from the optimum"]["value"] < 1e-6
