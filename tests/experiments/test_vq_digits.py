"""Quantizers on the digits: data, model, metrics, claims, and a run from end to end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxkit_experiments.experiment import Context, Results
from jaxkit_experiments.vq import autoencoder, digits, digits_sweep, images
from jaxkit_experiments.vq.digits import ARMS, PILOT, DigitsVQ, VQAutoencoder
from jaxkit_experiments.vq.digits_sweep import DigitsVQSweep, DigitsVQSweepConfig

from tests.tolerance import tol

TINY = dataclasses.replace(DigitsVQ.presets["smoke"], arms=tuple(ARMS), codes=8, batch_size=16)
CPU = DigitsVQ.presets["cpu"]
SAMPLE = images.digits().train[:64]
EPS = tol(np.float32, 64)


@functools.cache
def model_of(arm, config=TINY):
    """Shared between tests, which must leave it as it is."""
    return VQAutoencoder(config, arm, SAMPLE, jax.random.key(0))


# --- data --------------------------------------------------------------------------------------


def test_the_split_is_the_cards_and_loses_no_image():
    from sklearn.datasets import load_digits

    parts = images.digits()
    assert (len(parts.train), len(parts.test)) == (1437, 360)
    together = np.concatenate([parts.train, parts.test]).reshape(-1, 64)
    known = load_digits().data / 16
    assert sorted(map(bytes, together)) == sorted(map(bytes, known.astype(np.float32)))


def test_every_epoch_shows_every_image_once_in_a_new_order():
    source = images.Shuffled(np.arange(10), 4, seed=3)
    stream = np.concatenate([source[step]["images"] for step in range(10)]).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in stream.tolist())
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 4
    # Batches are found again in any order, and differ between seeds.
    again = images.Shuffled(np.arange(10), 4, seed=3)
    np.testing.assert_array_equal(again[7]["images"], stream.reshape(-1)[28:32])
    np.testing.assert_array_equal(again[2]["images"], stream.reshape(-1)[8:12])
    other = images.Shuffled(np.arange(10), 4, seed=4)
    assert np.any(np.concatenate([other[step]["images"] for step in range(10)]) != stream.ravel())


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_is_no_larger_than_the_data(batch_size):
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 10\]"):
        images.Shuffled(np.arange(10), batch_size, seed=0)


# --- model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "tokens"),
    [("mlp", (8, 8, 1), 4), ("conv", (8, 12, 3), 6)],
)
def test_networks_map_images_to_codes_and_back(name, shape, tokens):
    pictures = jax.ShapeDtypeStruct((2, *shape), jnp.float32)

    def both(pictures):
        model = autoencoder.build(name, shape, 5, rngs=nnx.Rngs(0))
        z = model.encode(pictures)
        return z, model.decode(z)

    z, rebuilt = jax.eval_shape(both, pictures)
    assert z.shape == (2, tokens, 5)
    assert (rebuilt.shape, rebuilt.dtype) == (pictures.shape, pictures.dtype)


def test_a_code_of_the_convolutions_sees_and_shows_its_own_place():
    model = autoencoder.build("conv", (32, 32, 3), 5, rngs=nnx.Rngs(0))
    z = np.zeros((2, 64, 5), np.float32)
    z[1, 63] = 100.0  # the last row and column
    changed = np.asarray(nnx.jit(lambda model, z: model.decode(z))(model, jnp.asarray(z)))
    seen = np.abs(changed[1] - changed[0]).max(axis=-1)
    assert seen[-1, -1] > 0
    assert np.all(seen[:8, :8] == 0)


def test_networks_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="multiples of 4"):
        autoencoder.build("conv", (10, 8, 1), 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="model must be one of 'mlp', 'conv'"):
        autoencoder.build("mpl", (8, 8, 1), 5, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("arm", ["ste-ema", "rotation-loss", "simvq", "gumbel", "fsq", "lfq"])
def test_a_step_in_training_moves_what_the_arm_learns(arm):
    model = model_of(arm)
    batch = {"images": jnp.asarray(SAMPLE[:16])}
    before = jax.tree.map(jnp.copy, nnx.state(model))
    graph, params, other = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params):
        merged = nnx.merge(graph, params, other, copy=True)
        value, metrics = digits.loss(merged, batch, jax.random.key(1))
        return value, (metrics, nnx.state(merged))

    grads, (metrics, after) = gradients(params)
    codes = "codes" in before.get("bottleneck", {}).get("layer", {})
    assert codes == (ARMS[arm].get("quantizer") is None)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(grads))
    assert all(bool(jnp.isfinite(value)) for value in metrics.values())
    encoder = jax.tree.leaves(grads["network"]["encoder"])
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in encoder)
    if not codes:
        return
    layer, kind = before["bottleneck"]["layer"], ARMS[arm]["codebook"]
    learned = grads.get("bottleneck", {}).get("layer", {})
    assert set(learned) == {"ema": set(), "loss": {"codes"}, "simvq": {"weight"}}[kind]
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(learned))
    moved = after["bottleneck"]["layer"]
    same = np.array_equal(layer["codes"][...], moved["codes"][...])
    assert same == (kind != "ema")
    assert not np.array_equal(layer["counts"][...], moved["counts"][...])


@pytest.mark.parametrize("arm", ["ste-ema", "gumbel"])
def test_an_evaluation_changes_nothing_and_has_no_noise(arm):
    model = model_of(arm)
    before = jax.tree.map(np.asarray, nnx.state(model))
    first, second = (model(jnp.asarray(SAMPLE[:8]))[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))


def codes_of(model):
    return np.asarray(model.bottleneck.layer.codes[...], np.float64)


def test_starts_are_what_the_arms_say():
    z = np.asarray(model_of("ste-ema").encode(jnp.asarray(SAMPLE)), np.float64).reshape(-1, 4)
    tiny = codes_of(model_of("ste-loss"))
    assert 0 < np.abs(tiny).max() <= 1 / TINY.codes
    distances = np.linalg.norm(codes_of(model_of("ste-ema"))[:, None] - z[None], axis=-1)
    # Each code is the encoding of some image (of 32 drawn from these 64), none twice.
    assert distances.min(1).max() <= EPS * np.abs(z).max()
    assert len(set(distances.argmin(1))) == TINY.codes
    errors = {}
    for arm in ("ste-ema", "ste-kmeans", "ste-loss"):
        gaps = np.linalg.norm(codes_of(model_of(arm))[:, None] - z[None], axis=-1)
        errors[arm] = np.mean(gaps.min(0) ** 2)
    assert errors["ste-kmeans"] < errors["ste-ema"] < errors["ste-loss"]


def test_scaled_arms_multiply_the_encoders_output():
    plain, scaled = model_of("ste-loss"), model_of("ste-scaled")
    pictures = jnp.asarray(SAMPLE)
    np.testing.assert_allclose(scaled.encode(pictures), 10 * plain.encode(pictures), rtol=EPS)
    wide = model_of("rotation-scaled", dataclasses.replace(TINY, encoder_scale=3.0))
    np.testing.assert_allclose(wide.encode(pictures), 3 * plain.encode(pictures), rtol=EPS)


@pytest.mark.parametrize("arm", ["ste-ema", "rotation-loss", "lfq", "fsq"])
def test_metrics_are_what_numpy_counts(arm):
    model = model_of(arm)
    batch = {"images": jnp.asarray(SAMPLE)}
    metrics = {name: float(value) for name, value in digits.evaluate(model, batch).items()}
    rebuilt, z, quantized = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), part) for part in model(batch["images"])
    )
    counts = np.bincount(quantized.index.astype(int).ravel(), minlength=model.bottleneck.num_codes)
    share = counts[counts > 0] / counts.sum()
    expected = {
        "mse": np.mean((rebuilt - SAMPLE) ** 2),
        "usage": np.mean(counts > 0),
        "perplexity": np.exp(-np.sum(share * np.log(share))),
    }
    if arm != "fsq":
        q = quantized.output
        expected["quantization_error"] = np.sum((z - q) ** 2) / np.sum(z**2)
        ratios = np.linalg.norm(q, axis=-1) / np.linalg.norm(z, axis=-1)
        expected["norm_ratio"] = np.mean(ratios)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=EPS)
    assert ("quantization_error" in metrics) == (arm != "fsq")
    assert ("angle_gap" in metrics) == (arm in ("ste-ema", "rotation-loss"))
    if "angle_gap" in metrics and arm == "ste-ema":
        # Straight-through hands the gradient on as it is.
        cosine = np.sum(z * q, -1) / np.linalg.norm(q, axis=-1) / np.linalg.norm(z, axis=-1)
        angles = np.arccos(np.clip(cosine, -1, 1))
        assert metrics["turn_gap"] == pytest.approx(np.mean(angles), abs=1e-3)
        assert metrics["norm_gap"] == pytest.approx(np.mean(np.abs(1 / ratios - 1)), rel=EPS)


@pytest.mark.parametrize(
    ("arm", "keeps"),
    [
        ("ste-loss", {"angle": False, "norm": False}),
        ("rotation-loss", {"angle": True, "norm": True}),
        ("unscaled-loss", {"angle": True, "norm": False}),
        ("reflection-loss", {"angle": True, "norm": True}),
    ],
)
def test_what_each_estimator_keeps_of_the_gradient(arm, keeps):
    metrics = digits.gradient_metrics(model_of(arm), jnp.asarray(SAMPLE))
    for name, kept in keeps.items():
        gap = float(metrics[f"{name}_gap"])
        assert gap <= EPS * 10 if kept else gap > 1e-2, name
    assert float(metrics["turn_gap"]) > 1e-3  # as posted, this would be 0 for the rotation


def test_angles_are_exact_at_both_ends():
    a = jnp.asarray([[1.0, 0.0], [1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    b = jnp.asarray([[1.0, 1e-9], [-1.0, 1e-9], [0.0, 5.0], [7.0, 0.0]])
    expected = np.array([1e-9, np.pi - 1e-9, np.pi / 2, 0.0])
    np.testing.assert_allclose(digits._angle(a, b), expected, rtol=1e-15, atol=1e-24)


# --- configs and claims ------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", [DigitsVQ, DigitsVQSweep])
def test_presets_are_of_arms_that_exist(experiment):
    assert {"smoke", "cpu", "gpu"} <= set(experiment.presets)
    for config in experiment.presets.values():
        assert isinstance(config, experiment.config_class)
        assert set(config.arms) <= set(experiment.arms)
        for arm in experiment.arms:
            width = digits.width(config, ARMS[arm])
            assert width >= 1


def test_the_cpu_preset_is_the_cards_ablation():
    assert (CPU.codes, CPU.code_dim, CPU.steps, CPU.batch_size) == (256, 8, 800, 128)
    assert (CPU.learning_rate, CPU.commitment_weight, CPU.decay) == (1e-3, 0.25, 0.99)
    assert CPU.levels == (8, 6, 5)
    assert len(CPU.seeds) >= 3
    assert set(CPU.arms) == set(PILOT) | {"lfq", "ste-kmeans"}
    gpu = DigitsVQ.presets["gpu"]
    assert (gpu.model, gpu.codes, np.prod(gpu.levels)) == ("conv", 1024, 1000)
    large = DigitsVQ.presets["gpu-65536"]
    assert (large.model, large.codes) == ("conv", 65536)
    assert {"ste-loss", "simvq"} < set(large.arms)
    assert large.test_images * 64 >= 4 * large.codes  # CIFAR-10 images are 64 vectors each


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("ste-emma",)}, "arms must be one of .*Did you mean 'ste-ema'"),
        ({"model": "cnn"}, "model must be one of"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"codes": 0}, "codes must be at least 1"),
        ({"codes": 200}, "codes must be a power of two for the arm lfq"),
        ({"levels": (8, 1)}, "levels must be integers of at least 2"),
        ({"decay": 1.5}, "decay must be"),
        ({"decay": 1.0}, "decay must be"),
        ({"commitment_weight": -0.1}, "commitment_weight must be"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"seeds": ()}, "seeds must hold"),
    ],
)
def test_wrong_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CPU, **changes)


def test_without_lfq_any_number_of_codes_will_do():
    assert dataclasses.replace(CPU, arms=("ste-ema",), codes=200).codes == 200


def pilot():
    """The pilot's numbers, and what it does not give filled in as the claims say."""
    arms = {arm: dict(row) for arm, row in PILOT.items()}
    arms |= {
        "reflection-ema": {"mse": 0.04, "usage": 0.5},
        "ste-kmeans": {"mse": 0.0158, "usage": 0.98},
        "rotation-kmeans": {"mse": 0.0150, "usage": 0.98},
        "lfq": {"mse": 0.04, "usage": 0.05},
    }
    for arm, row in arms.items():
        rotation = arm.startswith("rotation")
        row["quantization_error"] = 0.1 if rotation else 0.2
        row["first_norm_ratio"] = 0.03
        if arm.startswith(("ste", "rotation")):
            row["angle_gap"] = row["norm_gap"] = 1e-7 if rotation else 0.2
            row["turn_gap"] = 0.2
    return arms


def judge(arms, config=CPU, experiment=DigitsVQ):
    seeds = len(config.seeds)
    results = Results(
        config, {arm: {k: [v] * seeds for k, v in row.items()} for arm, row in arms.items()}
    )
    return [claim.judge(results).status for claim in experiment.claims]


# What the pilot's own numbers say: rotation is not better everywhere (ema), it is not worse with
# scaled codes (.0208 against .0214), and the angle is not as posted.
NOT_HELD_ON_THE_PILOT = {3, 5, 14}


def test_claims_on_the_pilots_numbers():
    assert judge(pilot()) == [
        "not held" if index in NOT_HELD_ON_THE_PILOT else "held"
        for index in range(len(DigitsVQ.claims) - 1)
    ] + ["not testable"]  # of the large codebook


@pytest.mark.parametrize(
    ("index", "changes", "status"),
    [
        (0, {("rotation-loss", "usage"): 0.37}, "not held"),
        (1, {("rotation-loss", "mse"): 0.0210}, "not held"),
        (2, {("rotation-ema", "mse"): 0.0157}, "not held"),
        (2, {("rotation-ema", "mse"): 0.0300}, "not held"),
        (3, {("rotation-ema", "mse"): 0.0150}, "held"),
        (4, {("rotation-kmeans", "quantization_error"): 0.2}, "not held"),
        (5, {("rotation-scaled", "mse"): 0.0220}, "held"),
        (6, {("rotation-scaled", "usage"): 0.2}, "not held"),
        (7, {("ste-kmeans", "usage"): 0.4}, "not held"),
        (8, {("unscaled-loss", "usage"): 0.1}, "not held"),
        (9, {("reflection-ema", "mse"): 0.02}, "not held"),
        (10, {("ste-kmeans", "mse"): 0.0130}, "not held"),
        (11, {("simvq", "usage"): 0.5}, "not held"),
        (12, {("lfq", "usage"): 0.5}, "not held"),
        (13, {("rotation-ema", "angle_gap"): 0.01}, "not held"),
        (13, {("rotation-ema", "norm_gap"): 0.01}, "not held"),
        (14, {(arm, "turn_gap"): 0.0 for arm in digits.ROTATIONS}, "held"),
        (15, {("fsq", "mse"): 0.016}, "not held"),
        (15, {("simvq", "usage"): 0.7}, "not held"),
    ],
)
def test_each_claim_turns_on_its_numbers(index, changes, status):
    arms = pilot()
    for (arm, metric), value in changes.items():
        arms[arm][metric] = value
    assert judge(arms)[index] == status
    assert judge(pilot())[index] != status


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "held"),
        ({("ste-loss", "usage"): 0.2}, "not held"),
        ({("simvq", "usage"): 0.8}, "not held"),
        ({("simvq", "vectors"): 131072}, "not testable"),
    ],
)
def test_the_claim_on_a_large_codebook(changes, status):
    """The paper's numbers hold; a test set with too few vectors says nothing."""
    arms = {arm: {"usage": usage} for arm, usage in (("ste-loss", 0.014), ("simvq", 1.0))}
    arms["simvq"]["vectors"] = 320_000
    for (arm, metric), value in changes.items():
        arms[arm][metric] = value
    assert judge(arms, DigitsVQ.presets["gpu-65536"])[-1] == status


def test_claims_are_not_testable_without_arms_or_training():
    assert set(judge({})) == {"not testable"}
    short = judge(pilot(), dataclasses.replace(CPU, steps=20))
    # The identities of the gradient hold from the start.
    assert [i for i, status in enumerate(short) if status != "not testable"] == [13, 14]


# --- the sweep ---------------------------------------------------------------------------------


def test_a_setting_of_the_sweep_differs_in_one_weight():
    config = DigitsVQSweepConfig(commitment_weights=(0.25, 2.0))
    assert config.settings("ste-ema") == {
        "base": {},
        "commitment_weight=2": {"commitment_weight": 2.0},
        "decay=0.8": {"decay": 0.8},
    }
    assert "decay=0.8" not in config.settings("ste-loss")
    assert list(config.settings("lfq")) == ["base", "entropy_weight=0.01", "entropy_weight=1"]


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("ste-loss", "commitment"),
        ("ste-loss", "codebook"),
        ("lfq", "entropy"),
        ("lfq", "commitment"),
    ],
)
def test_a_weight_in_the_batch_is_that_of_its_loss(arm, name):
    model = model_of(arm)
    batch = {"images": jnp.asarray(SAMPLE[:4])}

    @jax.jit
    def total(weight):
        weights = {} if weight is None else {f"{name}_weight": jnp.full(4, weight)}
        copy = nnx.clone(model)
        return digits.loss(copy, batch | weights, jax.random.key(0))[0]

    own = model.bottleneck(model.encode(batch["images"])).losses[name]
    default = getattr(TINY, f"{name}_weight")
    rest = total(None) - default * own
    np.testing.assert_allclose(total(jnp.float32(3.0)), rest + 3 * own, rtol=EPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("fsq",)}, "arms must be one of"),
        ({"decays": ()}, "decays must be growing numbers"),
        ({"commitment_weights": (1.0, 0.5)}, "commitment_weights must be growing"),
    ],
)
def test_wrong_sweep_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DigitsVQSweepConfig(), **changes)


def swept(ste=0.0205, rotation=0.0171, spread=0.05, lfq=(0.05, 0.1, 0.9)):
    config = DigitsVQSweepConfig()
    arms = {arm: {} for arm in ("ste-loss", "rotation-loss", "lfq")}
    for arm, level in (("ste-loss", ste), ("rotation-loss", rotation)):
        for position, name in enumerate(config.settings(arm)):
            arms[arm][f"mse[{name}]"] = level * (1 + spread * (position == 1))
    for name, usage in zip(("entropy_weight=0.01", "base", "entropy_weight=1"), lfq, strict=True):
        arms["lfq"][f"usage[{name}]"] = usage
    return arms


@pytest.mark.parametrize(
    ("options", "statuses"),
    [
        ({}, ["held", "held", "held"]),
        ({"spread": 0.2}, ["not held", "held", "held"]),
        ({"ste": 0.0170}, ["held", "not held", "held"]),
        ({"lfq": (0.5, 0.6, 0.6)}, ["held", "held", "not held"]),
    ],
)
def test_the_sweeps_claims(options, statuses):
    assert judge(swept(**options), DigitsVQSweepConfig(), DigitsVQSweep) == statuses


def test_the_series_of_a_weight_holds_the_base_setting_in_its_place():
    config = DigitsVQSweepConfig()
    arms = {arm: {k: [v] for k, v in row.items()} for arm, row in swept().items()}
    points = digits_sweep.series(Results(config, arms), "lfq", "entropy_weight", "usage")
    assert points == [(0.01, 0.05), (0.1, 0.1), (1.0, 0.9)]
    assert judge({}, config, DigitsVQSweep) == ["not testable"] * 3


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.x32
def test_a_run_from_end_to_end(tmp_path):
    experiment, ctx = DigitsVQ(), Context(tmp_path)
    config = dataclasses.replace(
        DigitsVQ.presets["smoke"], arms=("rotation-ema", "fsq"), seeds=(0, 5)
    )
    arms = {arm: experiment.run_arm(config, arm, ctx.for_arm(arm)) for arm in config.arms}
    for values in (values for metrics in arms.values() for values in metrics.values()):
        assert len(values) == 2
        assert np.isfinite(values).all()
    assert arms["fsq"]["mse"][0] != arms["fsq"]["mse"][1]
    records = [r for r in ctx.history("fsq") if r["split"] == "evaluation"]
    assert [record["step"] for record in records] == [10, 20]
    assert records[1]["mse"] < records[0]["mse"]
    kept = ctx.load_arrays("codes-rotation-ema")
    assert kept["counts"].sum(1).tolist() == [4 * 360] * 2
    usage = (kept["counts"] > 0).mean(1)
    np.testing.assert_allclose(arms["rotation-ema"]["usage"], usage, rtol=1e-6)
    assert kept["rebuilt"].shape == kept["images"].shape == (10, 8, 8, 1)
    files = experiment.plot(Results(config, arms), ctx)
    assert [file.stem for file in files] == ["usage", "mse", "codes", "reconstructions"]
    assert all(file.stat().st_size > 5000 for file in files)


@pytest.mark.slow
@pytest.mark.x32
def test_the_gpu_presets_network_trains_on_cifar_from_a_folder(tmp_path):
    """That of both presets: the smaller of the two differs in its arms, K and its levels."""
    arm = "simvq"
    rng = np.random.default_rng(0)
    for name, count in (("data_batch_1.bin", 12), ("test_batch.bin", 3)):
        (tmp_path / name).write_bytes(rng.integers(0, 256, 3073 * count, dtype=np.uint8).tobytes())
    config = dataclasses.replace(
        DigitsVQ.presets["gpu-65536"],
        arms=(arm,),
        seeds=(0,),
        steps=2,
        batch_size=4,
        codes=16,
        code_dim=4,
        init_images=8,
    )
    ctx = Context(tmp_path / "run", data=tmp_path)
    metrics = DigitsVQ().run_arm(config, arm, ctx.for_arm(arm))
    assert np.isfinite(metrics["mse"]).all()
    assert metrics["vectors"] == [3 * 64]
    assert ctx.load_arrays(f"codes-{arm}")["counts"].sum() == 3 * 64


@pytest.mark.slow
@pytest.mark.x32
def test_a_sweep_from_end_to_end(tmp_path):
    experiment, ctx = DigitsVQSweep(), Context(tmp_path)
    config = DigitsVQSweep.presets["smoke"]
    arms = {arm: experiment.run_arm(config, arm, ctx.for_arm(arm)) for arm in config.arms}
    results = Results(config, arms)
    base, other = (
        results.mean("ste-loss", f"mse[{name}]") for name in ("base", "commitment_weight=1")
    )
    assert base != other
    assert results.mean("ste-loss", "best_mse") == min(base, other)
    assert [file.stem for file in experiment.plot(results, ctx)] == ["commitment_weight"]
    assert "commitment_weight=1" in experiment.epilogue(results, ctx)
