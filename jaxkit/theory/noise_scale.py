"""The gradient noise scale: how many examples a batch needs before its gradient is mostly signal.

One example's gradient has mean g and covariance Σ, so that a mean over B independent examples has
E|G_B|² = |g|² + tr Σ / B. Two sizes of batch therefore tell both unknowns, and a training step has
two sizes at hand: its microbatches (or devices) and their mean. Both estimates are unbiased; their
ratio tr Σ / |g|² = B_simple is not, which is why averages are kept of each and divided last.

What the estimates assume: gradients of the *mean* loss over independent examples, raw. Clipping,
momentum, weight decay and sums in place of means invalidate them, loss scales must be taken out
first, and batch normalisation, packed sequences or sampling without replacement correlate the
examples. The unit of B_simple is the unit in which b is counted (sequences or tokens).
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxkit._checks import check_floating, check_real, is_traced
from jaxkit._dtypes import wide
from jaxkit._typing import Array, ArrayLike, Float, Int

__all__ = [
    "GradientMoments",
    "NoiseScaleState",
    "NoiseStats",
    "add_microbatch",
    "init_moments",
    "moments_stats",
    "next_batch_size",
    "noise_scale_stats",
    "simple_noise_scale",
    "squared_norm",
    "track_noise_scale",
    "two_batch_stats",
]

Labels: TypeAlias = Any
"""Names of parameter groups: a pytree of strings (or a prefix of one), or a function to that."""

Scalars: TypeAlias = Any
"""A scalar, or with labels a dictionary of scalars by group."""


class NoiseStats(NamedTuple):
    """Unbiased estimates from one step; scalars, or dictionaries of scalars by group."""

    g2: Scalars
    """Of |g|²; may be negative, being a difference."""
    S: Scalars
    """Of tr Σ."""


def two_batch_stats(
    sq_norm_small: Scalars, sq_norm_big: Scalars, b_small: Any, b_big: Any
) -> NoiseStats:
    r"""Estimates from squared gradient norms at two batch sizes b < B.

        g2 = (B |G_B|² - b |G_b|²) / (B - b),    S = (|G_b|² - |G_B|²) / (1/b - 1/B)

    Args:
      sq_norm_small: |G_b|², or its mean over several batches of b examples.
      sq_norm_big: |G_B|².
      b_small: b.
      b_big: B.

    Returns:
      Estimates in float32 (float64 for float64 norms).

    Raises:
      ValueError: b is not positive or B is not larger.

    Example:
      >>> stats = two_batch_stats(5.0, 2.0, 32, 256)
      >>> print(f"{stats.g2:.4f} {stats.S:.4f} {simple_noise_scale(stats):.4f}")
      1.5714 109.7143 69.8182

    Source: McCandlish et al. 2018 (arXiv 1812.06162, app. A.1).
    """
    check_real("b_small", b_small, above=0)
    check_real("b_big", b_big, above=0)
    if not (is_traced(b_small) or is_traced(b_big)) and float(b_big) <= float(b_small):
        raise ValueError(f"b_big must be greater than b_small = {b_small}; got {b_big}.")

    def estimate(small: ArrayLike, big: ArrayLike) -> tuple[Array, Array]:
        dtype = _wide(small, big)
        small, big, b, B = (jnp.asarray(x).astype(dtype) for x in (small, big, b_small, b_big))
        # (1/b - 1/B) as one fraction: no cancellation for batches of nearly the same size.
        return (B * big - b * small) / (B - b), (small - big) * (b / (B - b) * B)

    small: Any = jax.tree.structure(sq_norm_small)
    big: Any = jax.tree.structure(sq_norm_big)
    if small != big:
        raise ValueError(f"sq_norm_small must have the groups of sq_norm_big, {big}; got {small}.")
    pairs = jax.tree.map(estimate, sq_norm_small, sq_norm_big)
    g2, S = jax.tree.transpose(jax.tree.structure(sq_norm_small), None, pairs)
    return NoiseStats(g2, S)


def noise_scale_stats(
    micro_grads: Any,
    b: ArrayLike,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    mean: Any = None,
    labels: Labels | None = None,
) -> NoiseStats:
    r"""Estimates from the gradients of n microbatches, or of n devices, of b examples each.

        S = b/(n-1) Σ_j |G_j - Ḡ|²,    g2 = |Ḡ|² - S/(n b)

    This is `two_batch_stats` of b and n b without its cancellation. With b = 1 the microbatches are
    examples. It costs two reductions over the gradients; to save their leading axis as well, keep
    `GradientMoments` in the scan that accumulates.

    Args:
      micro_grads: Gradients, a pytree: with a leading axis n; or, given `axis_name`, the gradient
        of this device alone, without that axis.
      b: Examples in a microbatch, or on a device.
      axis_name: Mesh axes inside `shard_map` (or the axis of a `vmap`) that hold the n gradients.
        Beside the mean, one scalar a group crosses devices. Note that `jax.grad` inside `shard_map`
        sums over devices for parameters that are the same on all: take the gradient at
        `jax.lax.pcast(params, axis_name, to="varying")`.
      mean: Their mean over the devices, if the training step has it already.
      labels: Groups to estimate separately: a pytree of strings, or a function of the mean
        gradient that returns one.

    Returns:
      Estimates in float32 (float64 for float64 gradients); dictionaries by group with `labels`.

    Raises:
      ValueError: b is not positive, n < 2, leading axes differ, or `mean` without `axis_name`.
      TypeError: A gradient is not real floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> stats = noise_scale_stats(jnp.array([[1.0, 0], [2, 1], [0, 1], [1, 2]]), 8)
      >>> print(f"{stats.g2:.4f} {stats.S:.4f} {simple_noise_scale(stats):.2f}")
      1.6667 10.6667 6.40

    Source: McCandlish et al. 2018 (arXiv 1812.06162, app. A.1); post 10542.
    """
    check_real("b", b, above=0)
    for leaf in jax.tree.leaves(micro_grads):
        check_floating("micro_grads", leaf)
    if axis_name is not None:
        moments = GradientMoments(micro_grads, jax.tree.map(_zero, micro_grads), 1)
        return moments_stats(moments, b, axis_name=axis_name, mean=mean, labels=labels)
    if mean is not None:
        raise ValueError("mean must be left out without axis_name; got one.")
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(micro_grads)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"micro_grads must share one leading axis; got {sizes or 'no leaves'}.")
    ((n,),) = sizes
    wide = jax.tree.map(lambda x: x.astype(_wide(x)), micro_grads)
    center = jax.tree.map(lambda x: jnp.mean(x, axis=0), wide)
    spread = jax.tree.map(lambda x, m: jnp.sum((x - m[None]) ** 2), wide, center)
    return _estimates(center, spread, n, b, labels)


class GradientMoments(NamedTuple):
    """Mean and spread of the gradients seen so far, kept while they are accumulated."""

    mean: Any
    """Ḡ, float32 at least: the accumulated gradient itself, so that no memory is added."""
    spread: Any
    """Σ_j |G_j - Ḡ|² of every leaf."""
    count: Int[Array, ""] | int  # type: ignore[assignment]  # hides the tuple's method
    """Gradients seen."""


def init_moments(params: Any) -> GradientMoments:
    """Moments of no gradients, for parameters (arrays or shape structs) of this tree.

    Args:
      params: The parameters, or anything with their shapes and types.

    Returns:
      Zeros; the start of a scan over microbatches.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss = lambda w, x: jnp.mean((x @ w - 1.0) ** 2)
      >>> w, x = jnp.ones(2), jnp.arange(16.0).reshape(4, 2, 2) / 16  # 4 microbatches of 2
      >>> def body(moments, batch):
      ...     return add_microbatch(moments, jax.grad(loss)(w, batch)), None
      >>> moments, _ = jax.lax.scan(body, init_moments(w), x)
      >>> print(moments.mean)  # what the optimizer takes
      [0.2734375 0.265625 ]
      >>> print(moments_stats(moments, 2).S > 0)
      True
    """
    zeros = lambda x: jnp.zeros(x.shape, _wide(x))
    return GradientMoments(
        jax.tree.map(zeros, params), jax.tree.map(_zero, params), jnp.zeros((), jnp.int32)
    )


def add_microbatch(moments: GradientMoments, grads: Any) -> GradientMoments:
    r"""One more gradient, by Welford's recursion.

        spread += (j-1)/j |G_j - Ḡ_{j-1}|²,    Ḡ_j = Ḡ_{j-1} + (G_j - Ḡ_{j-1})/j

    No difference of large sums: a spread far below |Ḡ|² keeps its digits.

    Args:
      moments: Of the gradients before.
      grads: Mean gradient of the next microbatch; all microbatches have one size.

    Returns:
      The moments with it. Example: see `init_moments`.
    """
    count = moments.count + 1
    apart = jax.tree.map(lambda g, m: g.astype(m.dtype) - m, grads, moments.mean)

    def widen(spread: Array, d: Array) -> Array:
        j = jnp.asarray(count).astype(d.dtype)
        return spread + jnp.sum(d**2) * ((j - 1) / j)

    spread = jax.tree.map(widen, moments.spread, apart)
    mean = jax.tree.map(
        lambda m, d: m + d / jnp.asarray(count).astype(d.dtype), moments.mean, apart
    )
    return GradientMoments(mean, spread, count)


def moments_stats(
    moments: GradientMoments,
    b: ArrayLike,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    mean: Any = None,
    labels: Labels | None = None,
) -> NoiseStats:
    """Estimates from accumulated microbatches of b examples, on one device or on several.

    Args:
      moments: Of this device's microbatches.
      b: Examples in a microbatch.
      axis_name: Mesh axes over which microbatches are spread as well, equally many on each device.
      mean: The mean of `moments.mean` over those axes, if the training step has it already.
      labels: Groups to estimate separately.

    Returns:
      Estimates; NaN if a traced count turns out below 2.

    Raises:
      ValueError: b is not positive, n < 2, or `mean` without `axis_name`.

    Example: see `init_moments`.
    """
    check_real("b", b, above=0)
    center, spread, n = moments
    if axis_name is not None:
        center = jax.tree.map(lambda x: x.astype(_wide(x)), center)
        local, n_local = center, n
        center = jax.lax.pmean(local, axis_name) if mean is None else mean
        between = jax.tree.map(lambda x, m: jnp.sum((x - m.astype(x.dtype)) ** 2), local, center)
        spread = jax.tree.map(
            lambda s, d: jax.lax.psum(s + d * jnp.asarray(n_local).astype(d.dtype), axis_name),
            spread,
            between,
        )
        n = jax.lax.psum(n_local, axis_name)
    elif mean is not None:
        raise ValueError("mean must be left out without axis_name; got one.")
    return _estimates(center, spread, n, b, labels)


def simple_noise_scale(stats: Any) -> Scalars:
    """B_simple = S / g2, NaN while g2 is not positive.

    Args:
      stats: `NoiseStats` (averaged over steps: the mean of ratios is biased upward), or the state
        of `track_noise_scale`.

    Returns:
      A scalar, or a dictionary of them by group.

    Example:
      >>> import jax.numpy as jnp
      >>> print(simple_noise_scale(NoiseStats(jnp.float32(2.0), jnp.float32(6.0))))
      3.0
      >>> print(simple_noise_scale(NoiseStats(jnp.float32(-1.0), jnp.float32(6.0))))
      nan
    """

    def ratio(g2: Array, S: Array) -> Array:
        known = (g2 > 0) & jnp.isfinite(g2) & jnp.isfinite(S)
        return jnp.where(known, S / jnp.where(known, g2, 1), jnp.nan)

    return jax.tree.map(ratio, stats.g2, stats.S)


def next_batch_size(b: int, scale: Any, *, factor: int = 2, most: int | None = None) -> int:
    """Batch-size warm-up: `factor` times b once B_simple > factor · b, else b. Not for `jit`.

    Args:
      b: The batch size now.
      scale: B_simple, in the same unit; NaN (not known yet) leaves b.
      factor: How much to raise it at once.
      most: Largest batch size.

    Returns:
      The batch size from now on.

    Raises:
      ValueError: A number is out of range.

    Example:
      >>> next_batch_size(64, 130.0), next_batch_size(64, 120.0), next_batch_size(64, 1e9, most=100)
      (128, 64, 100)
    """
    check_real("b", b, above=0)
    check_real("factor", factor, above=1)
    raised = factor * b if float(scale) > factor * b else b
    return raised if most is None else max(b, min(raised, most))


class NoiseScaleState(NamedTuple):
    """Running averages, float32; `simple_noise_scale` of the state is B_simple."""

    g2: Scalars
    """Of |g|², not corrected for its start at 0, which cancels in the ratio."""
    S: Scalars
    """Of tr Σ, likewise."""
    count: Int[Array, ""]  # type: ignore[assignment]  # hides the tuple's method
    """Estimates averaged."""


def track_noise_scale(
    decay: float = 0.99, per_group: Labels | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keep averages of S and g2 beside an optimizer; gradients pass through unchanged.

    Put it first in a chain, before anything that changes gradients. `update` takes, as extra
    arguments, one of

    * `noise_stats`: this step's `NoiseStats`, from `noise_scale_stats` or `moments_stats`;
    * `micro_grads` and `b_small`: for `noise_scale_stats`;
    * `sq_norm_small`, `b_small` and `b_big`: for `two_batch_stats`, the gradients given to `update`
      being those of the big batch. With groups `sq_norm_small` is a dictionary, such as
      `squared_norm(grads, labels)`.

    A single microbatch raises: two consecutive steps are no substitute, for their gradients are
    taken at different parameters. An estimate that is not finite (a loss that overflowed) is left
    out of the averages.

    Args:
      decay: Of both averages, in [0, 1).
      per_group: Groups to follow separately: a pytree of strings, or a function of the parameters
        that returns one.

    Returns:
      An optax transformation. Its state is two float32 scalars a group.

    Raises:
      ValueError: `decay` out of range; at the call: no noise can be told from the arguments given.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(track_noise_scale(), optax.sgd(0.1))
      >>> state = optimizer.init(jnp.zeros(2))
      >>> micro = jnp.array([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [1.0, 2.0]])
      >>> _, state = optimizer.update(jnp.mean(micro, 0), state, micro_grads=micro, b_small=8)
      >>> print(f"{simple_noise_scale(state[0]):.2f}")
      6.40

    Source: McCandlish et al. 2018 (arXiv 1812.06162, app. A.1); post 10542.
    """
    check_real("decay", decay, least=0)
    if not is_traced(decay) and decay >= 1:
        raise ValueError(f"decay must be in [0, 1); got {decay!r}.")

    def init(params: Any) -> NoiseScaleState:
        labels = per_group(params) if callable(per_group) else per_group
        zero = lambda: _collect(jax.tree.map(lambda _: jnp.zeros((), jnp.float32), params), labels)
        return NoiseScaleState(zero(), zero(), jnp.zeros((), jnp.int32))

    def update(
        updates: Any,
        state: NoiseScaleState,
        params: Any = None,
        *,
        noise_stats: NoiseStats | None = None,
        micro_grads: Any = None,
        sq_norm_small: Scalars | None = None,
        b_small: ArrayLike | None = None,
        b_big: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[Any, NoiseScaleState]:
        del params, extra_args
        if noise_stats is not None:
            stats = noise_stats
        elif micro_grads is not None and b_small is not None:
            stats = noise_scale_stats(micro_grads, b_small, labels=per_group)
        elif sq_norm_small is not None and b_small is not None and b_big is not None:
            big = squared_norm(updates, per_group)
            stats = two_batch_stats(sq_norm_small, big, b_small, b_big)
        else:
            raise ValueError(
                "update must be given noise_stats, or micro_grads and b_small, or sq_norm_small,"
                " b_small and b_big: the gradient of a single batch does not show its noise."
            )
        stats = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), stats)
        expected: Any = jax.tree.structure((state.g2, state.S))
        got: Any = jax.tree.structure(tuple(stats))
        if expected != got:
            raise ValueError(f"the estimates must have the groups {expected}; got {got}.")
        finite = [jnp.isfinite(x) for x in jax.tree.leaves(stats)]
        good = jnp.all(jnp.stack(finite)) if finite else jnp.array(True)
        keep = jnp.asarray(decay).astype(jnp.float32)  # `inject_hyperparams` may widen it
        average = lambda old, new: jnp.where(good, keep * old + (1 - keep) * new, old)
        return updates, NoiseScaleState(
            jax.tree.map(average, state.g2, stats.g2),
            jax.tree.map(average, state.S, stats.S),
            state.count + good.astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def squared_norm(tree: Any, labels: Labels | None = None) -> Scalars:
    """|tree|², in float32 at least.

    Args:
      tree: Arrays.
      labels: Groups to sum separately: a pytree of strings, or a function of `tree` to one.

    Returns:
      A scalar, or a dictionary by group.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = {"w": jnp.array([3.0, 4.0]), "b": jnp.array(2.0)}
      >>> print(squared_norm(tree))
      29.0
      >>> print({k: float(v) for k, v in squared_norm(tree, {"w": "matrix", "b": "bias"}).items()})
      {'bias': 4.0, 'matrix': 25.0}
    """
    labels = labels(tree) if callable(labels) else labels
    return _collect(jax.tree.map(lambda x: jnp.sum(x.astype(_wide(x)) ** 2), tree), labels)


def _estimates(mean: Any, spread: Any, n: Any, b: ArrayLike, labels: Any) -> NoiseStats:
    """S and g2 from the mean and the spread of n gradients of b examples."""
    if not is_traced(n) and n < 2:
        raise ValueError(f"micro_grads must be at least 2: one alone shows no noise; got n = {n}.")
    labels = labels(mean) if callable(labels) else labels
    norms = squared_norm(mean, labels)

    def estimate(norm: Array, spread: Array) -> tuple[Array, Array]:
        count, size = (jnp.asarray(x).astype(norm.dtype) for x in (n, b))
        # 0/0 is NaN for a single gradient, as it should be.
        S = size * (spread.astype(norm.dtype) / (count - 1))
        return norm - S / (count * size), S

    pairs = jax.tree.map(estimate, norms, _collect(spread, labels))
    return NoiseStats(*jax.tree.transpose(jax.tree.structure(norms), None, pairs))


def _collect(scalars: Any, labels: Any) -> Scalars:
    """The sum of a tree of scalars, or its sums by label."""
    values = jax.tree.leaves(scalars)
    dtype = _wide(*values)
    total = lambda xs: sum((x.astype(dtype) for x in xs), jnp.zeros((), dtype))
    if labels is None:
        return total(values)
    names = jax.tree.leaves(jax.tree.broadcast(labels, scalars))
    return {
        name: total(x for x, of in zip(values, names, strict=True) if of == name)
        for name in sorted(set(names))
    }


def _wide(*arrays: Any) -> Any:
    """The widest type among some arrays and float32."""
    return wide(*(jnp.result_type(getattr(x, "dtype", x)) for x in arrays))


def _zero(x: Any) -> Float[Array, ""]:
    return jnp.zeros((), _wide(x))
