"""The trainer: a functional loop over a `flax.nnx` model, the same on one device and on many.

Seeds are a leading axis: parameters, optimizer state and batches of all seeds go through one
vmapped step, and `chunk` steps through one jitted `lax.scan`, so Python is called once a chunk.
Batches are split over the mesh's data axis; parameters are replicated unless a rule says otherwise.
The random key of a step is folded from seed and step, and a batch is looked up by step, so a run
that resumes from a checkpoint goes on as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import chex  # type: ignore[import-untyped]
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkit._checks import check_int
from jaxkit_experiments.checkpoints import Checkpoints
from jaxkit_experiments.experiment import Context
from jaxkit_experiments.runfolder import RunError, plain

__all__ = ["NonFiniteLoss", "Source", "TrainResult", "data_mesh", "train"]


class Source(Protocol):
    """Batches with random access: `source[step]` is a pytree of NumPy arrays `[batch, ...]`."""

    def __getitem__(self, step: int, /) -> Any: ...


Metrics = Mapping[str, Any]
Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, Metrics]]
Optimizer = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]
ShardingRule = Callable[[str, tuple[int, ...]], PartitionSpec | None]


class NonFiniteLoss(RunError):
    """The loss, or the parameters after an update, are no longer finite.

    Attributes:
      step: index of the step, so that `source[step]` is the batch that gave it.
      seeds: the seeds it happened to.
      metrics: the metrics of the step before, per seed; empty if there was none.
      checkpoint: the state before the step, or None if the run keeps no checkpoints.
    """

    def __init__(
        self,
        step: int,
        seeds: Sequence[int],
        metrics: Mapping[str, list[float]],
        checkpoint: Path | None,
        name: str = "",
    ):
        self.step, self.seeds = step, tuple(seeds)
        self.metrics, self.checkpoint = dict(metrics), checkpoint
        shown = ", ".join(
            f"{key} {' '.join(f'{value:.4g}' for value in values)}"
            for key, values in self.metrics.items()
        )
        super().__init__(
            f"{name + ': ' if name else ''}non-finite loss or parameters at step {step} "
            f"(seed {', '.join(map(str, self.seeds))}); last finite metrics: {shown or 'none'}; "
            f"last finite state: {checkpoint or 'not kept'}."
        )


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes:
      graphdef: the model's structure.
      params: `nnx.Param` state, with a leading axis for the seeds.
      other: all other state (statistics, random counters), likewise.
      history: the records of metrics.jsonl, in order.
      metrics: the last evaluation, or without one the last chunk's training metrics, `[seeds]`.
      steps_per_second: steps of all seeds together, after the first chunk (which compiles) if there
        is more than one; NaN if nothing was left to do.
    """

    graphdef: Any
    params: Any
    other: Any
    history: list[dict[str, Any]]
    metrics: dict[str, np.ndarray]
    steps_per_second: float

    def model(self, index: int = 0) -> Any:
        """The trained model of the seed at `index`."""
        return nnx.merge(
            self.graphdef,
            *jax.tree.map(lambda leaf: leaf[index], (self.params, self.other)),
            copy=True,
        )


def data_mesh(devices: Sequence[jax.Device] | None = None, *, axis: str = "data") -> Mesh:
    """A one-dimensional mesh for data parallelism, over all devices unless some are given.

    Example:
      >>> data_mesh(jax.devices()[:1]).axis_names
      ('data',)
    """
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (axis,))


def default_mesh(batch_size: int, axis: str) -> Mesh:
    """All devices of all processes; on one CPU process one device, since its devices share cores.

    If the batch does not divide by the number of a single process's devices, the largest number
    that divides it is taken.
    """
    devices = jax.devices()
    if jax.process_count() > 1:
        return data_mesh(devices, axis=axis)
    if devices[0].platform == "cpu":
        return data_mesh(devices[:1], axis=axis)
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return data_mesh(devices[:count], axis=axis)


def train(
    *,
    init: Callable[[jax.Array], Any],
    loss: Loss,
    optimizer: Optimizer,
    batches: Sequence[Source] | Callable[[int], Source],
    steps: int,
    seeds: Sequence[int] = (0,),
    evaluate: Callable[[Any, Any], Metrics] | None = None,
    evaluation_data: Any = (),
    evaluate_every: int | None = None,
    chunk: int = 50,
    checkpoint_every: int | None = None,
    mesh: Mesh | None = None,
    data_axis: str = "data",
    param_sharding: ShardingRule | None = None,
    hyperparams: Any = None,
    ctx: Context | None = None,
    name: str = "train",
) -> TrainResult:
    """Train one model per seed, all at once.

    θ_{t+1} = θ_t + optimizer(∇ loss(θ_t, source[t], key_t)), with key_t = fold_in(key(seed), t).

    Args:
      init: makes the model from a key. It is traced (jit and vmap over seeds).
      loss: of the model, a batch and a key; returns the scalar mean over the batch, and scalar
        metrics, which are averaged over the steps of a chunk. It may change non-parameter state
        (dropout counters, batch statistics) of the model.
      optimizer: an optax transformation, or a function of the parameters (an `nnx.State` of shapes)
        that returns one, for labels.
      batches: one source per seed, or a function from seed to source. Every process gives the
        whole batch and sends its devices their part.
      steps: how many.
      seeds: non-negative integers below 2³². One may come again, to be trained on other batches or
        with other `hyperparams`.
      evaluate: scalar metrics of a model (in `eval()` mode) on `evaluation_data`, traced.
      evaluation_data: pytree of arrays, the same for all seeds.
      evaluate_every: steps between evaluations, a multiple of `chunk`; there is always one at the
        end.
      chunk: steps in one jitted scan, and in one record of the training metrics.
      checkpoint_every: steps between checkpoints, a multiple of `chunk`; by default about a tenth
        of the run. There is always one at the end. Needs `ctx`.
      mesh: devices; by default `ctx.mesh`, or else all of them (of a CPU one).
      data_axis: the mesh axis over which batches are split.
      param_sharding: from a parameter's path such as "layers/0/kernel" and its shape to a
        `PartitionSpec`, or None for replicated. The optimizer's moments follow.
      hyperparams: pytree of arrays `[seeds, ...]`, such as learning rates. `optimizer` is then a
        function of those of one seed, traced, that returns a transformation.
      ctx: run folder, metric log and progress; without it nothing is written.
      name: of this training within its arm, if there is more than one.

    Returns:
      The trained models and their metrics.

    Raises:
      ValueError: a number is out of range, lengths of `seeds` and `batches` differ, the mesh has no
        axis `data_axis`, or the batch does not divide by it.
      NonFiniteLoss: the loss or a parameter is not finite. The state before that step is saved.
      DiskFull: a checkpoint could not be written.

    Example:
      >>> def loss(model, batch, key):
      ...     error = model(batch["x"]) - batch["y"]
      ...     return jnp.mean(error**2), {}
      >>> x = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]
      >>> result = train(
      ...     init=lambda key: nnx.Linear(1, 1, rngs=nnx.Rngs(key)),
      ...     loss=loss,
      ...     optimizer=optax.sgd(0.5),
      ...     batches=[[{"x": x, "y": 3 * x}] * 100],
      ...     steps=100,
      ... )
      >>> round(float(result.model(0).kernel[0, 0]), 3)
      3.0
    """
    steps = check_int("steps", steps, least=1)
    chunk = min(check_int("chunk", chunk, least=1), steps)
    seeds = [check_int("seeds", seed, least=0) for seed in seeds]
    if not seeds or max(seeds) >= 2**32:
        raise ValueError(f"seeds must be at least one integer, each below 2**32; got {seeds}.")
    sources = [batches(seed) for seed in seeds] if callable(batches) else list(batches)
    if len(sources) != len(seeds):
        raise ValueError(
            f"batches must have one source for each of {len(seeds)} seeds; got {len(sources)}."
        )
    evaluate_every = _multiple("evaluate_every", evaluate_every, chunk, steps)
    if checkpoint_every is None:
        checkpoint_every = chunk * max(1, round(steps / chunk / 10))
    checkpoint_every = _multiple("checkpoint_every", checkpoint_every, chunk, steps)

    batch_size = _batch_size(sources[0][0])
    if mesh is None:
        mesh = ctx.mesh if ctx is not None and ctx.mesh is not None else None
    mesh = default_mesh(batch_size, data_axis) if mesh is None else mesh
    if data_axis not in mesh.axis_names:
        raise ValueError(f"mesh must have an axis {data_axis!r}; it has {mesh.axis_names}.")
    if batch_size % mesh.shape[data_axis]:
        raise ValueError(
            f"batches must divide by the {mesh.shape[data_axis]} devices of axis {data_axis!r}; "
            f"got batches of {batch_size}."
        )
    # Whatever kind of axes the caller's mesh has, the compiler is to place the intermediates.
    mesh = Mesh(mesh.devices, mesh.axis_names)

    for leaf in jax.tree.leaves(hyperparams):
        if np.shape(leaf)[:1] != (len(seeds),):
            raise ValueError(
                f"hyperparams must have a first axis of {len(seeds)} seeds; "
                f"got the shape {np.shape(leaf)}."
            )
    program = _Program(init, loss, optimizer, seeds, mesh, param_sharding, hyperparams)
    put_batch = partial(_put, NamedSharding(mesh, PartitionSpec(None, None, data_axis)))
    lengths = {min(chunk, steps), steps % chunk or chunk}
    # A second compilation of the same chunk would cost more than the training itself. chex counts
    # by the place in the source, so that every training in one process starts a count of its own.
    chex.clear_trace_counter()
    run_chunk = jax.jit(
        chex.assert_max_traces(program.run_chunk, n=len(lengths)),
        donate_argnums=0,
        out_shardings=(program.shardings, program.replicated),
    )
    if evaluate is not None:
        evaluate_all = jax.jit(
            partial(program.evaluate, evaluate), out_shardings=program.replicated
        )
        evaluation_data = jax.tree.map(partial(_put, program.replicated), evaluation_data)

    checkpoints = None
    history: list[dict[str, Any]] = []
    state = program.init_state()
    done = 0
    if ctx is not None:
        checkpoints = Checkpoints(ctx.arm_dir(ctx.arm or "run") / "checkpoints" / name)
        if (restored := checkpoints.restore(state)) is not None:
            done, state, history = restored
        if ctx.writes:
            ours = {"arm": ctx.arm, "stage": name}
            ctx.metric_log.drop([ours | record for record in history], **ours)

    def record(step: int, split: str, metrics: Mapping[str, np.ndarray]) -> None:
        entry = plain({"stage": name, "step": step, "split": split} | dict(metrics))
        history.append(entry)
        if ctx is not None:
            ctx.log(**entry)

    def load(start: int) -> Any:
        stop = min(steps, start + chunk)
        fetched = [source[step] for step in range(start, stop) for source in sources]
        return jax.tree.map(
            lambda *leaves: put_batch(_stack(leaves, (stop - start, len(seeds)))), *fetched
        )

    last: dict[str, np.ndarray] = {}
    clock, first, started = time.perf_counter(), done, done
    reporter = ctx if ctx is not None else Context(Path())
    with reporter.progress(reporter.arm or name, steps) as task:
        task.update(done)
        ready = load(done) if done < steps else None
        while done < steps:
            length = min(chunk, steps - done)
            state, out = run_chunk(state, np.int32(done), ready)
            if done + length < steps:
                ready = load(done + length)  # while the devices are at work
            good, bad_seeds, per_step = jax.tree.map(np.asarray, out)
            per_step = {"loss": per_step.pop("loss")} | per_step
            count = int(np.sum(good))
            if count < length:
                finite = {key: value[count - 1].tolist() for key, value in per_step.items()}
                finite = finite if count else {key: value.tolist() for key, value in last.items()}
                at = done + count
                saved = (
                    checkpoints.save(at, state, history, name=f"last_finite_{at:08d}")
                    if checkpoints is not None
                    else None
                )
                culprits = [seed for seed, bad in zip(seeds, bad_seeds[count], strict=True) if bad]
                raise NonFiniteLoss(at, culprits, finite, saved, reporter.arm or "")
            done += length
            last = {key: value[-1] for key, value in per_step.items()}
            record(done, "train", {key: _mean(value) for key, value in per_step.items()})
            if evaluate is not None and (done % evaluate_every == 0 or done == steps):
                values = jax.tree.map(np.asarray, evaluate_all(state, evaluation_data))
                record(done, "evaluation", values)
            if checkpoints is not None and (done % checkpoint_every == 0 or done == steps):
                checkpoints.save(done, state, history)
            now = time.perf_counter()
            shown = {"loss": float(np.mean(last["loss"]))}
            if done - first > 0 and now > clock:
                shown["steps/s"] = len(seeds) * (done - first) / (now - clock)
            task.update(done, **shown)
            if first == started and done < steps:
                clock, first = now, done
    elapsed = time.perf_counter() - clock
    speed = len(seeds) * (done - first) / elapsed if done > first else float("nan")
    split = "train" if evaluate is None else "evaluation"
    final = next(entry for entry in reversed(history) if entry["split"] == split)
    metrics = {
        key: np.asarray(values, np.float64)
        for key, values in final.items()
        if isinstance(values, list)
    }
    params, other, _ = state
    return TrainResult(program.graphdef, params, other, history, metrics, speed)


class _Program:
    """The traced functions of a training run, and where their arrays live."""

    def __init__(
        self,
        init: Callable[[jax.Array], Any],
        loss: Loss,
        optimizer: Optimizer,
        seeds: Sequence[int],
        mesh: Mesh,
        param_sharding: ShardingRule | None,
        hyperparams: Any,
    ):
        self._init, self._loss = init, loss
        self._seeds = np.asarray(seeds, np.uint32)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.graphdef: Any = None
        shapes: Any = jax.eval_shape(self._init_model, jax.random.key(0))
        params, other = shapes
        make: Any = optimizer
        if hyperparams is None:
            tx = make if isinstance(make, optax.GradientTransformation) else make(params)
            make = lambda _: tx
        self._make, self._hyperparams = make, jax.tree.map(np.asarray, hyperparams)
        with _optax_numerics():
            first = jax.tree.map(lambda leaf: leaf[0], self._hyperparams)
            state = (params, other, jax.eval_shape(self._init_optimizer, params, first))
        self.shardings = _shardings(state, mesh, param_sharding)

    def _init_model(self, key: jax.Array) -> tuple[Any, Any]:
        parts: Any = nnx.split(self._init(key), nnx.Param, ...)
        self.graphdef, params, other = parts
        return params, other

    def _init_optimizer(self, params: Any, hyperparams: Any) -> Any:
        return self._make(hyperparams).init(params)

    def _keys(self) -> tuple[jax.Array, jax.Array]:
        """Keys of initialisation and of the steps, `[seeds]` each."""
        pairs = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(self._seeds)
        return pairs[:, 0], pairs[:, 1]

    def init_state(self) -> Any:
        """Parameters, other state and optimizer state of all seeds."""

        def all_seeds() -> Any:
            params, other = jax.vmap(self._init_model)(self._keys()[0])
            with _optax_numerics():
                init_all: Any = jax.vmap(self._init_optimizer)
                return params, other, init_all(params, self._hyperparams)

        return jax.jit(all_seeds, out_shardings=self.shardings)()

    def _step(
        self,
        params: Any,
        other: Any,
        opt_state: Any,
        batch: Any,
        key: jax.Array,
        hyperparams: Any,
    ) -> Any:
        def objective(params: Any) -> Any:
            model = nnx.merge(self.graphdef, params, other, copy=True)
            value, metrics = self._loss(model, batch, key)
            parts: Any = nnx.split(model, nnx.Param, ...)
            return value, (parts[2], metrics)

        (value, (other, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        with _optax_numerics():
            updates, opt_state = self._make(hyperparams).update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        finite = jnp.isfinite(value)
        for leaf in jax.tree.leaves(params):
            finite &= jnp.all(jnp.isfinite(leaf))
        return (params, other, opt_state), finite, {"loss": value} | dict(metrics)

    def run_chunk(self, state: Any, start: jax.Array, batches: Any) -> Any:
        """As many steps as `batches` has; from the first non-finite one on, the state stays."""
        step_keys = self._keys()[1]

        def body(carry: Any, batch: Any) -> Any:
            state, step, alive = carry
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(step_keys, step)
            step_all: Any = jax.vmap(self._step)
            new, finite, metrics = step_all(*state, batch, keys, self._hyperparams)
            alive &= jnp.all(finite)
            state = jax.tree.map(partial(jnp.where, alive), new, state)
            return (state, step + 1, alive), (alive, ~finite, metrics)

        (state, _, _), out = jax.lax.scan(body, (state, start, jnp.asarray(True)), batches)
        return state, out

    def evaluate(self, function: Callable[[Any, Any], Metrics], state: Any, data: Any) -> Metrics:
        """`function` of every seed's model."""

        def one(params: Any, other: Any) -> Metrics:
            model = nnx.merge(self.graphdef, params, other, copy=True)
            model.eval()
            return dict(function(model, data))

        return jax.vmap(one)(*state[:2])


@contextmanager
def _optax_numerics() -> Iterator[None]:
    """optax promotes dtypes (`b1**count`), which a program may have forbidden for its own code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _shardings(state: Any, mesh: Mesh, rule: ShardingRule | None) -> Any:
    """Where each leaf lives; optimizer leaves that mirror a parameter live where it does."""
    params, other, opt_state = state
    replicated = NamedSharding(mesh, PartitionSpec())
    specs: dict[str, tuple[tuple[int, ...], NamedSharding]] = {}

    def of_param(path: Any, leaf: Any) -> NamedSharding:
        spec = rule(_path(path), leaf.shape) if rule is not None else None
        sharding = replicated if spec is None else NamedSharding(mesh, PartitionSpec(None, *spec))
        specs[jax.tree_util.keystr(path)] = leaf.shape, sharding
        return sharding

    def of_moment(path: Any, leaf: Any) -> NamedSharding:
        # A moment's path ends with its parameter's: .mu['layer']['kernel'].
        for start in range(len(path)):
            shape, sharding = specs.get(jax.tree_util.keystr(path[start:]), ((), replicated))
            if shape == leaf.shape:
                return sharding
        return replicated

    return (
        jax.tree_util.tree_map_with_path(of_param, params),
        jax.tree.map(lambda _: replicated, other),
        jax.tree_util.tree_map_with_path(of_moment, opt_state),
    )


def _path(path: Any) -> str:
    """ "layers/0/kernel": the keys of a path, without the variable's own field."""
    keys = [
        getattr(key, "key", getattr(key, "idx", None))
        for key in path
        if not isinstance(key, jax.tree_util.GetAttrKey)
    ]
    return "/".join(map(str, keys))


def _put(sharding: NamedSharding, value: Any) -> jax.Array:
    """`value`, the same on every process, as an array that lives where `sharding` says."""
    value = np.asarray(value)
    value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
    return jax.make_array_from_process_local_data(sharding, value, value.shape)


def _stack(leaves: Sequence[Any], lead: tuple[int, int]) -> np.ndarray:
    stacked = np.stack(leaves)
    return stacked.reshape(*lead, *stacked.shape[1:])


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the steps of a chunk, in the metric's precision but float32 at least."""
    return np.mean(values, axis=0, dtype=np.result_type(values.dtype, np.float32))


def _batch_size(batch: Any) -> int:
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"batches must be pytrees of arrays with one common first axis; got {sizes or 'none'}."
        )
    return sizes.pop()[0]


def _multiple(name: str, value: int | None, chunk: int, steps: int) -> int:
    if value is None:
        return steps
    value = check_int(name, value, least=1)
    if value < steps and value % chunk:
        raise ValueError(f"{name} must be a multiple of chunk={chunk}; got {value}.")
    return value
