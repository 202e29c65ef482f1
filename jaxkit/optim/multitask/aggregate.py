"""One update direction from n losses, by any of the methods: a gradient for any optax optimizer."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxkit._checks import check_choice, check_int
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Bool, Float, Key
from jaxkit.optim._leaves import flatten, path_name
from jaxkit.optim.multitask import balanced, constrained, mgda, nash, surgery
from jaxkit.optim.multitask import losses as by_loss
from jaxkit.optim.multitask.cagrad import cagrad
from jaxkit.optim.multitask.gradnorm import gradnorm, gradnorm_init
from jaxkit.optim.multitask.jacobian import (
    Pullback,
    combine,
    finite_entries,
    gram_matrix,
    inner_products,
    pullback,
    recomputed_gram,
    rows_of,
    weighted_pullback,
)

__all__ = [
    "METHODS",
    "Aggregation",
    "Method",
    "MultitaskState",
    "aggregate",
    "aggregate_encoder",
    "aggregate_rows",
    "init_state",
]

Granularity = Literal["model", "layer", "leaf"]


class Method(NamedTuple):
    """A way to weigh tasks.

    Attributes:
      weigh: from what it takes (and, if there is an `init`, a state) to weights `[tasks]` (and the
        new state). Arguments called `losses` and `key` are filled in, others are its options.
      takes: "gram", "losses", or "rows" for one that goes from a Jacobian right to a direction.
      init: from the number of tasks to the state.
    """

    weigh: Callable[..., Any]
    takes: Literal["gram", "losses", "rows"] = "gram"
    init: Callable[[int], Any] | None = None


METHODS: dict[str, Method] = {
    "sum": Method(mgda.total),
    "mean": Method(mgda.mean),
    "normalized_sum": Method(mgda.normalized_sum),
    "mgda": Method(mgda.mgda),
    "pcgrad": Method(surgery.pcgrad),
    "gradvac": Method(surgery.gradvac, init=surgery.gradvac_init),
    "graddrop": Method(surgery.graddrop, "rows"),
    "cagrad": Method(cagrad),
    "imtl_g": Method(balanced.imtl_g),
    "nash": Method(nash.nash),
    "fairgrad": Method(nash.fairgrad),
    "aligned": Method(balanced.aligned),
    "config": Method(balanced.config),
    "dual_proj": Method(constrained.dual_proj),
    "upgrad": Method(constrained.upgrad),
    "primary": Method(constrained.primary),
    "gradnorm": Method(gradnorm, init=gradnorm_init),
    "equal": Method(by_loss.equal, "losses"),
    "inverse_reference": Method(by_loss.inverse_reference, "losses"),
    "real_time": Method(by_loss.real_time, "losses"),
    "power_mean": Method(by_loss.power_mean_weights, "losses"),
    "random": Method(by_loss.random_weights, "losses"),
    "uncertainty": Method(by_loss.uncertainty, "losses", by_loss.log_scale_init),
    "imtl_l": Method(by_loss.imtl_l, "losses", by_loss.log_scale_init),
    "dwa": Method(by_loss.dwa, "losses", by_loss.dwa_init),
    "famo": Method(by_loss.famo, "losses", by_loss.famo_init),
}


class Aggregation(NamedTuple):
    """What `aggregate` did.

    Attributes:
      losses: `[tasks]`.
      weights: `[tasks]`, or `[groups, tasks]` with a granularity finer than the model; for a method
        that takes rows, 1 for the tasks that it used.
      gram: `[tasks, tasks]` or `[groups, tasks, tasks]`; None for methods that do without.
      finite: which tasks had a finite loss and gradient.
      state: for the next step; None if there is none.
      aux: what `losses_fn` returned beside the losses.
    """

    losses: Float[Array, " tasks"]
    weights: Float[Array, "*groups tasks"]
    gram: Float[Array, "*groups tasks tasks"] | None
    finite: Bool[Array, " tasks"]
    state: Any
    aux: Any = None


class MultitaskState(NamedTuple):
    """Steps seen, weights and Gram matrices of the last solution, and the method's own state.

    All but the number of steps have a leading axis for the groups.
    """

    steps: Array
    weights: Array
    gram: Array | None
    inner: Any


class _Plan(NamedTuple):
    """A method with its options, and how it is laid over the leaves of the parameters."""

    method: Method
    options: dict[str, Any]
    groups: list[list[int]]  # the shared leaves that have one G together
    measured: list[list[int]]  # those of each group that enter it
    heads: list[int]

    def weigh(
        self, grams: Array | None, losses: Array | None, inner: Any, key: Key | None
    ) -> tuple[Array, Any]:
        """Weights `[groups, tasks]` and the new state."""
        known = inspect.signature(self.method.weigh).parameters
        if "key" in known and key is None and known["key"].default is inspect.Parameter.empty:
            raise ValueError("key must be given for a method that draws at random; got None.")

        def one(gram: Array | None, state: Any, key: Key | None) -> tuple[Array, Any]:
            filled = {"losses": losses, "key": key}
            extra = {name: filled[name] for name in filled if name in known}
            given = extra.pop("losses") if self.method.takes == "losses" else gram
            if self.method.init is None:
                return self.method.weigh(given, **extra, **self.options), None
            return self.method.weigh(given, state, **extra, **self.options)

        if len(self.groups) == 1:
            gram, state = jax.tree.map(lambda x: x[0], (grams, inner))
            return jax.tree.map(lambda x: x[None], one(gram, state, key))
        keys = None if key is None else jax.random.split(key, len(self.groups))
        return jax.vmap(one)(grams, inner, keys)


def _plan(
    method: str | Method,
    options: dict[str, Any],
    params: Any,
    shared: Any = None,
    measured: Any = None,
    granularity: str = "model",
) -> _Plan:
    if isinstance(method, str):
        check_choice("method", method, METHODS)
        chosen = METHODS[method]
    elif isinstance(method, Method):
        chosen = method
    else:
        raise TypeError(f"method must be a name or a Method; got {method!r}.")
    parameters = list(inspect.signature(chosen.weigh).parameters)
    known = [name for name in parameters if name not in ("gram", "losses", "state", "key")]
    for name in options:
        if name not in known:
            takes = ", ".join(known) or "no options"
            raise TypeError(f"method {method!r} takes {takes}; got {name!r}.")
    check_choice("granularity", granularity, ("model", "layer", "leaf"))
    if granularity != "model" and chosen.takes != "gram":
        raise ValueError(
            f"granularity must be 'model' for a method without Gram matrix; got {granularity!r}."
        )
    paths, _, _ = flatten(params)
    is_shared, is_measured = _mask("shared", shared, params), _mask("measured", measured, params)
    groups: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        if is_shared[number]:
            name = path_name(path)
            name = {"model": "", "layer": name.rpartition("/")[0], "leaf": name}[granularity]
            groups.setdefault(name, []).append(number)
    return _Plan(
        chosen,
        options,
        groups=list(groups.values()) or [[]],
        measured=[[i for i in group if is_measured[i]] for group in groups.values()] or [[]],
        heads=[i for i in range(len(paths)) if not is_shared[i]],
    )


def _mask(name: str, mask: Any, params: Any) -> list[bool]:
    """One bool a leaf, from a tree of them that is a prefix of `params`; None is all."""
    fill = lambda of, part: jax.tree.map(lambda _: bool(of), part)
    try:
        return jax.tree.leaves(jax.tree.map(fill, True if mask is None else mask, params))
    except ValueError as error:
        raise ValueError(f"{name} must be a tree of bools, a prefix of params: {error}") from None


def init_state(
    params: Any,
    tasks: int,
    *,
    method: str | Method,
    shared: Any = None,
    granularity: Granularity = "model",
) -> MultitaskState:
    """The state with which a stateful method starts, or any that is not solved in every step.

    Args:
      params: as for `aggregate`; arrays or their shapes.
      tasks: how many losses there are.
      method: as for `aggregate`.
      shared: as for `aggregate`.
      granularity: as for `aggregate`.

    Returns:
      The state.

    Raises:
      ValueError: as `aggregate`; fewer than 2 tasks.

    Example:
      >>> init_state(jnp.ones(3), 2, method="gradvac").inner.rho.shape
      (1, 2, 2)
    """
    tasks = check_int("tasks", tasks, least=2)
    plan = _plan(method, {}, params, shared, granularity=granularity)
    count = len(plan.groups)
    inner = None if plan.method.init is None else plan.method.init(tasks)
    inner = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), inner)
    dtype = wide(*(leaf.dtype for leaf in jax.tree.leaves(params)))
    return MultitaskState(
        steps=jnp.zeros([], jnp.int32),
        weights=jnp.zeros((count, tasks), dtype),
        gram=None if plan.method.takes == "losses" else jnp.zeros((count, tasks, tasks), dtype),
        inner=inner,
    )


def aggregate(
    losses_fn: Callable[[Any], Any],
    params: Any,
    *,
    method: str | Method = "upgrad",
    state: MultitaskState | None = None,
    key: Key | None = None,
    shared: Any = None,
    measured: Any = None,
    granularity: Granularity = "model",
    rows: Literal["vmap", "map", "recompute"] = "vmap",
    update_every: int = 1,
    nonfinite: Literal["drop", "propagate"] = "drop",
    has_aux: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    **options: Any,
) -> tuple[Any, Aggregation]:
    r"""A gradient for the optimizer from n losses on shared parameters: u = Jᵀw.

    J has the tasks' gradients as rows; w comes from the Gram matrix G = J Jᵀ or from the losses.
    Losses fall by dL_i ≈ −η (Gw)_i, and no derivative is taken of w.

    Cost: one forward pass, n backward passes and n gradients in memory. With `rows="map"` the
    passes come one after the other, which holds the intermediates of one. `rows="recompute"` holds
    two gradients, for n + n(n−1)/2 + 1 passes. Methods on losses take one pass.

    Args:
      losses_fn: from parameters to losses `[tasks]`; with `has_aux`, also to something else.
      params: pytree of real floating-point arrays.
      method: a name from `METHODS`, or a `Method`.
      state: from `init_state`, then `aux.state`; needed by stateful methods and `update_every`.
      key: for methods that draw at random.
      shared: tree of bools, a prefix of `params`: which of them all tasks share. Others (heads) get
        the gradient of the sum of the losses. By default all are shared.
      measured: likewise, which shared parameters enter G, as GradNorm's last shared layer.
      granularity: one G for the model, for each layer (parameters of one parent), or for each leaf.
      rows: how J is formed.
      update_every: solve for w in every so many steps only; the others take one backward pass. A
        task left out when w is solved for waits for the next time.
      nonfinite: leave out tasks whose loss or gradient is not finite, with a weight of zero, and
        keep the method's state as it is; or "propagate" them. A task that divides by zero or
        meets NaN, rather than overflow, spoils all rows: its part of the other tasks' backward
        passes is 0·∞. Then u = 0.
      has_aux: whether `losses_fn` returns a pair.
      axis_name: inside `shard_map`, the axes over which parameters are split.
      **options: of the method.

    Returns:
      Gradients like `params`, and an `Aggregation`.

    Raises:
      ValueError: losses are not a vector of two or more; unknown method or option's value; no state
        or key where one is needed; the method's own errors.
      TypeError: an option that the method does not have.

    Example:
      >>> losses_fn = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), jnp.sum((x + 1) ** 2)])
      >>> grads, aux = aggregate(losses_fn, jnp.array([3.0, 0.0]), method="mgda")
      >>> print(grads, aux.weights)
      [ 4. -2.] [1. 0.]

    Source: the methods' own; Sener & Koltun 2018 (arXiv 1810.04650); posts 8870, 8896, 8907.
    """
    check_choice("rows", rows, ("vmap", "map", "recompute"))
    check_choice("nonfinite", nonfinite, ("drop", "propagate"))
    update_every = check_int("update_every", update_every, least=1)
    plan = _plan(method, options, params, shared, measured, granularity)
    if state is None and (plan.method.init is not None or update_every > 1):
        raise ValueError(f"state must be given for method {method!r}, from init_state; got None.")
    if plan.method.takes == "rows" and (rows == "recompute" or update_every > 1):
        raise ValueError(f"rows must be stored, and update_every 1, for method {method!r}.")
    losses, pull_tree, aux = pullback(losses_fn, params, has_aux=has_aux)

    def pull(numbers: list[int]) -> Pullback:
        """From a cotangent to some leaves of the gradient."""

        def some(cotangent: Array) -> list[Array]:
            leaves = jax.tree.leaves(pull_tree(cotangent))
            return [leaves[number] for number in numbers]

        return some

    everything = [number for group in plan.groups for number in group]

    def solve() -> tuple[Any, ...]:
        stored = grams = None
        if plan.method.takes != "losses" and rows == "recompute":
            at = [[everything.index(number) for number in group] for group in plan.measured]
            pairs = lambda x, y: inner_products(x, y, at, axis_name=axis_name)
            grams = recomputed_gram(pull(everything), losses, pairs)
        elif plan.method.takes != "losses":
            leaves = rows_of(pull(everything), losses, batched=rows == "vmap")
            stored = dict(zip(everything, leaves, strict=True))
            grams = _grams(plan, stored, len(losses), axis_name)
        return _solve(plan, stored, grams, losses, state, key, nonfinite, axis_name)

    if update_every == 1:
        parts, solved, grams, finite, inner = solve()
    else:
        assert state is not None
        parts = None  # the rows stay inside their branch
        solved, grams, finite, inner = jax.lax.cond(
            state.steps % update_every == 0,
            lambda: solve()[1:],
            lambda: (state.weights, state.gram, jnp.isfinite(losses), state.inner),
        )
    weights = _masked(solved, finite, nonfinite)

    def summed(numbers: list[int], w: Array) -> tuple[list[Array], Array]:
        if nonfinite == "propagate":
            return pull(numbers)(w.astype(losses.dtype)), finite
        return weighted_pullback(pull(numbers), w, losses, finite, axis_name=axis_name)

    heads, used = summed(plan.heads, jnp.ones_like(losses)) if plan.heads else ([], finite)
    if parts is None:
        pairs = [summed(group, w) for group, w in zip(plan.groups, weights, strict=True)]
        parts, masks = [part for part, _ in pairs], jnp.stack([mask for _, mask in pairs])
        weights = _masked(weights, masks, nonfinite)
        used = used & jnp.all(masks, axis=0)
    _, old, treedef = flatten(params)
    new = dict(zip(everything, [leaf for part in parts for leaf in part], strict=True))
    new |= dict(zip(plan.heads, heads, strict=True))
    grads = treedef.unflatten(new[number] for number in range(len(old)))
    return grads, _aggregation(losses, weights, grams, used, state, solved, inner, aux)


def aggregate_rows(
    jacobian: Any,
    *,
    method: str | Method = "upgrad",
    losses: Float[Array, " tasks"] | None = None,
    state: MultitaskState | None = None,
    key: Key | None = None,
    measured: Any = None,
    granularity: Granularity = "model",
    nonfinite: Literal["drop", "propagate"] = "drop",
    axis_name: str | tuple[str, ...] | None = None,
    **options: Any,
) -> tuple[Any, Aggregation]:
    """The direction u = Jᵀw from gradients that are there already.

    Args:
      jacobian: pytree of leaves `[tasks, ...]`.
      losses: for methods that use them.
      method, state, key, measured, granularity, nonfinite, axis_name, **options: as for
        `aggregate`.

    Returns:
      u, a pytree of leaves `[...]`, and an `Aggregation`.

    Raises:
      ValueError: no two tasks; leaves' numbers of tasks differ; as `aggregate`.
      TypeError: an option that the method does not have.

    Example:
      >>> J = {"a": jnp.array([[-4.0, 1.0], [6.0, 1.0]]), "b": jnp.ones((2, 1))}
      >>> u, aux = aggregate_rows(J, method="dual_proj")
      >>> print(u["a"])
      [0.5555556 1.1111112]

    Source: as the methods.
    """
    check_choice("nonfinite", nonfinite, ("drop", "propagate"))
    plan = _plan(method, options, jacobian, None, measured, granularity)
    if state is None and plan.method.init is not None:
        raise ValueError(f"state must be given for method {method!r}, from init_state; got None.")
    if losses is None and plan.method.takes == "losses":
        raise ValueError(f"losses must be given for method {method!r}; got None.")
    leaves, treedef = jax.tree.flatten(jacobian)
    tasks = len(gram_matrix(jax.tree.map(lambda x: x[..., :0] if x.ndim > 1 else x, jacobian)))
    stored = dict(enumerate(leaves))
    grams = None
    if plan.method.takes != "losses":
        grams = _grams(plan, stored, tasks, axis_name)
    parts, weights, grams, finite, inner = _solve(
        plan, stored, grams, losses, state, key, nonfinite, axis_name
    )
    order = [number for group in plan.groups for number in group]
    new = dict(zip(order, [leaf for part in parts for leaf in part], strict=True))
    u = jax.tree.unflatten(treedef, [new[number] for number in range(len(leaves))])
    return u, _aggregation(losses, weights, grams, finite, state, weights, inner, None)


def aggregate_encoder(
    encode: Callable[[Any], Any],
    losses_fn: Callable[[Any, Any], Any],
    encoder: Any,
    heads: Any,
    **options: Any,
) -> tuple[tuple[Any, Any], Aggregation]:
    """MGDA-UB and its like: tasks are weighed by their gradients in the shared features.

    One backward pass through the encoder, whatever the number of tasks. There is no guarantee that
    losses fall: features x = (1, −2), y = (1, 1) and the encoder's metric M = diag(3, 1) have
    x·y < 0 but xᵀMy > 0. Without meaning when tasks see disjoint samples.

    Args:
      encode: from the encoder's parameters to the features, an array or a pytree.
      losses_fn: from features and the heads' parameters to losses `[tasks]`.
      encoder: the encoder's parameters.
      heads: the heads' parameters; they get the gradient of the sum of the losses.
      **options: of `aggregate`, but `shared`.

    Returns:
      Gradients of the encoder and of the heads, and an `Aggregation`.

    Raises:
      ValueError: as `aggregate`.

    Example:
      >>> losses_fn = lambda h, head: jnp.stack([h @ head, -2 * h[0]])
      >>> (grads, _), aux = aggregate_encoder(
      ...     lambda x: 3 * x, losses_fn, jnp.ones(2), jnp.ones(2), method="mgda"
      ... )
      >>> print(jnp.array_str(aux.weights, precision=4), jnp.array_str(grads, precision=4))
      [0.6 0.4] [-0.6  1.8]

    Source: Sener & Koltun 2018 (arXiv 1810.04650); refuted in post 8896.
    """
    features, back = jax.vjp(encode, encoder)
    (change, head_grads), aux = aggregate(
        lambda both: losses_fn(*both), (features, heads), shared=(True, False), **options
    )
    return (back(change)[0], head_grads), aux


def _grams(plan: _Plan, stored: dict[int, Array], tasks: int, axis_name: Any) -> Array:
    """`[groups, tasks, tasks]`; zero for a group without parameters."""
    grams = [
        gram_matrix([stored[i] for i in group], axis_name=axis_name)
        if group
        else jnp.zeros((tasks, tasks), wide())
        for group in plan.measured
    ]
    dtype = wide(*(gram.dtype for gram in grams))
    return jnp.stack([gram.astype(dtype) for gram in grams])


def _solve(
    plan: _Plan,
    stored: dict[int, Array] | None,
    grams: Array | None,
    losses: Array | None,
    state: MultitaskState | None,
    key: Key | None,
    nonfinite: str,
    axis_name: Any,
) -> tuple[Any, ...]:
    """Directions of all groups if rows are stored, weights, G, finite tasks, the method's state."""
    finite = jnp.asarray(True)
    if grams is not None:
        finite = jnp.all(jnp.isfinite(jnp.diagonal(grams, axis1=-2, axis2=-1)), axis=0)
    if grams is not None and stored is not None:
        measured = [i for group in plan.measured for i in group]
        others = [rows for i, rows in stored.items() if i not in measured]
        if others:
            finite = finite & finite_entries(others, keep=1, axis_name=axis_name)
    if losses is not None:
        finite = finite & jnp.isfinite(losses)
    drop = nonfinite == "drop"
    inner = None if state is None else state.inner
    if plan.method.takes == "rows":
        assert stored is not None
        assert grams is not None
        weights = jnp.where(finite, 1, 0 if drop else jnp.nan).astype(grams.dtype)[None]
        used = [_keep(stored[i], finite) if drop else stored[i] for i in plan.groups[0]]
        return [plan.method.weigh(used, key=key, **plan.options)], weights, grams, finite, inner
    values = jnp.where(finite, losses, 1) if drop and losses is not None else losses
    weights, new = plan.weigh(grams, values, inner, key)
    weights = _masked(weights, finite, nonfinite)
    if drop:
        new = jax.tree.map(lambda x, y: jnp.where(jnp.all(finite), y, x), inner, new)
    parts = None
    if stored is not None:
        parts = [
            combine([stored[i] for i in group], w)
            for group, w in zip(plan.groups, weights, strict=True)
        ]
    return parts, weights, grams, finite, new


def _masked(weights: Array, finite: Array, nonfinite: str) -> Array:
    """Weights `[groups, tasks]`, zero for the tasks left out; or all NaN."""
    if nonfinite == "drop":
        return jnp.where(finite, weights, 0)
    return jnp.where(jnp.all(finite), weights, jnp.nan)


def _keep(rows: Array, finite: Array) -> Array:
    return jnp.where(finite.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)


def _aggregation(
    losses: Any,
    weights: Array,
    grams: Any,
    finite: Array,
    state: Any,
    solved: Array,
    inner: Any,
    aux: Any,
) -> Aggregation:
    new = None
    if state is not None:
        new = MultitaskState(optax.safe_increment(state.steps), solved, grams, inner)
    one = len(weights) == 1
    return Aggregation(
        losses,
        weights[0] if one else weights,
        grams[0] if one and grams is not None else grams,
        finite,
        new,
        aux,
    )
