"""The trainer against a plain loop, on one device and on eight, and its faults."""

import errno
import json
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxkit_experiments import training
from jaxkit_experiments.checkpoints import Checkpoints
from jaxkit_experiments.experiment import Context
from jaxkit_experiments.runfolder import DiskFull, RunError, RunWarning
from jaxkit_experiments.training import NonFiniteLoss, data_mesh, train

from tests.tolerance import tol


class Net(nnx.Module):
    """Two layers with dropout between: parameters and a random stream."""

    def __init__(self, rngs, *, width=8, dropout=0.25):
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.last = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.first(x))))[..., 0]


class Batches:
    """Batch of a step, drawn from seed and step alone."""

    def __init__(self, seed, size=16, poison=None):
        self.seed, self.size, self.poison = seed, size, poison

    def __getitem__(self, step):
        x = np.random.default_rng((self.seed, step)).standard_normal((self.size, 4))
        y = np.sin(x.sum(1))
        if step == self.poison:
            y = y * np.inf
        return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def init(key):
    return Net(nnx.Rngs(key))


def loss(model, batch, key):
    noise = 0.01 * jax.random.normal(key, batch["y"].shape, jnp.float32)
    error = model(batch["x"]) - batch["y"] - noise
    return jnp.mean(error**2), {"bias": jnp.mean(error)}


def evaluate(model, data):
    return {"mse": jnp.mean((model(data["x"]) - data["y"]) ** 2)}


SETTINGS = {
    "init": init,
    "loss": loss,
    "optimizer": optax.adam(1e-2),
    "steps": 12,
    "seeds": (3, 7),
    "chunk": 4,
    "evaluate": evaluate,
    "evaluation_data": Batches(99, 32)[0],
}


def run(**changes):
    settings = SETTINGS | changes
    return train(**{"batches": [Batches(seed) for seed in settings["seeds"]]} | settings)


def assert_same(one, other, tolerance=0.0):
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(one.metrics["mse"], other.metrics["mse"], rtol=tolerance)


@pytest.fixture(scope="module")
def straight():
    return run()


def test_equals_a_plain_loop_over_one_seed(straight):
    seed = 7
    first, steps_key = jax.random.split(jax.random.key(seed))
    graphdef, params, other = nnx.split(init(first), nnx.Param, ...)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def gradient(params, other, batch, key):
        def objective(params):
            model = nnx.merge(graphdef, params, other, copy=True)
            value, _ = loss(model, batch, key)
            return value, nnx.split(model, nnx.Param, ...)[2]

        return jax.value_and_grad(objective, has_aux=True)(params)

    losses = []
    for step in range(12):
        key = jax.random.fold_in(steps_key, step)
        (value, other), grads = gradient(params, other, Batches(seed)[step], key)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    trained = nnx.split(straight.model(1), nnx.Param, ...)[1]
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol("float32", 100), atol=tol("float32", 100))
    recorded = [entry["loss"][1] for entry in straight.history if entry["split"] == "train"]
    means = np.reshape(losses, (3, 4)).mean(1)
    np.testing.assert_allclose(recorded, means, rtol=tol("float32", 100))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(straight.params))


def test_dropout_draws_anew_each_step_and_is_off_in_evaluation(straight):
    counts = jax.tree.leaves(nnx.to_pure_dict(straight.other)["dropout"]["rngs"]["count"])
    np.testing.assert_array_equal(counts[0], [12, 12])
    model = straight.model(0)
    model.eval()
    data = SETTINGS["evaluation_data"]
    np.testing.assert_allclose(
        straight.metrics["mse"][0], evaluate(model, data)["mse"], rtol=tol("float32", 32)
    )


def test_chunks_do_not_change_the_result(straight):
    # 12 = 5 + 5 + 2: the last chunk is shorter.
    assert_same(straight, run(chunk=5), tol("float32", 100))


def test_seeds_do_not_disturb_each_other(straight):
    alone = run(seeds=(7,))
    np.testing.assert_allclose(
        alone.metrics["mse"][0], straight.metrics["mse"][1], rtol=tol("float32", 100)
    )


def test_eight_devices_equal_one(straight):
    spread = run(mesh=data_mesh())
    assert len(jax.devices()) == 8
    assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 8
    assert_same(straight, spread, tol("float32", 400))


def test_parameters_can_be_sharded_and_moments_follow(straight, monkeypatch):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "model"))
    seen = {}

    def rule(path, shape):
        seen[path] = shape
        return PartitionSpec(None, "model") if path == "first/kernel" else None

    programs = []

    class Spy(training._Program):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            programs.append(self)

    monkeypatch.setattr(training, "_Program", Spy)
    sharded = run(mesh=mesh, param_sharding=rule)
    assert seen["first/kernel"] == (4, 8)
    assert set(seen) == {"first/kernel", "first/bias", "last/kernel", "last/bias"}
    kernel = nnx.to_pure_dict(sharded.params)["first"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 4, 4)
    specs = [
        sharding.spec for sharding in jax.tree.leaves(programs[0].shardings[2]) if sharding.spec
    ]
    assert specs == [PartitionSpec(None, None, "model")] * 2  # Adam's two moments
    assert_same(straight, sharded, tol("float32", 400))


def test_an_optimizer_may_be_made_from_the_parameters(straight):
    labelled = run(
        optimizer=lambda params: optax.multi_transform(
            {"all": optax.adam(1e-2)}, jax.tree.map(lambda _: "all", params)
        )
    )
    assert_same(straight, labelled, tol("float32", 100))


def test_every_seed_may_have_a_rate_of_its_own(straight):
    """A seed comes twice, with two rates: each is what it would be without the others."""
    rates = np.array([1e-2, 3e-2, 1e-2], np.float32)
    together = run(optimizer=optax.adam, hyperparams=rates, seeds=(3, 3, 7))
    fast = run(optimizer=optax.adam(3e-2), seeds=(3,))
    for got, usual, other in zip(
        *(jax.tree.leaves(result.params) for result in (together, straight, fast)), strict=True
    ):
        room = {"rtol": tol("float32", 100), "atol": tol("float32", 100)}
        np.testing.assert_allclose(got[jnp.array([0, 2])], usual, **room)
        np.testing.assert_allclose(got[1], other[0], **room)


@pytest.mark.x32
def test_float64_batches_become_the_default_precision():
    class Plain:
        def __getitem__(self, step):
            return {key: np.asarray(value, np.float64) for key, value in Batches(0)[step].items()}

    assert_same(run(seeds=(0,), batches=[Plain()]), run(seeds=(0,)), tol("float32", 100))


def context(path):
    return Context(path).for_arm("net")


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def checkpoint_names(path):
    return sorted(item.name for item in (path / "arms/net/checkpoints/train").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    return path, run(ctx=context(path), checkpoint_every=4, evaluate_every=4)


def test_writes_history_and_keeps_the_last_two_checkpoints(finished):
    path, result = finished
    assert [(entry["step"], entry["split"]) for entry in records(path)] == [
        (step, split) for step in (4, 8, 12) for split in ("train", "evaluation")
    ]
    assert records(path) == [{"arm": "net"} | entry for entry in result.history]
    assert checkpoint_names(path) == ["step_00000008", "step_00000012"]


def resumed_from(finished, tmp_path, *, drop=()):
    path, result = finished
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    for name in drop:
        shutil.rmtree(copy / "arms/net/checkpoints/train" / name)
    return copy, result


def test_resumes_to_the_bit(finished, tmp_path):
    path, result = resumed_from(finished, tmp_path, drop=["step_00000012"])
    again = run(ctx=context(path), checkpoint_every=4, evaluate_every=4)
    assert_same(result, again)
    assert again.history == result.history
    assert records(path) == records(finished[0])


def test_a_finished_training_is_read_back(finished, tmp_path):
    path, result = resumed_from(finished, tmp_path)

    class Never:
        def __getitem__(self, step):
            if step:
                raise AssertionError("a finished training asked for a batch")
            return Batches(0)[0]

    again = run(ctx=context(path), checkpoint_every=4, batches=lambda seed: Never())
    assert_same(result, again)
    assert np.isnan(again.steps_per_second)


def truncate(folder):
    file = max((f for f in (folder / "d").iterdir()), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    return file.name


def flip_a_bit(folder):
    file = max((f for f in (folder / "d").iterdir()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "is corrupt"


def remove_a_file(folder):
    (folder / "_METADATA").unlink()
    return "_METADATA is missing"


def cut_the_manifest(folder):
    os.truncate(folder / "manifest.json", 20)
    return "manifest.json is corrupt"


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()
    return "not finished"


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, remove_a_file, cut_the_manifest, lose_the_manifest]
)
def test_a_bad_checkpoint_is_named_and_the_last_good_one_used(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    tree = {"w": np.arange(1000.0), "n": np.int32(3)}
    template = jax.tree.map(jnp.asarray, tree)
    for step in (1, 2, 3):
        checkpoints.save(step, template | {"w": template["w"] + step}, [{"step": step}])
    assert sorted(item.name for item in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    what = damage(tmp_path / "step_00000003")
    with pytest.warns(RunWarning, match=f"step_00000003 is not used: .*{what}"):
        step, restored, history = checkpoints.restore(template)
    assert step == 2
    assert history == [{"step": 2}]
    np.testing.assert_array_equal(restored["w"], tree["w"] + 2)
    checkpoints.save(3, template, [])  # over the bad one
    assert checkpoints.restore(template).step == 3


@pytest.mark.parametrize("drop", [(), ("step_00000008",)])
def test_training_goes_on_from_the_last_good_checkpoint_or_over(finished, tmp_path, drop):
    path, result = resumed_from(finished, tmp_path, drop=drop)
    truncate(path / "arms/net/checkpoints/train/step_00000012")
    with pytest.warns(RunWarning, match="step_00000012 is not used"):
        again = run(ctx=context(path), checkpoint_every=4, evaluate_every=4)
    assert_same(result, again)
    assert records(path) == records(finished[0])


def test_another_models_checkpoint_is_refused(finished, tmp_path):
    path, _ = resumed_from(finished, tmp_path)
    with pytest.raises(RunError, match=r"step_00000012 holds the state of another model.*float32"):
        run(ctx=context(path), init=lambda key: Net(nnx.Rngs(key), width=6))


def test_typed_random_keys_come_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    tree = {"key": jax.random.split(jax.random.key(5), 3), "n": jnp.zeros((), jnp.int32)}
    checkpoints.save(1, tree, [])
    back = checkpoints.restore(tree).tree
    assert back["key"].dtype == tree["key"].dtype
    np.testing.assert_array_equal(
        jax.random.key_data(back["key"]), jax.random.key_data(tree["key"])
    )


def full_disk_writer(monkeypatch):
    """Writing a checkpoint fails as it does on a full disk."""

    def save(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", save)


def test_a_full_disk_is_reported_and_older_checkpoints_stay(finished, tmp_path, monkeypatch):
    path, result = resumed_from(finished, tmp_path, drop=["step_00000012"])
    with monkeypatch.context() as patch:
        full_disk_writer(patch)
        with pytest.raises(DiskFull, match=r"checkpoint .*step_00000012: no space left"):
            run(ctx=context(path), checkpoint_every=4, evaluate_every=4)
    assert checkpoint_names(path) == ["step_00000008"]
    assert_same(result, run(ctx=context(path), checkpoint_every=4, evaluate_every=4))


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        with pytest.raises(DiskFull, match="no space left"):
            Checkpoints(disk / "c").save(1, {"w": np.random.default_rng(0).random(1 << 16)}, [])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def stored_params(checkpoint):
    """Parameters in a checkpoint, by path, read without the trainer."""
    leaves = json.loads((checkpoint / "manifest.json").read_text())["leaves"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(
            json.loads(text[text.index("[") :]), text[: text.index("[")], sharding=here
        )
        for name, text in leaves.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(checkpoint, shapes)


def test_a_non_finite_loss_stops_with_everything_that_helps(tmp_path):
    def poisoned(seed):
        return Batches(seed, poison=6 if seed == 7 else None)

    with pytest.raises(NonFiniteLoss) as caught:
        run(batches=poisoned, ctx=context(tmp_path))
    error = caught.value
    assert (error.step, error.seeds) == (6, (7,))
    assert "at step 6 (seed 7)" in str(error)
    assert error.checkpoint.name == "last_finite_00000006"
    # The saved state and the named metrics are those of a run that ended just before.
    short = run(steps=6, chunk=1)
    last = [entry for entry in short.history if entry["split"] == "train"][-1]
    assert set(error.metrics) == {"loss", "bias"}
    np.testing.assert_allclose(error.metrics["loss"], last["loss"], rtol=tol("float32", 100))
    stored = stored_params(error.checkpoint)
    for path, value in jax.tree_util.tree_leaves_with_path(short.params):
        name = "[0]" + jax.tree_util.keystr(path)
        near = tol("float32", 100)
        np.testing.assert_allclose(stored[name], value, rtol=near, atol=near)
    assert all(np.isfinite(entry["loss"]).all() for entry in records(tmp_path))


def test_parameters_that_overflow_are_non_finite_too():
    with pytest.raises(NonFiniteLoss, match="parameters at step 0") as caught:
        run(optimizer=optax.sgd(jnp.inf))
    assert caught.value.metrics == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"seeds": ()}, "seeds must be at least one integer"),
        ({"seeds": (2**32,)}, r"below 2\*\*32"),
        ({"batches": [Batches(0)]}, "one source for each of 2 seeds; got 1"),
        (
            {"optimizer": optax.adam, "hyperparams": np.ones(3)},
            r"hyperparams must have a first axis of 2 seeds; got the shape \(3,\)",
        ),
        ({"evaluate_every": 6}, "evaluate_every must be a multiple of chunk=4; got 6"),
        ({"checkpoint_every": 5}, "checkpoint_every must be a multiple of chunk=4; got 5"),
        ({"batches": lambda seed: Batches(seed, size=12), "mesh": "all"}, "divide by the 8"),
        ({"mesh": "rows"}, r"mesh must have an axis 'data'; it has \('rows',\)"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    meshes = {"all": data_mesh, "rows": lambda: data_mesh(axis="rows")}
    if "mesh" in changes:
        changes = changes | {"mesh": meshes[changes["mesh"]]()}
    with pytest.raises(ValueError, match=message):
        run(**changes)
