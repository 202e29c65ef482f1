"""Loss scaling around any optimizer: gradients that float16 can hold, and no bad step applied.

float16 has nothing below 2^-24, so that small gradients become zeros. Multiply the loss by S, and
the gradients come back S times as large; divide them by S in float32 before the optimizer sees them
(`scaled_value_and_grad` does the first, `dynamic_loss_scale` and `static_loss_scale` the second).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit._dtypes import wide
from jaxkit._typing import Array, Float
from jaxkit.optim.precision import Policy

__all__ = [
    "NON_FINITE_RULES",
    "LossScaleState",
    "all_finite",
    "dynamic_loss_scale",
    "loss_scale",
    "loss_scale_state",
    "scale_cotangent",
    "scaled_value_and_grad",
    "static_loss_scale",
]

NON_FINITE_RULES = ("skip", "void_window", "shrink", "zero_leaves")


class LossScaleState(NamedTuple):
    """The scale, what has happened to it, and the optimizer's own state.

    Attributes:
      scale: S of the next step, float32.
      good: Finite steps since S last changed, int32.
      skipped_total: Steps with a gradient or an update that was not finite, int32.
      skipped_run: How many of them in a row up to now, int32.
      stalled: Whether `skipped_run` has reached `max_skipped_run`. A loop should stop then: the
        gradients are not finite for another reason than S.
      inner_state: Of the optimizer inside.
    """

    scale: Array
    good: Array
    skipped_total: Array
    skipped_run: Array
    stalled: Array
    inner_state: Any


def all_finite(tree: Any, *, axis_name: Any = None) -> Array:
    """Whether every floating-point number of a tree is finite: one bool.

    Args:
      tree: A pytree; leaves of other types count as finite.
      axis_name: Mesh or vmap axes over which all must agree, inside `shard_map` or `vmap`. Under
        plain `jit` arrays that are spread over devices are looked at as a whole anyway.

    Returns:
      A scalar bool.

    Example:
      >>> import jax.numpy as jnp
      >>> print(all_finite({"a": jnp.ones(2), "b": jnp.arange(3)}), all_finite(jnp.log(0.0)))
      True False
    """
    finite = jnp.asarray(True)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact):
            finite &= jnp.isfinite(leaf).all()
    if axis_name is not None:
        finite = jax.lax.pmin(finite.astype(jnp.int32), axis_name) > 0
    return finite


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    initial_scale: float = 2.0**15,
    growth: float = 2.0,
    backoff: float = 0.5,
    growth_interval: int = 2000,
    min_scale: float = 1.0,
    max_scale: float = 2.0**24,
    max_skipped_run: int = 50,
    on_non_finite: str = "skip",
    shrink: float = 0.99,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer for gradients of S · loss, with an S as large as the gradients allow.

    $$ S \leftarrow \begin{cases} \min(\mathrm{growth} \cdot S, S_{max}) &
       \text{on every growth\_interval-th finite step in a row} \\
       \max(\mathrm{backoff} \cdot S, S_{min}) & \text{where a gradient is not finite}
       \end{cases} $$

    from the next step on. Gradients are divided by S in float32. Where they are not finite, the
    update is zero and the state of `inner` stays as it is, the step count of Adam or of a schedule
    included. The same goes for an update that is not finite in the type of the parameters, though
    the gradients were. Nothing that is not finite is ever applied, however often it comes.

    `inner` sees gradients and parameters in float32 at least, and keeps its state so: what float16
    cannot hold of a gradient, it cannot hold of a moment either. With float32 gradients, and a
    scale that is a power of two, finite steps are bit for bit those of `inner` alone. Put clipping
    inside: `dynamic_loss_scale(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)))`.

    With accumulation put `optax.MultiSteps(inner, k).gradient_transformation()` inside: gradients
    are divided by the S that they were multiplied by before they are summed, and a bad micro-batch
    is dropped (`skip`: the window waits for another) or empties the window (`void_window`). The
    other way round nothing bad is applied either, but `optax.MultiSteps` never gets rid of a NaN.

    Args:
      inner: An optax optimizer.
      initial_scale: S of the first step.
      growth: Factor, greater than 1.
      backoff: Factor, between 0 and 1.
      growth_interval: Finite steps in a row until S grows.
      min_scale: Least S.
      max_scale: Largest S.
      max_skipped_run: Bad steps in a row after which the state says `stalled`.
      on_non_finite: What a bad step does: `skip`; `void_window`, which also starts the window of
        an `optax.MultiSteps` inside anew; `shrink`, which multiplies the parameters by `shrink`
        (Tiger's rule); or `zero_leaves`, which takes a leaf that is not finite for zero and lets
        `inner` go on with the others. S backs off in any case.
      shrink: Factor of the rule `shrink`, in (0, 1].
      axis_name: Axes over which all devices must agree on a bad step; see `all_finite`.

    Returns:
      An optax transformation. Its state adds 17 bytes to that of `inner`. A step holds the old
      state of `inner` beside the new one, until it is known whether the update is finite.

    Raises:
      TypeError: An argument is of the wrong type.
      ValueError: An argument is out of range, or the scales are out of order.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = dynamic_loss_scale(optax.sgd(0.5), initial_scale=8.0)
      >>> params = jnp.asarray([1.0, 2.0])
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.asarray([8.0, 16.0]), state, params)
      >>> print(updates, state.scale)
      [-0.5 -1. ] 8.0
      >>> updates, state = optimizer.update(jnp.asarray([jnp.inf, 16.0]), state, params)
      >>> print(updates, state.scale, state.skipped_total)
      [0. 0.] 4.0 1

    Source: Micikevicius et al. 2018 (arXiv 1710.03740); post 9059.
    """
    for name, value in (
        ("min_scale", min_scale),
        ("initial_scale", initial_scale),
        ("max_scale", max_scale),
    ):
        check_real(name, value, above=0.0)
    if not min_scale <= initial_scale <= max_scale:
        raise ValueError(
            "initial_scale must lie between min_scale and max_scale; got "
            f"{initial_scale} with min_scale={min_scale} and max_scale={max_scale}."
        )
    check_real("growth", growth)
    check_real("backoff", backoff, above=0.0)
    if not growth > 1:
        raise ValueError(f"growth must be greater than 1; got {growth!r}.")
    if not backoff < 1:
        raise ValueError(f"backoff must be less than 1; got {backoff!r}.")
    interval = check_int("growth_interval", growth_interval, least=1)

    def adapt(scale: Array, good: Array, finite: Array) -> tuple[Array, Array]:
        good = jnp.where(finite, good + 1, 0)
        grows = good == interval
        larger = jnp.minimum(scale * growth, max_scale)
        smaller = jnp.maximum(scale * backoff, min_scale)
        scale = jnp.where(finite, jnp.where(grows, larger, scale), smaller)
        return scale, jnp.where(grows, 0, good)

    return _scaled(
        inner,
        initial_scale,
        adapt,
        unscale=True,
        leaf_factors=1.0,
        max_skipped_run=max_skipped_run,
        on_non_finite=on_non_finite,
        shrink=shrink,
        axis_name=axis_name,
    )


def static_loss_scale(
    inner: optax.GradientTransformation,
    scale: float,
    *,
    unscale: bool = True,
    leaf_factors: Any = 1.0,
    max_skipped_run: int = 50,
    on_non_finite: str = "skip",
    shrink: float = 0.99,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for gradients of S · loss, S fixed; with S = 1, one that only skips bad steps.

    `unscale=False` is the recipe of the post: multiply the loss by 1000, say, and leave the
    gradients so. Sign optimizers (Tiger, Lion) do not notice; Adam at ε does what Adam at ε/S does
    on the true gradients; SGD, clipping and decay that is added to the gradient are changed.

    Args:
      inner: An optax optimizer.
      scale: S. Powers of two scale without rounding.
      unscale: Whether `inner` sees the gradients of the loss, or those of S · loss.
      leaf_factors: By what, beside S, gradients are divided: a number for every leaf, or for every
        branch, of the parameters. For models that give single layers a scale of their own, with
        `scale_cotangent`.
      max_skipped_run: As in `dynamic_loss_scale`.
      on_non_finite: As in `dynamic_loss_scale`.
      shrink: As in `dynamic_loss_scale`.
      axis_name: As in `dynamic_loss_scale`.

    Returns:
      An optax transformation.

    Raises:
      TypeError: An argument is of the wrong type.
      ValueError: An argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = static_loss_scale(optax.sgd(0.5), 4.0)
      >>> params = jnp.asarray([1.0, 2.0])
      >>> updates, _ = optimizer.update(jnp.asarray([8.0, 4.0]), optimizer.init(params), params)
      >>> print(updates)
      [-1.  -0.5]

    Source: Micikevicius et al. 2018 (arXiv 1710.03740); post 9059.
    """
    check_real("scale", scale, above=0.0)
    for factor in jax.tree.leaves(leaf_factors):
        check_real("leaf_factors", factor, above=0.0)

    def adapt(scale: Array, good: Array, finite: Array) -> tuple[Array, Array]:
        return scale, jnp.where(finite, good + 1, 0)

    return _scaled(
        inner,
        scale,
        adapt,
        unscale=unscale,
        leaf_factors=leaf_factors,
        max_skipped_run=max_skipped_run,
        on_non_finite=on_non_finite,
        shrink=shrink,
        axis_name=axis_name,
    )


def _scaled(
    inner: optax.GradientTransformation,
    initial: float,
    adapt: Callable[[Array, Array, Array], tuple[Array, Array]],
    *,
    unscale: bool,
    leaf_factors: Any,
    max_skipped_run: int,
    on_non_finite: str,
    shrink: float,
    axis_name: Any,
) -> optax.GradientTransformationExtraArgs:
    longest = check_int("max_skipped_run", max_skipped_run, least=1)
    check_choice("on_non_finite", on_non_finite, NON_FINITE_RULES)
    check_real("shrink", shrink, above=0.0, most=1.0)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LossScaleState:
        zero = lambda: jnp.zeros((), jnp.int32)
        return LossScaleState(
            jnp.asarray(initial, jnp.float32),
            zero(),
            zero(),
            zero(),
            jnp.asarray(False),
            inner.init(jax.tree.map(_widened, params)),
        )

    def update(
        grads: Any, state: LossScaleState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LossScaleState]:
        if on_non_finite == "shrink" and params is None:
            raise ValueError(
                "params must be given to update with on_non_finite='shrink'; got None."
            )
        given = grads if params is None else params
        wide_params = None if params is None else jax.tree.map(_widened, params)

        def gradients() -> Any:
            # Divided where they are read, twice: the quotients are never stored.
            found = jax.tree.map(_widened, grads)
            if not unscale:
                return found
            return jax.tree.map(
                lambda factor, branch: jax.tree.map(
                    lambda g: g / (state.scale * factor).astype(g.dtype), branch
                ),
                leaf_factors,
                found,
            )

        finite = all_finite(gradients(), axis_name=axis_name)

        def step() -> tuple[Any, Any, Array]:
            found = gradients()
            if on_non_finite == "zero_leaves":
                found = jax.tree.map(
                    lambda g: jnp.where(all_finite(g, axis_name=axis_name), g, jnp.zeros_like(g)),
                    found,
                )
            updates, inner_state = inner.update(found, state.inner_state, wide_params, **extra_args)
            updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, given)
            return updates, inner_state, all_finite(updates, axis_name=axis_name)

        kinds = jax.eval_shape(step)

        def pass_over() -> tuple[Any, Any, Array]:
            instead = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), given)
            if on_non_finite == "shrink":
                instead = jax.tree.map(lambda p: p * jnp.asarray(shrink - 1, p.dtype), params)
            old = state.inner_state
            kept = _emptied(old) if on_non_finite == "void_window" else old
            return jax.tree.map(_varying_as, (instead, kept, jnp.asarray(False)), kinds)

        def attempt() -> tuple[Any, Any, Array]:
            # Finite gradients may have no finite update: 0/0 without an ε, a step beyond float16.
            done = step()
            return jax.tree.map(lambda new, old: jnp.where(done[-1], new, old), done, pass_over())

        # A branch of its own, so that a good step is compiled as the optimizer alone would be.
        usable = jnp.asarray(True) if on_non_finite == "zero_leaves" else finite
        updates, inner_state, fits = jax.lax.cond(usable, attempt, pass_over)
        finite &= fits
        scale, good = adapt(state.scale, state.good, finite)
        run = jnp.where(finite, 0, state.skipped_run + 1)
        total = state.skipped_total + (~finite).astype(jnp.int32)
        return updates, LossScaleState(scale, good, total, run, run >= longest, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _varying_as(x: Array, like: jax.ShapeDtypeStruct) -> Array:
    """The array, in `shard_map` with the type of what differs between devices where `like` has."""
    kind: Any = like.manual_axis_type
    missing = () if kind is None else kind.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _emptied(opt_state: Any) -> Any:
    """The state with every window of `optax.MultiSteps` at its start."""
    is_window = lambda x: isinstance(x, optax.MultiStepsState)

    def empty(x: Any) -> Any:
        if not is_window(x):
            return x
        zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
        return x._replace(mini_step=zeros(x.mini_step), acc_grads=zeros(x.acc_grads))

    return jax.tree.map(empty, opt_state, is_leaf=is_window)


def _widened(x: Any) -> Any:
    """float16 and bfloat16 as float32; shapes in place of arrays as well."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or wide(x.dtype) == x.dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=wide(x.dtype))
    return x.astype(wide(x.dtype))


def loss_scale_state(opt_state: Any) -> LossScaleState:
    """The state of the loss scaling inside that of a chain or any other wrapper.

    Args:
      opt_state: The state of an optimizer.

    Returns:
      The one `LossScaleState` in it.

    Raises:
      ValueError: There is none, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(dynamic_loss_scale(optax.adam(1e-3)), optax.scale(1.0))
      >>> print(loss_scale_state(optimizer.init(jnp.ones(2))).skipped_run)
      0
    """
    is_scaling = lambda x: isinstance(x, LossScaleState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_scaling) if is_scaling(x)]
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one LossScaleState; it holds {len(found)}.")
    return found[0]


def loss_scale(opt_state: Any) -> Float[Array, ""]:
    """S, by which the next step's loss is to be multiplied; see `loss_scale_state`.

    Args:
      opt_state: The state of an optimizer.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: `opt_state` holds no loss scale, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> print(loss_scale(dynamic_loss_scale(optax.adam(1e-3)).init(jnp.ones(2))))
      32768.0
    """
    return loss_scale_state(opt_state).scale


def scale_cotangent(x: Any, factor: float) -> Any:
    """`x` as it is; what flows back through it is multiplied by `factor`.

    A scale for one layer, where no S suits all of them: at the layer's output with a factor, at its
    input with the inverse. The gradients of its parameters come `factor` times as large; see
    `leaf_factors` of `static_loss_scale`.

    Args:
      x: A pytree of floating-point arrays.
      factor: Powers of two do not round.

    Returns:
      `x`.

    Raises:
      ValueError: `factor` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = lambda w, x: scale_cotangent(w * scale_cotangent(x, 1 / 8), 8.0)
      >>> print(*jax.grad(layer, argnums=(0, 1))(jnp.asarray(3.0), jnp.asarray(2.0)))
      16.0 3.0
    """
    check_real("factor", factor, above=0.0)
    back = lambda cotangent: jax.tree.map(lambda c: c * jnp.asarray(factor, c.dtype), cotangent)
    return jax.custom_gradient(lambda x: (x, back))(x)


def scaled_value_and_grad(
    loss_fn: Callable[..., Any], *, policy: Policy | None = None, has_aux: bool = False
) -> Callable[..., Any]:
    """The loss, and the gradients of S · loss, computed in the types of a policy.

    The result is called as `(scale, params, *args)`. Parameters and arguments are cast to the
    compute type inside of what is differentiated, so that gradients come in the type of the
    parameters.

    Args:
      loss_fn: Function of `(params, *args)` that gives a scalar, computed in float32 at least: in
        float16 S itself would overflow, and S · loss in the backward pass. With `has_aux`,
        `(loss, aux)`.
      policy: Of which the compute type is used. Default: nothing is cast.
      has_aux: Whether `loss_fn` returns something beside the loss.

    Returns:
      A function that returns `(loss, gradients, finite)`: the loss as it is (with `has_aux` the
      pair), the gradients for `dynamic_loss_scale`, and whether all of them are finite.

    Raises:
      TypeError: The loss has fewer than 32 bits.
      ValueError: The loss is no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda w, x: jnp.mean((w * x).astype(jnp.float32) ** 2)
      >>> half = Policy(compute_dtype=jnp.float16)
      >>> value, gradients, finite = scaled_value_and_grad(loss, policy=half)(
      ...     jnp.asarray(8.0), jnp.asarray(3.0), jnp.asarray([1.0, 2.0])
      ... )
      >>> print(value, gradients, gradients.dtype, finite)
      22.5 120.0 float32 True

    Source: Micikevicius et al. 2018 (arXiv 1710.03740).
    """

    def scaled(params: Any, scale: Array, args: tuple[Any, ...]) -> Any:
        if policy is not None:
            params, args = policy.cast_to_compute(params), tuple(map(policy.cast_to_compute, args))
        out = loss_fn(params, *args)
        loss = out[0] if has_aux else out
        if jnp.ndim(loss) != 0:
            raise ValueError(f"loss_fn must return a scalar loss; got shape {jnp.shape(loss)}.")
        dtype = jnp.asarray(loss).dtype
        if not jnp.issubdtype(dtype, jnp.floating) or wide(dtype) != dtype:
            raise TypeError(
                "loss_fn must return a loss in float32 or float64, since the scale multiplies it; "
                f"got {dtype}."
            )
        # A strong type: with a Python number the product would keep the loss's.
        return loss * jnp.asarray(scale, dtype), out

    def function(scale: Any, params: Any, *args: Any) -> tuple[Any, Any, Array]:
        gradient = jax.value_and_grad(scaled, has_aux=True)
        (_, out), grads = gradient(params, jnp.asarray(scale), args)
        return out, grads, all_finite(grads)

    return function
