"""The rules that every optimizer of the toolkit obeys, to be run on any other as well.

One function a rule, gathered in `CONTRACT`; `check_optimizer` runs them. No test framework needed.
"""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit._checks import check_choice

__all__ = ["CONTRACT", "check_optimizer"]

RATE = 0.01


@dataclasses.dataclass(frozen=True)
class _Case:
    """The optimizer on trial, and what it is tried on."""

    make: Callable[..., Any]
    params: Any
    project: Callable[[Any], Any]
    extra_args: Mapping[str, Any]
    stays_finite: bool

    def transform(self, learning_rate: Any = RATE) -> Any:
        """The optimizer as it is, with this case's extra arguments given to every update."""
        return self.extended(self.make(learning_rate))

    @functools.cached_property
    def optimizer(self) -> Any:
        """The optimizer at the usual rate, its update compiled; shared by the rules."""
        return _compiled(self.transform())

    def extended(self, transform: Any) -> Any:
        wide = optax.with_extra_args_support(transform)

        def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            return wide.update(grads, state, params, **{**self.extra_args, **extra})

        return optax.GradientTransformationExtraArgs(wide.init, update)

    def wrapped(self, transform: Any) -> Any:
        """A wrapper around the optimizer, likewise compiled."""
        return _compiled(self.extended(transform))


_apply = jax.jit(optax.apply_updates)


def _compiled(transform: Any) -> Any:
    return optax.GradientTransformationExtraArgs(transform.init, jax.jit(transform.update))


def _gradients(params: Any, step: int) -> Any:
    """Gradients of either sign with sizes of 0.05 to 1.05, the same on every machine."""
    leaves, treedef = jax.tree.flatten(params)
    grads = []
    for number, leaf in enumerate(leaves):
        wave = np.cos(0.9 * step + 0.6 * np.arange(leaf.size) + number)
        wave += np.copysign(0.05, wave)  # the square of what is smaller underflows in float16
        grads.append(jnp.asarray(wave.reshape(leaf.shape), leaf.dtype))
    return jax.tree.unflatten(treedef, grads)


def _run(optimizer: Any, params: Any, steps: int, *, state: Any = None) -> Any:
    """`steps` updates: the parameters, the state, and every update."""
    state = optimizer.init(params) if state is None else state
    history = []
    for step in range(steps):
        updates, state = optimizer.update(_gradients(params, step), state, params)
        params = _apply(params, updates)
        history.append(updates)
    return params, state, history


def _same_tree(one: Any, other: Any, what: str) -> None:
    a: Any = jax.tree.structure(one)
    b: Any = jax.tree.structure(other)
    assert a == b, f"{what}: the trees differ: {a} and {b}"


def _close(one: Any, other: Any, what: str, *, exact: bool = False) -> None:
    """Raise unless two trees agree: exactly, or to some sixty units of the last place."""
    _same_tree(one, other, what)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True
    ):
        where = f"{what}, at {jax.tree_util.keystr(path) or 'the root'}"
        assert (x.shape, x.dtype) == (y.shape, y.dtype), (
            f"{where}: {x.dtype}{x.shape} and {y.dtype}{y.shape}"
        )
        x, y = _numpy(x), _numpy(y)
        if exact or x.dtype.kind not in "fc":
            assert np.array_equal(x, y, equal_nan=x.dtype.kind in "fc"), (
                f"{where}: not bit for bit the same: {x} and {y}"
            )
        elif x.size:
            room = 64 * float(jnp.finfo(x.dtype).eps) * max(float(np.abs(y).max()), 1e-30)
            worst = float(np.abs(x - y).max())
            assert worst <= room, f"{where}: differ by {worst:.3g}: {x} and {y}"


def _numpy(x: Any) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    narrow = x.dtype in (jnp.bfloat16, jnp.float16)
    return np.asarray(x, np.float32) if narrow else np.asarray(x)


def _finite(tree: Any, what: str) -> None:
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        assert np.isfinite(_numpy(x)).all(), (
            f"{what} is not finite at {jax.tree_util.keystr(path) or 'the root'}: {x}"
        )


def _fit(updates: Any, params: Any) -> None:
    _same_tree(updates, params, "updates and parameters")
    for (path, u), p in zip(
        jax.tree_util.tree_flatten_with_path(updates)[0], jax.tree.leaves(params), strict=True
    ):
        assert (u.shape, u.dtype) == (p.shape, p.dtype), (
            f"update {u.dtype}{u.shape} for parameter {p.dtype}{p.shape}"
            f" at {jax.tree_util.keystr(path) or 'the root'}"
        )


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(_numpy(x), _numpy(y)) for x, y in pairs)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), tree)


def _zero(tree: Any) -> bool:
    return all(not np.any(_numpy(x)) for x in jax.tree.leaves(tree))


def _avals(tree: Any) -> Any:
    """What jit keys its cache on: shape, dtype, and whether the type is weak."""

    def aval(x: Any) -> str:
        dtype = getattr(x, "dtype", type(x).__name__)
        weak = " (weak)" if getattr(x, "weak_type", False) else ""
        return f"{dtype}{np.shape(x)}{weak}"

    return jax.tree.map(aval, tree)


def _halves(params: Any) -> tuple[Any, Any]:
    """Labels that send every second leaf to the optimizer, and those leaves as a mask."""
    leaves, treedef = jax.tree.flatten(params)
    mask = [number % 2 == 0 for number in range(len(leaves))]
    labels = ["on" if on else "off" for on in mask]
    return jax.tree.unflatten(treedef, labels), jax.tree.unflatten(treedef, mask)


def _only(tree: Any, mask: Any) -> Any:
    """The leaves under the mask, every other one left out as optax's wrappers leave them out."""
    return jax.tree.map(lambda on, x: x if on else optax.MaskedNode(), mask, tree)


# The rules ---------------------------------------------------------------------------------------


def pure(case: _Case) -> None:
    """A step repeated gives the same, compiled or not, and changes nothing it was given."""
    optimizer = case.transform()
    given = (_gradients(case.params, 0), optimizer.init(case.params), case.params)
    copies = jax.tree.map(lambda x: np.array(_numpy(x)), given)
    first = optimizer.update(*given)
    optimizer.init(jax.tree.map(lambda x: case.project(-x), case.params))  # leaves no trace
    _close(optimizer.update(*given), first, "a step and the same step again", exact=True)
    _close(jax.tree.map(_numpy, given), copies, "what a step was given, after it", exact=True)
    _close(case.optimizer.update(*given), first, "a step compiled and not")


def extra_args(case: _Case) -> None:
    """Extra arguments that an optimizer does not know are accepted and change nothing."""
    given = (_gradients(case.params, 0), case.optimizer.init(case.params), case.params)
    update = functools.partial(case.transform().update, an_unknown_argument=1.0)
    extra, _ = jax.jit(update)(*given)
    plain, _ = case.optimizer.update(*given)
    _close(extra, plain, "updates with and without an unknown extra argument")


def updates_fit(case: _Case) -> None:
    """Updates are finite and have the tree, shapes and dtypes of the parameters."""
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            continue  # 64-bit types are off
        name = jnp.dtype(dtype).name
        params = _cast(case.params, dtype)
        state = case.optimizer.init(params)
        types = _avals(state)
        for step in range(2):
            updates, state = case.optimizer.update(_gradients(params, step), state, params)
            _fit(updates, params)
            _finite(updates, f"the update in {name}")
            now = _avals(state)
            assert now == types, f"in {name} the state's types change from {types} to {now}"
            params = _apply(params, updates)


def schedule_from_step_zero(case: _Case) -> None:
    """A schedule is read at the 0-based step: step 0 uses `schedule(0)`, without delay."""
    steps = 6

    def transform(change: Any) -> Any:
        return case.transform(lambda count: jnp.where(count < change, RATE, 0.5 * RATE))

    update = jax.jit(lambda change, *given: transform(change).update(*given))

    def history(change: int) -> list[Any]:
        optimizer = optax.GradientTransformation(
            transform(change).init, lambda *given: update(change, *given)
        )
        return _run(optimizer, case.params, steps)[2]

    constant = _run(case.optimizer, case.params, steps)[2]
    assert not all(map(_zero, constant)), f"{steps} updates in a row are zero"
    _close(history(2 * steps), constant, "updates of a constant schedule and of the constant")
    for change in (1, 2, 3):
        scheduled = history(change)
        for step in range(change):
            what = f"step {step} of a schedule that changes at step {change}"
            _close(scheduled[step], constant[step], what)
        at = next(step for step in range(change, steps) if not _zero(constant[step]))
        assert not _equal(scheduled[at], constant[at]), (
            f"a schedule that changes at step {change} has no effect at step {at}"
        )


def inject_hyperparams(case: _Case) -> None:
    """`optax.inject_hyperparams` can hold and change the learning rate."""
    make = lambda learning_rate: case.make(learning_rate)
    injected = case.wrapped(optax.inject_hyperparams(make)(learning_rate=RATE))
    plain = _run(case.optimizer, case.params, 6)[2]
    params, state, history = _run(injected, case.params, 2)
    _close(history, plain[:2], "updates with and without inject_hyperparams")
    # As many steps as an accumulation may take; the rate must show in one of them.
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    changed = []
    for step in range(2, 6):
        updates, state = injected.update(_gradients(params, step), state, params)
        params = _apply(params, updates)
        changed.append(updates)
    assert not _equal(changed, plain[2:]), "a rate changed in state.hyperparams has no effect"


def multi_transform(case: _Case) -> None:
    """Under `optax.multi_transform` each leaf is updated as by the optimizer alone."""
    labels, mask = _halves(case.params)
    both = case.wrapped(
        optax.multi_transform({"on": case.make(RATE), "off": optax.set_to_zero()}, labels)
    )
    together = _run(both, case.params, 2)[2]
    state, params = case.optimizer.init(_only(case.params, mask)), case.params
    for step in range(2):
        grads = _only(_gradients(params, step), mask)
        updates, state = case.optimizer.update(grads, state, _only(params, mask))
        _close(_only(together[step], mask), updates, f"step {step} in and outside multi_transform")
        off = jax.tree.map(lambda on, u: jnp.zeros_like(u) if on else u, mask, together[step])
        assert _zero(off), "a leaf of another optimizer was updated"
        params = _apply(params, together[step])


def masked(case: _Case) -> None:
    """Under `optax.masked` the other leaves pass through untouched."""
    _, mask = _halves(case.params)
    optimizer = case.wrapped(optax.masked(case.make(RATE), mask))
    grads = _gradients(case.params, 0)
    updates, _ = optimizer.update(grads, optimizer.init(case.params), case.params)
    params = _only(case.params, mask)
    alone, _ = case.optimizer.update(_only(grads, mask), case.optimizer.init(params), params)
    _close(_only(updates, mask), alone, "updates under and without masked")
    others = jax.tree.map(lambda on: not on, mask)
    _close(_only(updates, others), _only(grads, others), "leaves that are masked out", exact=True)


def multi_steps(case: _Case) -> None:
    """`optax.MultiSteps` accumulates: nothing between, the update of the mean at the end."""
    # Not its `gradient_transformation()`, which drops extra arguments.
    steps = optax.MultiSteps(case.make(RATE), 2)
    wrapped = case.wrapped(optax.GradientTransformationExtraArgs(steps.init, steps.update))
    inner = case.optimizer
    params, state, reference = case.params, wrapped.init(case.params), inner.init(case.params)
    for step in range(2):
        grads = [_gradients(params, 2 * step + half) for half in range(2)]
        idle, state = wrapped.update(grads[0], state, params)
        assert _zero(idle), "an update between the accumulation's ends"
        updates, state = wrapped.update(grads[1], state, params)
        mean = jax.tree.map(lambda a, b: a + (b - a) / 2, *grads)
        expected, reference = inner.update(mean, reference, params)
        _close(updates, expected, "MultiSteps and the update of the mean gradient")
        params = _apply(params, updates)


def apply_if_finite(case: _Case) -> None:
    """Under `optax.apply_if_finite` a bad gradient leaves parameters and state as they were."""
    wrapped = case.wrapped(optax.apply_if_finite(case.make(RATE), 3))
    state = wrapped.init(case.params)
    grads = _gradients(case.params, 0)
    for bad in (jnp.nan, jnp.inf):
        broken = jax.tree.map(lambda g, b=bad: jnp.full_like(g, b), grads)
        updates, after = wrapped.update(broken, state, case.params)
        if bool(after.last_finite):
            continue  # finite in spite of the gradient: see `non_finite_gradients`
        assert _zero(updates), "a non-finite update was applied"
        _close(after.inner_state, state.inner_state, "state before and after a bad step")
    updates, _ = wrapped.update(grads, state, case.params)
    expected, _ = case.optimizer.update(grads, case.optimizer.init(case.params), case.params)
    _close(updates, expected, "the update after a bad step")


def chain(case: _Case) -> None:
    """`optax.chain` with clipping and weight decay does what the parts do in turn."""
    grads = _gradients(case.params, 0)
    clip, decay = optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.01)
    chained = case.wrapped(optax.chain(clip, decay, case.make(RATE), optax.scale(0.5)))
    clip, decay = _compiled(clip), _compiled(decay)
    updates, _ = chained.update(grads, chained.init(case.params), case.params)
    by_hand, _ = clip.update(grads, clip.init(case.params), case.params)
    by_hand, _ = decay.update(by_hand, decay.init(case.params), case.params)
    by_hand, _ = case.optimizer.update(by_hand, case.optimizer.init(case.params), case.params)
    _close(updates, jax.tree.map(lambda u: 0.5 * u, by_hand), "chain and its parts in turn")


def compiles_once(case: _Case) -> None:
    """Every step after the first reuses the compiled one: the state keeps its types."""
    traces: list[None] = []
    optimizer = case.transform()

    def update(grads: Any, state: Any, params: Any) -> Any:
        traces.append(None)
        updates, state = optimizer.update(grads, state, params)
        return _apply(params, updates), state

    step = jax.jit(update)
    params, state = case.params, optimizer.init(case.params)
    before = _avals(state)
    for number in range(3):
        params, state = step(_gradients(params, number), state, params)
    after = _avals(state)
    assert before == after, f"the state's types change in a step: from {before} to {after}"
    assert len(traces) == 1, f"three equal steps were traced {len(traces)} times"


def abstract_init(case: _Case) -> None:
    """`init` takes shapes in place of arrays, under `eval_shape` and outside it."""
    optimizer = case.optimizer
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.params)
    strip = lambda tree: jax.tree.map(lambda x: (tuple(x.shape), str(x.dtype)), tree)
    concrete = strip(optimizer.init(case.params))
    for what, state in (
        ("jax.eval_shape(init, ...)", jax.eval_shape(optimizer.init, structs)),
        ("init(ShapeDtypeStruct)", optimizer.init(structs)),
    ):
        assert strip(state) == concrete, f"{what} gives {strip(state)}, init gives {concrete}"


def map_params(case: _Case) -> None:
    """`optax.tree.map_params` finds the parts of the state that mirror the parameters."""
    optimizer = case.optimizer
    state = optimizer.init(case.params)
    mapped = optax.tree.map_params(
        optimizer,
        lambda x: x,
        state,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    _close(mapped, state, "the state mapped by the identity", exact=True)


def sharding(case: _Case) -> None:
    """State and updates are laid out over devices as the parameters are."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    optimizer = case.optimizer

    def layout(x: Any) -> Any:
        split = x.ndim > 0 and x.shape[0] > 0 and x.shape[0] % mesh.size == 0
        spec = jax.sharding.PartitionSpec("data") if split else jax.sharding.PartitionSpec()
        return jax.sharding.NamedSharding(mesh, spec)

    params = jax.tree.map(lambda x: jax.device_put(x, layout(x)), case.params)
    by_shape = {x.shape: x.sharding for x in jax.tree.leaves(params) if x.ndim}

    def follows(tree: Any, what: str) -> None:
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
            wanted = by_shape.get(x.shape)
            assert wanted is None or x.sharding.is_equivalent_to(wanted, x.ndim), (
                f"{what} at {jax.tree_util.keystr(path)} has {x.sharding}, its parameter {wanted}"
            )

    state = optimizer.init(params)
    follows(state, "the state after init")
    grads = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), _gradients(params, 0), params)
    updates, state = optimizer.update(grads, state, params)
    follows(updates, "the update")
    follows(state, "the state after an update")
    expected, _ = optimizer.update(
        _gradients(case.params, 0), optimizer.init(case.params), case.params
    )
    _close(jax.device_get(updates), jax.device_get(expected), "sharded and unsharded updates")


def donation(case: _Case) -> None:
    """No state shares memory with a parameter or itself, so that a step may donate both."""
    optimizer = case.optimizer

    def owners(tree: Any, name: str) -> list[tuple[int, str]]:
        return [
            (x.unsafe_buffer_pointer(), name + jax.tree_util.keystr(path))
            for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
            if isinstance(x, jax.Array)
            and x.size
            and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        ]

    def check(params: Any, state: Any) -> None:
        seen: dict[int, str] = {}
        for pointer, name in owners(params, "params") + owners(state, "state"):
            assert pointer not in seen, f"{name} is the same buffer as {seen[pointer]}"
            seen[pointer] = name

    params = jax.tree.map(lambda x: jnp.array(x, copy=True), case.params)
    state = optimizer.init(params)
    check(params, state)
    updates, state = optimizer.update(_gradients(params, 0), state, params)
    check(_apply(params, updates), state)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return _apply(params, updates), state

    state = optimizer.init(params)
    for number in range(2):
        params, state = step(params, state, _gradients(case.params, number))
    _finite(params, "a parameter after donated steps")


def nnx_optimizer(case: _Case) -> None:
    """`flax.nnx.Optimizer` trains a module with it, to the same parameters."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, params: Any):
            self.params = nnx.data(jax.tree.map(nnx.Param, params))

    model = Model(case.params)
    transform = case.extended(case.make(RATE))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, grads: Any) -> None:
        optimizer.update(model, grads)

    def gradients(number: int) -> Any:
        return nnx.state(Model(_gradients(case.params, number)), nnx.Param)

    for number in range(2):
        step(model, optimizer, gradients(number))
    expected = _run(case.optimizer, case.params, 2)[0]
    got = jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Param)))
    _close(got, jax.tree.leaves(expected), "parameters trained by nnx.Optimizer and by hand")


def checkpoint(case: _Case) -> None:
    """A state restored by orbax continues bit for bit."""
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the check 'checkpoint' needs orbax-checkpoint; install it or give"
            " skip=('checkpoint',)."
        ) from error
    optimizer = case.optimizer
    params, state, _ = _run(optimizer, case.params, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "state"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {"params": params, "state": state})
            checkpointer.wait_until_finished()
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                {"params": params, "state": state},
            )
            restored = checkpointer.restore(path, target)
    onward = _run(optimizer, params, 2, state=state)
    again = _run(optimizer, restored["params"], 2, state=restored["state"])
    _close(again[:2], onward[:2], "continued from a checkpoint and without one", exact=True)


def _edge(case: _Case, params: Any) -> Any:
    """Three steps on an unusual tree, compiled; all finite and of the right kind."""
    params = jax.tree.map(lambda x: case.project(jnp.asarray(x, jnp.float32)), params)
    after, state, history = _run(case.optimizer, params, 3)
    for updates in history:
        _fit(updates, params)
    assert _avals(after) == _avals(params), f"parameters {_avals(params)} became {_avals(after)}"
    _finite(after, "a parameter")
    _finite(state, "the state")
    return history


def axis_of_size_one(case: _Case) -> None:
    """Axes of size one, and of size zero, are axes like others."""
    tree = {"kernel": np.full((1, 1), 0.5), "row": np.full((1, 3), 0.2), "bias": np.full(1, 0.1)}
    history = _edge(case, tree)
    assert not all(_zero(updates) for updates in history), "nothing moves"
    _edge(case, {"kernel": np.zeros((0, 3)), "bias": np.full(2, 0.1)})


def scalars(case: _Case) -> None:
    """A scalar is a parameter, in a tree or by itself."""
    for params in ({"temperature": np.asarray(0.5)}, np.asarray(0.5)):
        history = _edge(case, params)
        assert not all(_zero(updates) for updates in history), "a scalar does not move"


def empty_trees(case: _Case) -> None:
    """A tree without parameters is updated to itself."""
    trees: list[Any] = [{}, (), {"module": {}}]
    for params in trees:
        assert not jax.tree.leaves(_edge(case, params)), "updates out of nothing"


def none_leaves(case: _Case) -> None:
    """`None` among the parameters stays `None`, and changes nothing for the others."""
    kernel = np.asarray([[0.5, -0.25], [0.125, 1.0]])
    with_none = _edge(case, {"kernel": kernel, "missing": None})
    without = _edge(case, {"kernel": kernel})
    for one, other in zip(with_none, without, strict=True):
        assert one["missing"] is None, f"None was updated to {one['missing']}"
        _close(one["kernel"], other["kernel"], "updates with and without a None beside")


def zero_matrices(case: _Case) -> None:
    """A matrix initialised to zero moves, and gives no NaN when its gradient is zero too."""
    zeros = {"kernel": case.project(jnp.zeros((4, 2), jnp.float32))}
    optimizer = case.optimizer
    updates, state = optimizer.update(
        jax.tree.map(jnp.zeros_like, zeros), optimizer.init(zeros), zeros
    )
    _finite(updates, "the update for a zero gradient")
    _finite(state, "the state after a zero gradient")
    assert not all(map(_zero, _edge(case, {"kernel": np.zeros((4, 2))}))), (
        "a matrix of zeros never moves"
    )


def non_finite_gradients(case: _Case) -> None:
    """Inf and NaN in a gradient raise nothing, and reach no parameter under `stays_finite`."""
    # Reductions of many numbers are compiled in another way, and may lose a NaN among them.
    many = {"kernel": case.project(jnp.full((96, 64), 0.5, jnp.float32))}
    for tree, bad in itertools.product((case.params, many), (np.nan, np.inf, -np.inf)):
        params, state = tree, case.optimizer.init(tree)
        types = _avals(state)
        for step in range(3):
            grads = _gradients(params, step)
            if step == 1:
                leaves, treedef = jax.tree.flatten(grads)
                first = np.array(leaves[0])
                first.flat[0] = bad
                grads = jax.tree.unflatten(treedef, [jnp.asarray(first), *leaves[1:]])
            updates, state = case.optimizer.update(grads, state, params)
            assert _avals(state) == types, f"{bad} changes the state's types"
            params = _apply(params, updates)
            if case.stays_finite:
                _finite(params, f"a parameter after {bad} in a gradient")
                _finite(state, f"the state after {bad} in a gradient")


def scan(case: _Case) -> None:
    """`lax.scan` over steps gives what the loop gives."""
    steps = 3
    optimizer = case.optimizer
    grads = jax.tree.map(
        lambda *g: jnp.stack(g), *[_gradients(case.params, step) for step in range(steps)]
    )

    def body(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        return (_apply(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(body, (case.params, optimizer.init(case.params)), grads)
    looped = _run(case.optimizer, case.params, steps)[0]
    _close(scanned, looped, "parameters after a scan and after a loop")


def vmap(case: _Case) -> None:
    """`vmap` trains several models at once, each as if alone."""
    optimizer = case.optimizer
    both = jax.tree.map(lambda x: jnp.stack([x, x]), case.params)
    grads = [_gradients(case.params, step) for step in range(2)]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    updates, _ = jax.jit(jax.vmap(optimizer.update))(stacked, jax.vmap(optimizer.init)(both), both)
    for number, grad in enumerate(grads):
        alone, _ = optimizer.update(grad, optimizer.init(case.params), case.params)
        mine = jax.tree.map(lambda u, n=number: u[n], updates)
        _close(mine, alone, f"model {number} in a vmap and alone")


def strict_promotion(case: _Case) -> None:
    """A step is traced with implicit dtype and rank promotion forbidden."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for dtype in (jnp.float32, jnp.bfloat16):
            params = _cast(case.params, dtype)
            optimizer = case.transform()
            state = jax.eval_shape(optimizer.init, params)
            updates, _ = jax.eval_shape(optimizer.update, params, state, params)
            jax.eval_shape(lambda *trees: jax.tree.map(jnp.add, *trees), params, updates)


_RULES: dict[str, Callable[[_Case], None]] = {
    rule.__name__: rule
    for rule in (
        pure,
        extra_args,
        updates_fit,
        schedule_from_step_zero,
        inject_hyperparams,
        multi_transform,
        masked,
        multi_steps,
        apply_if_finite,
        chain,
        compiles_once,
        abstract_init,
        map_params,
        sharding,
        donation,
        nnx_optimizer,
        checkpoint,
        axis_of_size_one,
        scalars,
        empty_trees,
        none_leaves,
        zero_matrices,
        non_finite_gradients,
        scan,
        vmap,
        strict_promotion,
    )
}

CONTRACT: tuple[str, ...] = tuple(_RULES)
"""The names of the rules, in the order in which `check_optimizer` tries them."""


def _default_params() -> Any:
    """One leaf of each kind that networks have: matrix, bias, scale, embedding."""
    wave = lambda *shape: 0.3 * np.cos(1.3 * np.arange(np.prod(shape)) + 0.4).reshape(shape)
    return {
        "dense": {"bias": wave(8), "kernel": wave(8, 4)},
        "embed": {"embedding": wave(16, 4)},
        "norm": {"scale": 1 + wave(4)},
    }


def check_optimizer(
    make_optimizer: Callable[..., Any],
    *,
    params: Any = None,
    project: Callable[[Any], Any] = lambda x: x,
    extra_args: Mapping[str, Any] | None = None,
    stays_finite: bool = False,
    checks: Iterable[str] | None = None,
    skip: Iterable[str] = (),
) -> None:
    """Hold an optimizer to the contract of an optax optimizer; raise for every rule it breaks.

    The rules are listed in `CONTRACT`. They run with JAX's usual promotion of dtypes, since optax's
    own wrappers need it; the rule `strict_promotion` alone forbids it. (`optax.adam` breaks that
    one: its bias correction multiplies a float32 step count into other dtypes. Give
    `skip=("strict_promotion",)` where that is no matter.) Where several devices are present,
    `sharding` spreads the parameters over all of them.

    Args:
      make_optimizer: Function of a learning rate (number, schedule or traced scalar) that returns
        an optax transformation, e.g. `optax.adam`. A transformation without a rate:
        `lambda rate: optax.chain(scale_by_x(), optax.scale_by_learning_rate(rate))`.
      params: Parameters to try it on, a pytree of floating-point arrays; by default a small tree
        with a matrix, a bias, a scale and an embedding.
      project: Function of one array that makes it a legal parameter, for optimizers of restricted
        parameters, e.g. `lambda x: jnp.abs(x) + 0.1`.
      extra_args: Extra arguments that every update is given.
      stays_finite: Whether the optimizer promises that no Inf or NaN in a gradient reaches a
        parameter or its state; checked if so.
      checks: Names of the rules to check; all by default.
      skip: Names of rules to leave out.

    Raises:
      AssertionError: Rules are broken; names every one of them, with what was found.
      ValueError: A name in `checks` or `skip` is no rule.

    Example:
      >>> import optax
      >>> check_optimizer(optax.lion, checks=["compiles_once", "donation"])
      >>> def broken(learning_rate):  # keeps the parameters themselves as its state
      ...     return optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, s))
      >>> check_optimizer(broken, checks=["donation"])
      Traceback (most recent call last):
      AssertionError: the optimizer breaks 1 of 1 rules of the contract
        donation (No state shares memory with a parameter ...): state... is the same buffer as ...
    """
    skip = list(skip)
    names = list(CONTRACT if checks is None else checks)
    for argument, given in (("checks", names), ("skip", skip)):
        for name in given:
            check_choice(argument, name, CONTRACT)
    if params is None:
        params = jax.tree.map(project, _cast(_default_params(), jnp.float32))
    case = _Case(make_optimizer, params, project, extra_args or {}, stays_finite)
    broken: list[str] = []
    causes: list[Exception] = []
    names = [name for name in names if name not in skip]
    for name in names:
        rule = _RULES[name]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            try:
                rule(case)
            except ModuleNotFoundError:
                raise
            except Exception as error:
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                says = (rule.__doc__ or "").rstrip(".")
                broken.append(f"  {name} ({says}): {kind}{error}")
                causes.append(error)
    if broken:
        raise AssertionError(
            f"the optimizer breaks {len(broken)} of {len(names)} rules of the contract\n"
            + "\n".join(broken)
        ) from causes[0]
