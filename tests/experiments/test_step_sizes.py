"""Experiments on exponentiated gradient: data, arms, claims, and runs from end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxkit_experiments.experiment import Context, Results
from jaxkit_experiments.optim import classifiers, sparse_regression, step_sizes
from jaxkit_experiments.optim.sparse_regression import SparseRegression, SparseRegressionConfig
from jaxkit_experiments.optim.step_sizes import ARMS, StepSizeAdaptation, StepSizeConfig

CPU = StepSizeAdaptation.presets["cpu"]
SPARSE = SparseRegression.presets["cpu"]


# --- data and models ---------------------------------------------------------------------------


def test_labels_change_at_the_step_and_stay_with_their_images():
    images = np.arange(10)[:, None]
    following = (np.arange(10) + 1) % 10
    batches = classifiers.Batches(images, np.arange(10), 4, 3, following, 5)
    for step in (0, 4, 5, 9):
        batch = batches[step]
        shift = 0 if step < 5 else 1
        np.testing.assert_array_equal(batch["labels"], (batch["images"][:, 0] + shift) % 10)
    plain = classifiers.Batches(images, np.arange(10), 4, 3)
    np.testing.assert_array_equal(plain[9]["images"], batches[9]["images"])


def test_resnet_has_the_size_of_resnet_18():
    model = nnx.eval_shape(lambda: classifiers.build("resnet18", (32, 32, 3), 10, rngs=nnx.Rngs(0)))
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    # That of the usual one for 32×32 images, which has no normalization of shortcuts' here.
    shortcuts = 2 * (128 + 256 + 512)
    stem = 2 * 64
    assert count == 11_173_962 - shortcuts - stem


@pytest.mark.parametrize("name", classifiers.MODELS)
def test_models_map_images_to_logits(name):
    def logits(images):
        return classifiers.build(name, images.shape[1:], 7, rngs=nnx.Rngs(0))(images)

    out = jax.eval_shape(logits, jax.ShapeDtypeStruct((3, 12, 12, 2), jnp.float32))
    assert (out.shape, out.dtype) == ((3, 7), jnp.float32)


# --- arms --------------------------------------------------------------------------------------


@pytest.mark.x32
def test_arms_differ_in_what_they_adapt():
    grads = [jnp.array([1.0, -0.5]), jnp.array([0.8, 0.5]), jnp.array([1.2, -0.1])]
    sizes = {}
    for arm in ARMS:
        optimizer = step_sizes.make_optimizer(CPU, arm, 0.1)
        params = jnp.zeros(2)
        state = optimizer.init(params)
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules
            for g in grads:
                _, state = optimizer.update(g, state, params)
        if arm in step_sizes.ADAPTIVE:
            found = state.step_sizes
            sizes[arm] = (found.scale is not None, found.gain is not None)
        else:
            assert not hasattr(state, "step_sizes")
    assert sizes == {
        "egdd": (True, True),
        "post": (True, True),
        "fast-scale": (True, True),
        "gains": (False, True),
        "scale": (True, False),
        "hypergradient": (True, False),
    }


@pytest.mark.x32
def test_cosine_ends_at_zero():
    config = dataclasses.replace(CPU, steps=4)
    optimizer = step_sizes.make_optimizer(config, "cosine", 0.1)
    params, sizes = jnp.ones(1), []
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules
        for _ in range(5):
            updates, state = optimizer.update(jnp.ones(1), state, params)
            sizes.append(float(updates[0]))
    assert sizes[0] == pytest.approx(-0.1)
    assert sizes[-1] == pytest.approx(0, abs=1e-7)


def test_recovery_counts_from_the_shift_and_is_capped():
    def record(step, accuracy, shifted):
        return {"step": step, "split": "evaluation", "accuracy": accuracy, "shifted": shifted}

    history = [
        {"step": 10, "split": "train", "loss": [1.0, 1.0]},
        record(10, [0.5, 0.5], [0.9, 0.0]),  # before the shift the new labels do not count
        record(20, [0.8, 1.0], [0.1, 0.0]),
        record(30, [0.0, 0.0], [0.75, 0.9]),
        record(40, [0.0, 0.0], [0.76, 0.94]),
    ]
    assert step_sizes.recovery(history, 20, 40) == [20.0, 20.0]
    assert step_sizes.recovery(history, 20, 40, share=0.9) == [10.0, 10.0]
    assert step_sizes.recovery(history, 25, 90) == [15.0, 65.0]
    with pytest.raises(ValueError, match="history must have an evaluation"):
        step_sizes.recovery(history, 5, 40)


# --- sparse regression -------------------------------------------------------------------------


def test_streams_have_the_targets_that_are_said():
    config = dataclasses.replace(SPARSE, noise=0.0)
    x, y = sparse_regression.draw(config, 32, 7)
    assert set(np.unique(x)) == {-1.0, 1.0}
    w, *_ = np.linalg.lstsq(x, y, rcond=None)
    np.testing.assert_allclose(np.abs(w[:3]), 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(w[3:], 0, atol=1e-6)
    noisy = sparse_regression.draw(dataclasses.replace(config, noise=0.1), 32, 7)[1]
    assert 0.08 < np.std(noisy - y) < 0.12


@pytest.mark.x32
@pytest.mark.parametrize("arm", ["gd", "eg"])
def test_losses_are_those_of_numpy(arm):
    config = dataclasses.replace(SPARSE, examples=20)
    x, y = sparse_regression.draw(config, 8, 0)
    got = sparse_regression.losses(arm, jnp.array([0.01, 0.05]), x[None], y[None])
    for number, rate in enumerate((0.01, 0.05)):
        plus, minus, w, paid = np.full(8, 1 / 16), np.full(8, 1 / 16), np.zeros(8), []
        for features, target in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
            error = w @ features - target
            paid.append(error**2)
            g = 2 * error * features
            if arm == "gd":
                w = w - rate * g
            else:
                plus, minus = plus * np.exp(-rate * g), minus * np.exp(rate * g)
                total = np.sum(plus + minus)
                plus, minus = plus / total, minus / total
                w = plus - minus
        np.testing.assert_allclose(got[number, 0], paid, rtol=1e-3, atol=1e-6)


@pytest.mark.x32
@pytest.mark.slow
def test_card_ablation_a(tmp_path):
    """EG± pays less than a third at N = 256, with the card's grid and seeds."""
    config = dataclasses.replace(SPARSE, sizes=(256,))
    experiment, ctx = SparseRegression(), Context(tmp_path)
    arms = {arm: experiment.run_arm(config, arm, ctx.for_arm(arm)) for arm in config.arms}
    results = Results(config, arms)
    assert results.mean("eg", "loss[256]") < results.mean("gd", "loss[256]") / 3
    assert results.mean("eg", "loss[256]") == pytest.approx(15.4, rel=0.15)
    assert results.mean("gd", "loss[256]") == pytest.approx(78.4, rel=0.15)
    rates = np.asarray(config.rates)
    assert rates[0] < results.mean("eg", "rate[256]") < rates[-1], "the best is inside the grid"
    files = experiment.plot(results, ctx)
    assert [file.stem for file in files] == ["sizes", "streams"]
    assert all(file.stat().st_size > 5000 for file in files)


# --- configs and claims ------------------------------------------------------------------------


def judge(experiment, config, arms):
    seeds = len(config.seeds)
    results = Results(
        config, {arm: {k: [v] * seeds for k, v in row.items()} for arm, row in arms.items()}
    )
    return [claim.judge(results).status for claim in experiment.claims]


def card():
    """The card's numbers, and for what it does not give what the claims say."""
    arms = {
        arm: {f"accuracy[{rate:g}]": value for rate, value in of.items()}
        for arm, of in step_sizes.CARD.items()
    }
    arms |= {"post": dict(arms["egdd"]), "cosine": dict(arms["fixed"])}
    for arm, row in arms.items():
        row["train_loss[0.0001]"] = 1.917 if arm == "fixed" else 0.112
        for rate in CPU.shift_rates:
            row[f"recovery[{rate:g}]"] = 500.0 if arm == "fixed" else 100.0
    return arms


def test_claims_on_the_cards_numbers():
    assert judge(StepSizeAdaptation, CPU, card()) == ["held"] * 8


@pytest.mark.parametrize(
    ("index", "arm", "metric", "value"),
    [
        (0, "egdd", "accuracy[0.0001]", 0.95),
        (1, "egdd", "accuracy[0.1]", 0.979),
        (2, "egdd", "train_loss[0.0001]", 0.2),
        (3, "gains", "accuracy[0.0001]", 0.92),
        (3, "scale", "accuracy[0.0001]", 0.971),
        (4, "fast-scale", "accuracy[0.0001]", 0.970),
        (5, "egdd", "recovery[0.01]", 500.0),
        (6, "cosine", "accuracy[0.01]", 0.993),
        (7, "gains", "accuracy[0.01]", 0.95),
    ],
)
def test_each_claim_turns_on_its_numbers(index, arm, metric, value):
    arms = card()
    arms[arm][metric] = value
    assert judge(StepSizeAdaptation, CPU, arms)[index] == "not held"


def test_claims_are_not_testable_without_arms_or_training():
    assert set(judge(StepSizeAdaptation, CPU, {})) == {"not testable"}
    short = dataclasses.replace(CPU, steps=500)
    assert set(judge(StepSizeAdaptation, short, card())) == {"not testable"}
    assert set(judge(SparseRegression, SPARSE, {})) == {"not testable"}
    small = SparseRegression.presets["smoke"]
    assert judge(SparseRegression, small, {})[0] == "not testable"


def test_sparse_claims_turn_on_their_numbers():
    def arms(**changes):
        rows = {
            arm: {f"loss[{n}]": value for n, value in of.items()}
            for arm, of in sparse_regression.CARD.items()
        }
        for arm, (n, value) in changes.items():
            rows[arm][f"loss[{n}]"] = value
        return rows

    assert judge(SparseRegression, SPARSE, arms()) == ["held"] * 3
    assert judge(SparseRegression, SPARSE, arms(eg=(256, 27.0)))[0] == "not held"
    assert judge(SparseRegression, SPARSE, arms(eg=(2048, 24.0)))[1] == "not held"
    assert judge(SparseRegression, SPARSE, arms(gd=(32, 22.0)))[2] == "not held"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("edgg",)}, "arms must be one of .*Did you mean 'egdd'"),
        ({"model": "cnn"}, "model must be one of"),
        ({"inner": "sgd"}, "inner must be one of 'momentum', 'adam'"),
        ({"rates": (0.1, 0.01)}, "rates must be growing positive numbers"),
        ({"shift_rates": (0.0,)}, "shift_rates must be growing positive"),
        ({"rates": ()}, "rates and seeds must hold"),
        ({"steps": 1}, "steps must be at least 2"),
    ],
)
def test_wrong_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CPU, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("ge",)}, "arms must be one of"),
        ({"sizes": (64, 32)}, "sizes must be growing"),
        ({"sizes": (2, 32)}, "sizes must be at least relevant = 3"),
        ({"rates": (0.1, -0.1)}, "rates must be positive"),
        ({"seeds": ()}, "seeds must hold"),
    ],
)
def test_wrong_sparse_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPARSE, **changes)


def test_the_presets_are_the_cards_ablations():
    assert (SPARSE.sizes, SPARSE.examples, SPARSE.relevant) == ((32, 256, 2048), 400, 3)
    assert SparseRegressionConfig() == SPARSE
    assert StepSizeConfig() == CPU
    assert (CPU.steps, CPU.batch_size, CPU.model, CPU.inner) == (1500, 64, "mlp", "momentum")
    assert CPU.rates == (1e-4, 1e-3, 1e-2, 1e-1)
    assert len(CPU.seeds) >= 3
    gpu = StepSizeAdaptation.presets["gpu"]
    assert {"fixed", "cosine", "post"} <= set(gpu.arms)
    assert (gpu.model, len(gpu.seeds)) == ("resnet18", 3)


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.x32
def test_a_run_from_end_to_end(tmp_path):
    experiment, ctx = StepSizeAdaptation(), Context(tmp_path)
    config = dataclasses.replace(
        StepSizeAdaptation.presets["smoke"], arms=("egdd",), seeds=(0, 5), rates=(1e-3, 1e-2)
    )
    arms = {arm: experiment.run_arm(config, arm, ctx.for_arm(arm)) for arm in config.arms}
    for values in arms["egdd"].values():
        assert len(values) == 2
        assert np.isfinite(values).all()
    records = [r for r in ctx.history("egdd") if r["split"] == "evaluation"]
    assert [r["step"] for r in records] == [5, 10, 15, 20]
    slow, fast, shifted = np.moveaxis([np.reshape(r["accuracy"], (3, 2)) for r in records], 1, 0)
    assert arms["egdd"]["accuracy[0.001]"] == slow[3].tolist()
    assert arms["egdd"]["accuracy[0.01]"] == fast[3].tolist()
    assert np.all(slow[3] < fast[3])
    # Until the shift both trainings are one.
    np.testing.assert_array_equal(shifted[:2], fast[:2])
    assert np.all(shifted[3] != fast[3])
    files = experiment.plot(Results(config, arms), ctx)
    assert [file.stem for file in files] == ["rates", "shift"]
    assert all(file.stat().st_size > 5000 for file in files)
    told = experiment.epilogue(Results(config, arms), ctx)
    assert f"{fast[3].mean():.4g} at 0.01" in told
    assert "recovery egdd" in told


@pytest.mark.slow
@pytest.mark.x32
def test_the_gpu_preset_trains_on_cifar_from_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train.bin", 6), ("test.bin", 3)):
        records = rng.integers(0, 256, (count, 3074), dtype=np.uint8)
        records[:, 1] %= 100
        (tmp_path / name).write_bytes(records.tobytes())
    config = dataclasses.replace(
        StepSizeAdaptation.presets["gpu"],
        **{"rates": (1e-2,), "shift_rates": (), "seeds": (0,), "steps": 2, "batch_size": 2},
    )
    ctx = Context(tmp_path / "run", data=tmp_path)
    metrics = StepSizeAdaptation().run_arm(config, "post", ctx.for_arm("post"))
    assert np.isfinite(metrics["train_loss[0.01]"]).all()
