"""The contract: what obeys it passes, and each rule catches an optimizer that breaks it."""

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxkit
from jaxkit import optim, theory
from jaxkit.optim import CONTRACT, check_optimizer, multitask

PARAMS = {"a": jnp.full((8, 2), 0.5, jnp.float32), "b": jnp.full(8, -0.25, jnp.float32)}


class State(NamedTuple):
    count: Any
    m: Any


def zeros(params):
    return State(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))


def momentum(rate, *, init=zeros, at=lambda count: count, change=None, edit=lambda state: state):
    """Momentum that obeys the contract, and hooks by which the tests make it break a rule."""

    def update(grads, state, params=None, **extra_args):
        del extra_args
        size = rate(at(state.count)) if callable(rate) else rate
        m = jax.tree.map(lambda m, g: (0.9 * m + g).astype(m.dtype), state.m, grads)
        updates = jax.tree.map(lambda m: -jnp.asarray(size, m.dtype) * m, m)
        if change is not None:
            updates = jax.tree.map(change, updates, grads, state.m, params)
        return updates, edit(State(state.count + 1, m))

    return optax.GradientTransformationExtraArgs(init, update)


def test_the_optimizer_that_is_broken_below_passes_whole():
    check_optimizer(momentum, params=PARAMS)


BROKEN = []


def breaks(rule, message, **options):
    """Register a function of the rate that must fail `rule`, and with this message."""

    def register(make):
        BROKEN.append(pytest.param(rule, message, make, options, id=f"{rule}-{make.__name__}"))
        return make

    return register


# Side effects ------------------------------------------------------------------------------------


@breaks("pure", "a step and the same step again")
def counts_in_python(rate):
    steps = []
    return momentum(rate, change=lambda u, *_: u / (steps.append(0) or len(steps)))


@breaks("pure", "a step and the same step again")
def remembers_the_last_init(rate):
    kept = {}
    init = lambda params: kept.update(params=params) or zeros(params)
    inner = momentum(rate, init=init)

    def update(grads, state, params=None, **_):
        updates, state = inner.update(grads, state)
        return jax.tree.map(lambda u, p: u - 0.1 * p, updates, kept["params"]), state

    return optax.GradientTransformationExtraArgs(init, update)


@breaks("pure", "what a step was given, after it")
def writes_into_its_state(rate):
    init = lambda params: State(np.zeros(3), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None, **_):
        if isinstance(state.count, np.ndarray):
            state.count[...] += 1
        return jax.tree.map(lambda g: -rate * g, grads), state

    return optax.GradientTransformationExtraArgs(init, update)


@breaks("pure", "a step compiled and not")
def differs_when_compiled(rate):
    return momentum(rate, change=lambda u, *_: 2 * u if isinstance(u, jax.core.Tracer) else u)


# Updates -----------------------------------------------------------------------------------------


@breaks("extra_args", "unexpected keyword argument")
def takes_no_extra_arguments(rate):
    inner = momentum(rate)
    return optax.GradientTransformationExtraArgs(
        inner.init, lambda g, s, p=None: inner.update(g, s)
    )


@breaks("extra_args", "with and without an unknown extra argument")
def uses_any_extra_argument(rate):
    inner = momentum(rate)

    def update(grads, state, params=None, **extra):
        updates, state = inner.update(grads, state)
        return jax.tree.map(lambda u: u * (1 + len(extra)), updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


@breaks("updates_fit", r"update float32\(8, 2\) for parameter bfloat16\(8, 2\) at \['a'\]")
def updates_in_float32(rate):
    return momentum(rate, change=lambda u, *_: u.astype(jnp.promote_types(u.dtype, jnp.float32)))


@breaks("updates_fit", r"update float32\(1, 8, 2\) for parameter float32\(8, 2\)")
def updates_of_another_shape(rate):
    return momentum(rate, change=lambda u, *_: u[None] if u.dtype == jnp.float32 else u)


@breaks("updates_fit", "the trees differ")
def updates_of_another_tree(rate):
    return momentum(rate, change=lambda u, *_: (u,))


@breaks("updates_fit", "the update in float16 is not finite")
def eps_that_is_zero_in_float16(rate):
    return momentum(rate, change=lambda u, g, m, p: u * m / (jnp.abs(m) + 1e-8))


@breaks("updates_fit", "in bfloat16 the state's types change")
def momentum_widens(rate):
    widen = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return momentum(rate, edit=lambda s: s._replace(m=jax.tree.map(widen, s.m)))


# Rates -------------------------------------------------------------------------------------------


@breaks("schedule_from_step_zero", "step 0 of a schedule that changes at step 1")
def schedule_from_step_one(rate):
    return momentum(rate, at=lambda count: count + 1)


@breaks("schedule_from_step_zero", "a schedule that changes at step 1 has no effect at step 1")
def schedule_a_step_late(rate):
    return momentum(rate, at=lambda count: jnp.maximum(count - 1, 0))


@breaks("schedule_from_step_zero", "a schedule that changes at step 2 has no effect at step 2")
def schedule_that_sticks(rate):
    return momentum(rate, at=lambda count: jnp.minimum(count, 1))


@breaks("schedule_from_step_zero", "updates of a constant schedule and of the constant")
def constants_are_not_scaled_alike(rate):
    return momentum(rate if callable(rate) else 2 * rate)


@breaks("schedule_from_step_zero", "6 updates in a row are zero")
def never_moves(rate):
    return momentum(rate, change=lambda u, *_: 0 * u)


@breaks("inject_hyperparams", "ConcretizationTypeError|TracerBoolConversionError")
def branches_on_the_rate(rate):
    return momentum(rate if callable(rate) or rate > 0 else 0.0)


@breaks("inject_hyperparams", "a rate changed in state.hyperparams has no effect")
def ignores_the_rate(rate):
    return momentum(lambda count: 0.01)


# Wrappers ----------------------------------------------------------------------------------------


def moves_masked_nodes(rate):
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    inner = momentum(rate)

    def update(grads, state, params=None, **_):
        jax.tree.map(jnp.sum, grads, is_leaf=is_masked)
        return inner.update(grads, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


breaks("multi_transform", "MaskedNode")(moves_masked_nodes)
breaks("masked", "MaskedNode")(moves_masked_nodes)


@breaks("apply_if_finite", "TypeError")
@breaks("scan", "TypeError")
@breaks("compiles_once", "the state's types change in a step")
def count_turns_into_float(rate):
    return momentum(rate, edit=lambda s: s._replace(count=s.count * 1.0))


@breaks("multi_steps", "")
@breaks("scan", "")
@breaks("compiles_once", "")
def state_that_grows(rate):
    init = lambda params: State(jnp.zeros([], jnp.int32), zeros(params).m)
    inner = momentum(rate, init=init)

    def update(grads, state, params=None, **_):
        updates, new = inner.update(grads, State(state[0], state[1]))
        return updates, (new.count, new.m, *state[2:], new.count)

    return optax.GradientTransformationExtraArgs(lambda p: tuple(init(p)), update)


RNG = np.random.default_rng(0)


@breaks("multi_transform", "step 0 in and outside multi_transform")
@breaks("masked", "updates under and without masked")
@breaks("multi_steps", "MultiSteps and the update of the mean gradient")
@breaks("chain", "chain and its parts in turn")
@breaks("apply_if_finite", "the update after a bad step")
def random_in_python(rate):
    return momentum(rate, change=lambda u, *_: u * RNG.uniform())


@breaks("chain", "positional argument")
def takes_no_parameters(rate):
    inner = momentum(rate)
    return optax.GradientTransformation(inner.init, lambda g, s: inner.update(g, s))


# States ------------------------------------------------------------------------------------------


@breaks("compiles_once", "weak")
def weakly_typed_state(rate):
    init = lambda params: State(jnp.asarray(0), zeros(params).m)
    return momentum(rate, init=init, edit=lambda s: s._replace(count=jnp.int32(1) * s.count))


class Counted:
    """A state whose count is part of its type."""

    def __init__(self, m, count):
        self.m, self.count = m, count


jax.tree_util.register_pytree_node(
    Counted, lambda c: ((c.m,), c.count), lambda count, children: Counted(children[0], count)
)


@breaks("compiles_once", "traced 3 times|the state's types change")
def count_in_the_type(rate):
    def update(grads, state, params=None, **_):
        return jax.tree.map(lambda g: -rate * g, grads), Counted(state.m, state.count + 1)

    init = lambda params: Counted(jax.tree.map(jnp.zeros_like, params), 0)
    return optax.GradientTransformationExtraArgs(init, update)


@breaks("abstract_init", "init")
def init_reads_values(rate):
    return momentum(rate, init=lambda p: zeros(jax.tree.map(lambda x: x + 0.0, p)))


@breaks("abstract_init", "init, ShapeDtypeStruct|ShapeDtypeStruct")
def state_depends_on_concreteness(rate):
    def init(params):
        real = all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
        return zeros(params) if real else State(jnp.zeros([], jnp.int32), {})

    return momentum(rate, init=init)


@breaks("map_params", "")
def init_looks_a_parameter_up(rate):
    return momentum(rate, init=lambda p: zeros(p)._replace(count=jnp.zeros_like(p["b"][0])))


@breaks("sharding", r"the state after init at .m\['a'\]")
def state_on_one_device(rate):
    return momentum(
        rate,
        init=lambda p: State(
            jnp.zeros([], jnp.int32), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), p)
        ),
    )


@breaks("donation", r"state.m\['a'\] is the same buffer as params\['a'\]")
def state_is_the_parameters(rate):
    return momentum(rate, init=lambda p: State(jnp.zeros([], jnp.int32), p))


@breaks("donation", "is the same buffer as state")
def state_is_twice_the_same_array(rate):
    def init(params):
        m = jax.tree.map(jnp.zeros_like, params)
        return State(jnp.zeros([], jnp.int32), {"m": m, "slow": m})

    def update(grads, state, params=None, **_):
        return jax.tree.map(lambda g: -rate * g, grads), state

    return optax.GradientTransformationExtraArgs(init, update)


@breaks("nnx_optimizer", "TypeError: only dicts")
def wants_a_dict(rate):
    def init(params):
        if type(params) is not dict:
            raise TypeError("only dicts")
        return zeros(params)

    return momentum(rate, init=init)


@breaks("checkpoint", "zero size")
def placeholder_without_elements(rate):
    inner = momentum(rate)
    init = lambda params: (inner.init(params), jnp.zeros(0))

    def update(grads, state, params=None, **_):
        updates, new = inner.update(grads, state[0])
        return updates, (new, state[1])

    return optax.GradientTransformationExtraArgs(init, update)


@breaks("checkpoint", "continued from a checkpoint and without one")
def remembers_outside_its_state(rate):
    calls = []

    def count(u):
        calls.append(0)
        return np.asarray(len(calls) * np.asarray(u), u.dtype)

    def change(u, *_):
        return jax.pure_callback(count, jax.ShapeDtypeStruct(u.shape, u.dtype), u)

    return momentum(rate, change=change)


# Unusual parameters ------------------------------------------------------------------------------


@breaks("axis_of_size_one", "not finite")
def divides_by_size_less_one(rate):
    return momentum(rate, change=lambda u, *_: u / jnp.std(u, ddof=1))


@breaks("axis_of_size_one", r"update float32\(\) for parameter float32\(1,\) at \['bias'\]")
def squeezes(rate):
    return momentum(rate, change=lambda u, *_: u.squeeze())


@breaks("axis_of_size_one", "zero-size array|no identity")
def maximum_of_an_empty_axis(rate):
    return momentum(rate, change=lambda u, *_: u / jnp.max(jnp.abs(u)))


@breaks("scalars", "axis|AxisError|out of bounds")
def last_axis_of_a_scalar(rate):
    return momentum(rate, change=lambda u, *_: u / jnp.max(jnp.abs(u), axis=-1, keepdims=True))


@breaks("scalars", "a scalar does not move")
def centres(rate):
    return momentum(rate, change=lambda u, *_: u - jnp.mean(u))


@breaks("empty_trees", "Need at least one array to stack|ValueError")
def stacks_norms(rate):
    inner = momentum(rate)

    def update(grads, state, params=None, **_):
        norm = jnp.max(jnp.stack([jnp.linalg.norm(g.ravel()) for g in jax.tree.leaves(grads)]))
        updates, state = inner.update(grads, state)
        return jax.tree.map(lambda u: u / norm.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


@breaks("none_leaves", "None|NoneType")
def takes_none_for_a_leaf(rate):
    inner = momentum(rate)

    def update(grads, state, params=None, **_):
        jax.tree.map(lambda g: g.ndim, grads, is_leaf=lambda x: x is None)
        return inner.update(grads, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


@breaks("zero_matrices", "a matrix of zeros never moves")
def relative_steps(rate):
    return momentum(rate, change=lambda u, g, m, p: u * jnp.sqrt(jnp.mean(p * p)))


@breaks("zero_matrices", "the update for a zero gradient is not finite")
def divides_by_the_gradient(rate):
    return momentum(rate, change=lambda u, g, m, p: u / jnp.abs(g))


# Bad gradients -----------------------------------------------------------------------------------


@breaks("non_finite_gradients", "a parameter after nan", stays_finite=True)
def passes_nan_on(rate):
    return momentum(rate)


@breaks("non_finite_gradients", "a parameter after inf", stays_finite=True)
def stops_nan_alone(rate):
    def update(grads, state, params=None, **_):
        return jax.tree.map(lambda g: -rate * jnp.where(jnp.isnan(g), 0, g), grads), state

    return optax.GradientTransformationExtraArgs(zeros, update)


@breaks("non_finite_gradients", "the state after nan", stays_finite=True)
def hides_nan_in_its_state(rate):
    return momentum(rate, change=lambda u, *_: jnp.where(jnp.isfinite(u), u, 0))


# Transformations ---------------------------------------------------------------------------------


@breaks("vmap", "")
def callback_of_one_model(rate):
    def change(u, *_):
        shape = jax.ShapeDtypeStruct(u.shape, u.dtype)
        return jax.pure_callback(lambda x: np.asarray(x), shape, u)

    return momentum(rate, change=change)


@breaks("vmap", "model 0 in a vmap and alone")
def counts_models(rate):
    # What is the same for all models is taken from the outermost axis.
    def change(u, *_):
        shape = jax.ShapeDtypeStruct(u.shape, u.dtype)
        flip = lambda x: np.ascontiguousarray(np.asarray(x)[::-1]) if x.ndim == u.ndim + 1 else x
        return jax.pure_callback(flip, shape, u, vmap_method="expand_dims")

    return momentum(rate, change=change)


@breaks("strict_promotion", "TypePromotionError")
def promotes(rate):
    return momentum(rate, change=lambda u, *_: (u * jnp.ones([], jnp.float16)).astype(u.dtype))


@breaks("strict_promotion", "rank_promotion|Operands could not be broadcast")
def broadcasts(rate):
    return momentum(rate, change=lambda u, *_: u * jnp.ones(u.shape[-1:], u.dtype))


@pytest.mark.parametrize(("rule", "message", "make", "options"), BROKEN)
def test_a_broken_optimizer_is_caught(rule, message, make, options):
    with pytest.raises(AssertionError, match="breaks 1 of 1 rules") as caught:
        check_optimizer(make, params=PARAMS, checks=[rule], **options)
    assert caught.match(rf"(?s)\n  {rule} \(.*({message})")


def test_every_rule_is_seen_to_fail():
    assert {case.values[0] for case in BROKEN} == set(CONTRACT)


# Use ---------------------------------------------------------------------------------------------


def test_all_broken_rules_are_named_at_once():
    with pytest.raises(AssertionError, match="breaks 2 of 3 rules") as caught:
        check_optimizer(
            count_turns_into_float,
            params=PARAMS,
            checks=["scan", "chain", "donation", "compiles_once"],
            skip=["chain"],
        )
    assert caught.match(r"(?s)\n  scan \(.*\n  compiles_once \(")


@pytest.mark.parametrize("argument", ["checks", "skip"])
def test_an_unknown_rule_is_named(argument):
    with pytest.raises(ValueError, match=f"{argument} must be one of .* Did you mean 'donation'"):
        check_optimizer(optax.sgd, **{argument: ["donatoin"]})


def test_extra_arguments_reach_the_update():
    seen = []

    def make(rate):
        inner = momentum(rate)

        def update(grads, state, params=None, *, value, **_):
            seen.append(value)
            return inner.update(grads, state)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    checks = ["chain", "multi_steps", "scan"]
    check_optimizer(make, params=PARAMS, extra_args={"value": 1.5}, checks=checks)
    assert set(seen) == {1.5}
    with pytest.raises(AssertionError, match="value"):
        check_optimizer(make, params=PARAMS, checks=["scan"])


def test_parameters_are_made_legal():
    seen = []

    def make(rate):
        def init(params):
            seen.extend(jax.tree.leaves(params))
            return zeros(params)

        return momentum(rate, init=init)

    check_optimizer(make, project=lambda x: jnp.abs(x) + 0.1, checks=["scalars", "zero_matrices"])
    assert seen
    assert all(float(x.min()) > 0 for x in seen if isinstance(x, jax.Array) and x.size)


# Every optimizer of the toolkit ------------------------------------------------------------------


def whole(direction):
    """An optimizer of a direction that lacks a learning rate."""
    return lambda rate: optax.chain(direction, optax.scale_by_learning_rate(rate))


def positive(x):
    return jnp.abs(x) + 0.1


def decayed(rate):
    """SGD with the decay of `decoupled_auxiliary`'s docstring."""
    inner = optax.chain(optax.sgd(rate), multitask.decoupled_auxiliary())

    def update(grads, state, params, **_):
        auxiliary = jax.tree.map(lambda p: p[None], params)
        return inner.update(grads, state, params, auxiliary=auxiliary)

    return optax.GradientTransformationExtraArgs(inner.init, update)


STATS = theory.NoiseStats(jnp.float32(1.0), jnp.float32(2.0))
ROWS = {"embed/embedding": np.arange(16) % 3 == 0}
# Of what is held to all rules in the tests of its own module, is only a part or another name of a
# case beside it, or differs from it in its options.
FEW = {"checks": ["extra_args", "schedule_from_step_zero", "compiles_once", "strict_promotion"]}
# By public name, with what follows a colon to tell cases of one function apart: a function of the
# rate, and options of the contract.
OPTIMIZERS = {
    "accumulated_adam": (lambda rate: optim.accumulated_adam(rate, accumulation_steps=2), {}),
    "accumulated_sgd": (lambda rate: optim.accumulated_sgd(rate, accumulation_steps=2), {}),
    "decoupled_auxiliary": (decayed, {}),
    "dynamic_loss_scale": (lambda rate: optim.dynamic_loss_scale(optax.lion(rate)), FEW),
    "eg": (optim.eg, {"project": positive, **FEW}),
    "eg_sgd": (lambda rate: optim.eg_sgd(rate, 0.1), FEW),
    "eg_stepsize": (lambda rate: optim.eg_stepsize(optax.sgd(rate)), FEW),
    "egdd": (optim.egdd, FEW),
    "exponentiated_gradient": (optim.exponentiated_gradient, {"project": positive, **FEW}),
    "lazy_rows": (lambda rate: optim.lazy_rows(optax.lion(rate)), {}),
    "lazy_rows:touched_rows": (
        lambda rate: optim.lazy_rows(optax.lion(rate, weight_decay=0.1), mode="param"),
        {"extra_args": {"touched_rows": ROWS}, "checks": ["multi_steps", "masked", "scan"]},
    ),
    "projected": (lambda rate: theory.projected(optax.sgd(rate), theory.ball(30.0)), FEW),
    "scale_by_accumulated_adam": (whole(optim.scale_by_accumulated_adam()), FEW),
    "scale_by_accumulated_momentum": (whole(optim.scale_by_accumulated_momentum()), FEW),
    "scale_by_tiger": (whole(optim.scale_by_tiger()), FEW),
    "split_embeddings": (
        lambda rate: optim.split_embeddings(optax.sgd(rate), optim.tiger(rate)),
        {},
    ),
    "static_loss_scale": (lambda rate: optim.static_loss_scale(optax.lion(rate), 4.0), FEW),
    "tiger": (optim.tiger, {"stays_finite": True}),
    "tiger:lazy": (
        lambda rate: optim.tiger(
            rate, accumulation_steps=2, lazy="full", mu_dtype=jnp.bfloat16, scope="global"
        ),
        {"stays_finite": True},
    ),
    "tiger:stochastic": (
        lambda rate: optim.tiger(rate, rounding_key=jax.random.key(0)),
        {"checks": ["updates_fit", "compiles_once", "strict_promotion"]},
    ),
    # As in its reference, a matrix of zeros never moves.
    "tiger_keras": (optim.tiger_keras, {"skip": ["zero_matrices"]}),
    "track_noise_scale": (
        lambda rate: optax.chain(theory.track_noise_scale(), optax.sgd(rate)),
        {"extra_args": {"noise_stats": STATS}, "checks": [*FEW["checks"], "multi_steps"]},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_of_the_toolkit_passes(case):
    make, options = OPTIMIZERS[case]
    check_optimizer(make, **options)


def returns_an_optimizer(function):
    if not inspect.isfunction(function):
        return False
    return "GradientTransformation" in str(inspect.signature(function).return_annotation)


def test_every_optimizer_of_the_toolkit_is_held_to_the_contract():
    packages = [
        importlib.import_module(found.name)
        for found in pkgutil.iter_modules(jaxkit.__path__, "jaxkit.")
    ]
    found = set()
    while packages:
        package = packages.pop()
        for name in getattr(package, "__all__", []):
            member = getattr(package, name)
            if isinstance(member, ModuleType):
                packages.append(member)
            elif returns_an_optimizer(member):
                found.add(name)
    assert found == {case.split(":")[0] for case in OPTIMIZERS}


@pytest.mark.slow
def test_lion_passes():
    check_optimizer(optax.lion)


def test_adam_passes_but_for_strict_promotion():
    with pytest.raises(
        AssertionError, match=r"breaks 1 of 25 rules of the contract\n  strict_prom"
    ):
        check_optimizer(optax.adam, params=PARAMS, skip=["pure"])
