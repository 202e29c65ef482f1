"""Diagonal state-space layers: S4D, DSS-exp and DSS-softmax, with the Vandermonde kernel.

Per channel `x' = Λ x + B u`, `y = 2 Re Σ C x + D u` over one member of each conjugate pair (or, for
real spectra, `y = Σ C x + D u` over N real states). With step ε:

- `zoh` (S4D, the same as DSS-exp): `Ā = e^{εΛ}`, `B̄ = (e^{εΛ} − 1) Λ^{-1} B`;
- `bilinear`: `Ā = (1 + εΛ/2)/(1 − εΛ/2)`, `B̄ = ε B/(1 − εΛ/2)`;
- `softmax` (DSS-softmax): `zoh` with C divided by `e^{LεΛ} − 1`, which is the row-softmax of
  `e^{εΛl}` over the L steps.

The kernel is `K_l = 2 Re Σ C Ā^l B̄`, a product with a Vandermonde matrix.

Parameters are a dict of real arrays (`modes` = N/2; n_ssm divides heads):

| key | shape | meaning |
|---|---|---|
| `log_neg_re` | `[n_ssm, modes]` | θ with Re Λ = −exp θ (or another `stability`) |
| `im` | `[n_ssm, modes]` | Im Λ; absent for a real spectrum |
| `b` | `[n_ssm, modes, 2]` | B; `[n_ssm, N]` for a real spectrum |
| `c` | `[heads, modes, 2]` | C; `[heads, N]` for a real spectrum |
| `log_step` | `[heads]` or `[heads, modes]` | log ε |
| `d` | `[heads]` | D |

Sources: Gupta, Gu, Berant 2022 (arXiv 2203.14343); Gu, Gupta, Goel, Ré 2022 (2206.11893); post
10162 on kexue.fm.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxkit_kernels.vandermonde import vandermonde

from jaxkit._checks import check_choice, check_floating, check_int, check_real, is_traced
from jaxkit._typing import Array, DType, Float, Key, Params
from jaxkit.ssm import _modes as modes
from jaxkit.ssm import init as inits

__all__ = [
    "DISCRETIZATIONS",
    "System",
    "apply_irregular",
    "change_rate",
    "discretize",
    "free_response",
    "init_params",
    "init_state",
    "kernel",
    "prefill",
    "step",
]

DISCRETIZATIONS = ("zoh", "bilinear", "softmax")


class System(NamedTuple):
    """A discretised diagonal system; complex, or real for a real spectrum.

    Attributes:
      transition: Ā.
      input: B̄.
      output: C, with the factor of the pair (2 for complex modes) included.
      skip: D.
    """

    transition: Array
    input: Array
    output: Array
    skip: Float[Array, " heads"]


def init_params(
    key: Key,
    heads: int,
    state_size: int,
    *,
    init: str | inits.Diagonal = "legs",
    halve_input: bool = False,
    n_ssm: int | None = None,
    dt_min: float = 1e-3,
    dt_max: float = 1e-1,
    tie_step: bool = True,
    stability: str = "exp",
    dtype: DType = jnp.float32,
) -> Params:
    """Initial parameters of `heads` diagonal systems.

    Λ and B as `jaxkit.ssm.init.diagonal` gives them, C complex N(0, 1) (real for `real`),
    D ~ N(0, 1), log ε uniform on [log dt_min, log dt_max].

    Args:
      key: A random key.
      heads: Number of channels.
      state_size: N; even, except for `real`.
      init: One of `jaxkit.ssm.init.DIAGONAL_INITS`, or a `Diagonal` pair with Re Λ < 0.
      halve_input: B/2, as theory wants, for `legs`.
      n_ssm: Number of different (Λ, B), shared by heads / n_ssm channels each. Default: heads.
      dt_min: Smallest initial step.
      dt_max: Largest initial step.
      tie_step: One step for each channel; otherwise one for each of its modes.
      stability: How Re Λ < 0 is kept: `exp`, `softplus` or `relu`.
      dtype: float32 or float64.

    Returns:
      The parameters, as the module docstring lists them.

    Raises:
      ValueError: If `state_size` is odd, `dt_min` not in (0, dt_max), `n_ssm` no divisor of
        `heads`, a name unknown, or a given Re Λ not negative.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 3, 8, init="lin")
      >>> print(kernel(params, 16).shape)
      (3, 16)

    Source: Gu, Gupta, Goel, Ré 2022 (arXiv 2206.11893); post 10162.
    """
    heads, n_ssm = modes.check_layer_sizes(heads, n_ssm, dt_min, dt_max, dtype)
    key_c, key_d, key_step, key_a = jax.random.split(key, 4)
    if isinstance(init, str):
        system = inits.diagonal(init, state_size, halve_input=halve_input)
    else:
        if not isinstance(init, inits.Diagonal):
            raise TypeError(f"init must be a name or a Diagonal pair; got {init!r}.")
        system = init
    real = not np.iscomplexobj(system.eigenvalues)
    size = inits.check_state_size(state_size, even=not real)
    count = size if real else size // 2
    if np.shape(system.eigenvalues) != (count,) or np.shape(system.input) != (count,):
        shapes = tuple(np.shape(part) for part in system)
        raise ValueError(f"init must have parts of shape [{count}], [{count}]; got {shapes}.")
    params: Params = {}
    if isinstance(init, str) and init == "random":
        normal = jax.random.normal(key_a, (2, n_ssm, count), dtype)
        params["log_neg_re"] = modes.inverse_negative_real(-jnp.exp(normal[0]), stability, jnp)
        params["im"] = jnp.abs(normal[1])
    else:
        params["log_neg_re"] = modes.real_part_parameter(
            system.eigenvalues, n_ssm, stability, dtype, named=False
        )
        if not real:
            params["im"] = jnp.tile(jnp.asarray(system.eigenvalues.imag, dtype), (n_ssm, 1))
    if real:
        params["b"] = jnp.tile(jnp.asarray(system.input, dtype), (n_ssm, 1))
        params["c"] = jax.random.normal(key_c, (heads, count), dtype)
    else:
        params["b"] = jnp.tile(modes.pair(system.input, dtype), (n_ssm, 1, 1))
        params["c"] = modes.complex_normal(key_c, (heads, count), dtype)
    shape = (heads,) if tie_step else (heads, count)
    params["log_step"] = modes.draw_log_step(key_step, shape, dt_min, dt_max, dtype)
    params["d"] = jax.random.normal(key_d, (heads,), dtype)
    return params


def _expm1(value: Array) -> Array:
    """`e^z − 1` without cancellation near 0, real or complex."""
    if not jnp.iscomplexobj(value):
        return jnp.expm1(value)
    x, y = jnp.real(value), jnp.imag(value)
    half = jnp.sin(0.5 * y)
    growth = jnp.expm1(x)
    return jax.lax.complex(growth * jnp.cos(y) - 2.0 * half * half, (growth + 1.0) * jnp.sin(y))


class _Scaled(NamedTuple):
    """ε, Λ, εΛ, B and C `[heads, modes]`, all heads spelt out."""

    step: Array
    eigenvalues: Array
    scaled: Array
    input: Array
    output: Array


def _scaled(params: Params, rate: Any, stability: str, band_limit: float | None = None) -> _Scaled:
    heads = params["c"].shape[0]
    eps = modes.steps(params, heads, rate)
    eigenvalues = modes.negative_real(params["log_neg_re"], stability)
    b, c = params["b"], params["c"]
    if "im" in params:
        eigenvalues = jax.lax.complex(eigenvalues, params["im"])
        b, c = modes.to_complex(b), modes.to_complex(c)
    eigenvalues, b = modes.repeat_heads(eigenvalues, heads), modes.repeat_heads(b, heads)
    if band_limit is not None:
        check_real("band_limit", band_limit, above=0.0)
        frequency = eps * jnp.abs(jnp.imag(eigenvalues))
        c = jnp.where(frequency < np.pi * band_limit, c, jnp.zeros_like(c))
    eps = modes.like(eps, eigenvalues)
    return _Scaled(eps, eigenvalues, eps * eigenvalues, b, c)


def _input(part: _Scaled, discretization: str) -> Array:
    """B̄."""
    if discretization == "bilinear":
        return part.step * part.input / (1.0 - 0.5 * part.scaled)
    return _expm1(part.scaled) / part.eigenvalues * part.input


def _output(
    params: Params, part: _Scaled, discretization: str, stability: str, l_max: int | None
) -> Array:
    """C, divided by `e^{LεΛ} − 1` for the softmax; the normaliser keeps the step of rate 1."""
    if discretization != "softmax":
        return part.output
    if l_max is None:
        raise ValueError("l_max must be given for discretization 'softmax'; got None.")
    modes.check_length("l_max", l_max)
    nominal = _scaled(params, 1.0, stability).scaled
    return part.output / _expm1(l_max * nominal)


def _check(discretization: str, rate: Any) -> None:
    check_choice("discretization", discretization, DISCRETIZATIONS)
    modes.check_rate(rate)


def _log_transition(part: _Scaled, discretization: str) -> Array:
    """log Ā, whose multiples the Vandermonde kernel takes the exponential of."""
    if discretization == "bilinear":
        # log1p keeps the digits that (1 + εΛ/2)/(1 − εΛ/2) − 1 = εΛ/(1 − εΛ/2) has for small ε.
        return _log1p(part.scaled / (1.0 - 0.5 * part.scaled))
    return part.scaled


def _log1p(value: Array) -> Array:
    if not jnp.iscomplexobj(value):
        # A real mode with ε|Λ| > 2 alternates in sign: its logarithm is complex.
        value = jax.lax.complex(value, jnp.zeros_like(value))
    x, y = jnp.real(value), jnp.imag(value)
    return jax.lax.complex(0.5 * jnp.log1p(x * (2.0 + x) + y * y), jnp.arctan2(y, 1.0 + x))


def _vandermonde(log_transition: Array, weights: Array, length: int, implementation: Any) -> Array:
    """`Σ weights e^{l · log_transition}` over all states, pairs counted twice."""
    if jnp.iscomplexobj(log_transition):
        if not jnp.iscomplexobj(weights):
            weights = jax.lax.complex(0.5 * weights, jnp.zeros_like(weights))
        alpha, beta = -jnp.real(log_transition), jnp.imag(log_transition)
        re, im = jnp.real(weights), jnp.imag(weights)
    else:
        alpha, beta = -log_transition, jnp.zeros_like(log_transition)
        re, im = 0.5 * weights, jnp.zeros_like(weights)
    return vandermonde(alpha, beta, re, im, length=length, implementation=implementation)


def kernel(
    params: Params,
    length: int,
    *,
    rate: Any = 1.0,
    l_max: int | None = None,
    band_limit: float | None = None,
    discretization: str = "zoh",
    stability: str = "exp",
    implementation: Any = "auto",
) -> Float[Array, "heads length"]:
    """The convolution kernel `K_l = 2 Re Σ C Ā^l B̄` (without D), of any length.

    Time O(N·L) elementwise, or (L/T + T)·N exponentials and a real matrix product in the two-level
    form that `jaxkit_kernels.vandermonde` chooses.

    Args:
      params: The parameters.
      length: Number of steps.
      rate: ε is multiplied by it. Exact for `zoh` and held inputs:
        `K^{2ε}_k = K^ε_{2k} + K^ε_{2k+1}`.
      l_max: L of the softmax. Default: `length`. The other discretizations need none.
      band_limit: Zero C where ε|Im Λ|/2π ≥ ½ · band_limit.
      discretization: One of `DISCRETIZATIONS`.
      stability: The parametrization of Re Λ.
      implementation: Which Vandermonde kernel.

    Returns:
      K `[heads, length]`.

    Raises:
      ValueError: If `length` is below 1, `rate` or `band_limit` not positive, a name unknown.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 3, 8, init="real")
      >>> print(kernel(params, 10).shape, kernel(params, 5, rate=2.0).shape)
      (3, 10) (3, 5)

    Source: Gupta, Gu, Berant 2022 (arXiv 2203.14343); Gu, Gupta, Goel, Ré 2022 (2206.11893); post
    10162.
    """
    _check(discretization, rate)
    length = modes.check_length("length", length)
    part = _scaled(params, rate, stability, band_limit)
    c = _output(params, part, discretization, stability, length if l_max is None else l_max)
    weights = c * _input(part, discretization)
    return _vandermonde(_log_transition(part, discretization), weights, length, implementation)


def change_rate(params: Params, *, rate: Any) -> Params:
    """The same continuous system sampled `rate` times more sparsely: ε → rate · ε.

    Args:
      params: The parameters (not of DSS-softmax, whose normaliser depends on ε: use the argument
        `rate` of `kernel` and `discretize`).
      rate: Positive ratio; 2 halves the number of samples of the same signal.

    Returns:
      Parameters with the new step.

    Raises:
      ValueError: If `rate` is not positive.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 3, 8)
      >>> half = kernel(change_rate(params, rate=2.0), 8)
      >>> full = kernel(params, 16)
      >>> print(bool(abs(half - full[:, ::2] - full[:, 1::2]).max() < 1e-4))
      True

    Source: Gu, Gupta, Goel, Ré 2022 (arXiv 2206.11893); post 10162.
    """
    modes.check_rate(rate)
    log_step = params["log_step"]
    return {**params, "log_step": log_step + jnp.log(jnp.asarray(rate, log_step.dtype))}


def discretize(
    params: Params,
    *,
    rate: Any = 1.0,
    l_max: int | None = None,
    band_limit: float | None = None,
    discretization: str = "zoh",
    stability: str = "exp",
) -> System:
    """The recurrence that the kernel stands for.

    Args:
      params: The parameters.
      rate: ε is multiplied by it.
      l_max: L of the softmax (required there).
      band_limit: As in `kernel`.
      discretization: One of `DISCRETIZATIONS`.
      stability: The parametrization of Re Λ.

    Returns:
      A `System` for `step` and `prefill`.

    Raises:
      ValueError: As in `kernel`, or without `l_max` for `softmax`.

    Example:
      >>> import jax
      >>> print(discretize(init_params(jax.random.key(0), 3, 8)).transition.shape)
      (3, 4)

    Source: Gu, Gupta, Goel, Ré 2022 (arXiv 2206.11893); post 10162.
    """
    _check(discretization, rate)
    part = _scaled(params, rate, stability, band_limit)
    c = _output(params, part, discretization, stability, l_max)
    factor = 2.0 if jnp.iscomplexobj(part.scaled) else 1.0
    if discretization == "bilinear":
        transition = (1.0 + 0.5 * part.scaled) / (1.0 - 0.5 * part.scaled)
    else:
        transition = jnp.exp(part.scaled)
    return System(transition, _input(part, discretization), factor * c, params["d"])


def init_state(
    heads: int,
    state_size: int,
    *,
    batch_shape: tuple[int, ...] = (),
    real: bool = False,
    dtype: DType = jnp.float32,
) -> Array:
    """The zero state.

    Args:
      heads: Number of channels.
      state_size: N; even unless `real`.
      batch_shape: Leading axes.
      real: Whether the spectrum is real.
      dtype: Real dtype of the parameters.

    Returns:
      Complex zeros `[*batch_shape, heads, N/2]`, or real ones `[*batch_shape, heads, N]`.

    Raises:
      ValueError: If `heads` is below 1 or `state_size` odd.

    Example:
      >>> print(init_state(3, 8).shape, init_state(3, 8, real=True).shape)
      (3, 4) (3, 8)

    Source: Gu, Gupta, Goel, Ré 2022 (arXiv 2206.11893).
    """
    size = inits.check_state_size(state_size, even=not real)
    heads = check_int("heads", heads, least=1)
    if real:
        return jnp.zeros((*batch_shape, heads, size), dtype)
    return jnp.zeros(
        (*batch_shape, heads, size // 2), np.result_type(jnp.dtype(dtype), np.complex64)
    )


def step(
    system: System, state: Array, u: Float[Array, "*batch heads"]
) -> tuple[Float[Array, "*batch heads"], Array]:
    """One step in O(N): `x ← Ā x + B̄ u`, `y = 2 Re Σ C x + D u`.

    Args:
      system: From `discretize`.
      state: State before the step, `[*batch, heads, modes]`.
      u: Input of every channel.

    Returns:
      `(y, state)`, y in the dtype of `u`.

    Raises:
      TypeError: If `u` is not real.
      ValueError: If `u` has another number of channels, or `state` another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> system = discretize(init_params(jax.random.key(0), 3, 8))
      >>> y, state = step(system, init_state(3, 8), jnp.ones(3))
      >>> print(y.shape, state.shape)
      (3,) (3, 4)

    Source: Gu, Gupta, Goel, Ré 2022 (arXiv 2206.11893); post 10162.
    """
    modes.check_sequence("u", u, system.skip.shape[0], axes=1)
    modes.check_state(state, u.shape[:-1], system.output.shape)
    drive = modes.batched(system.input, state.ndim) * modes.like(u, system.input)[..., None]
    state = modes.batched(system.transition, state.ndim) * state + drive
    y = jnp.real(jnp.sum(modes.batched(system.output, state.ndim) * state, axis=-1))
    return (y + modes.batched(system.skip, y.ndim) * u.astype(y.dtype)).astype(u.dtype), state


def _chunk(system: System, length: int) -> modes.Chunk:
    """Powers of Ā, doubled."""
    first = system.transition
    powers = jnp.ones_like(first)[..., None]
    power = first
    while powers.shape[-1] < length:
        powers = jnp.concatenate([powers, powers * power[..., None]], axis=-1)
        power = power * power
    powers = powers[..., :length]
    inject = system.input[..., None] * powers
    observe = (system.output * first)[..., None] * powers
    last = powers[..., -1] * first
    taps = jnp.real(jnp.sum(system.output[..., None] * inject, axis=-2))
    taps = taps.at[:, 0].add(system.skip)

    def product(pattern: str, *arrays: Array) -> Array:
        return jnp.einsum(pattern, *arrays, precision=jax.lax.Precision.HIGHEST)

    return modes.Chunk(
        taps,
        lambda state: jnp.real(product("hnl,...hn->...lh", observe, state)),
        lambda u: product("hnl,...lh->...hn", inject[..., ::-1], modes.like(u, inject)),
        lambda state: modes.batched(last, state.ndim) * state,
    )


def prefill(
    system: System,
    state: Array,
    u: Float[Array, "*batch length heads"],
    *,
    chunk_size: int = 64,
) -> tuple[Float[Array, "*batch length heads"], Array]:
    """Outputs and exact final state for a stretch of input, from any state.

    Args:
      system: From `discretize`.
      state: State before the first input, `[*batch, heads, modes]`.
      u: Inputs.
      chunk_size: Steps a chunk; time O(L (chunk_size + N)) for each head and batch entry.

    Returns:
      `(y, state)`, y in the dtype of `u`. Any split of a sequence gives the same.

    Raises:
      TypeError: If `u` is not real.
      ValueError: If shapes do not fit or `chunk_size` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> system = discretize(init_params(jax.random.key(0), 3, 8))
      >>> y, state = prefill(system, init_state(3, 8, batch_shape=(2,)), jnp.ones((2, 5, 3)))
      >>> print(y.shape, state.shape)
      (2, 5, 3) (2, 3, 4)

    Source: post 10162; Gu, Gupta, Goel, Ré 2022 (arXiv 2206.11893).
    """
    chunk_size = check_int("chunk_size", chunk_size, least=1)
    modes.check_sequence("u", u, system.skip.shape[0], axes=2)
    modes.check_state(state, u.shape[:-2], system.output.shape)
    y, state = modes.run_chunks(
        lambda length: _chunk(system, length), state, u.astype(system.skip.dtype), chunk_size
    )
    return y.astype(u.dtype), state


def free_response(
    params: Params,
    state: Array,
    length: int,
    *,
    rate: Any = 1.0,
    l_max: int | None = None,
    discretization: str = "zoh",
    stability: str = "exp",
    implementation: Any = "auto",
) -> Float[Array, "*batch length heads"]:
    """What a state `x_0` alone puts out: `K^state_l = C Ā^{l+1} x_0`.

    The kernel with B̄ replaced by `Ā x_0` (for `zoh`: B by `Λ x_0/(1 − e^{−εΛ})`).

    Args:
      params: The parameters.
      state: State before the first step, `[*batch, heads, modes]`.
      length: Number of steps.
      rate: ε is multiplied by it.
      l_max: L of the softmax (required there).
      discretization: One of `DISCRETIZATIONS`.
      stability: The parametrization of Re Λ.
      implementation: Which Vandermonde kernel.

    Returns:
      `[*batch, length, heads]`.

    Raises:
      ValueError: As in `kernel`, or if `state` has another shape.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 3, 8)
      >>> print(free_response(params, init_state(3, 8, batch_shape=(2,)), 16).shape)
      (2, 16, 3)

    Source: post 10162.
    """
    system = discretize(
        params, rate=rate, l_max=l_max, discretization=discretization, stability=stability
    )
    length = modes.check_length("length", length)
    batch = state.shape[:-2]
    modes.check_state(state, batch, system.output.shape)
    logs = _log_transition(_scaled(params, rate, stability), discretization)
    factor = 0.5 if jnp.iscomplexobj(system.output) else 1.0
    c = factor * system.output * system.transition
    weights = modes.batched(c, state.ndim) * state
    flat = weights.reshape(-1, *weights.shape[-2:])
    response = jax.vmap(lambda w: _vandermonde(logs, w, length, implementation))(flat)
    return jnp.swapaxes(response, 1, 2).reshape(*batch, length, params["c"].shape[0])


def apply_irregular(
    params: Params,
    u: Float[Array, "*batch length heads"],
    steps: Float[Array, "*batch length"],
    *,
    state: Array | None = None,
    rate: Any = 1.0,
    stability: str = "exp",
) -> tuple[Float[Array, "*batch length heads"], Array]:
    """Irregularly sampled input, by a parallel scan: `x_k = e^{Δ_kΛ} x_{k−1} + B̄(Δ_k) u_k`.

    Input u_k is held for Δ_k = `steps[k]` · ε (zero-order hold), so `steps` of ones is the layer
    itself, and halving a step with the input repeated changes nothing. Time O(N·L), depth O(log L),
    memory O(N·L) for each head and batch entry.

    Args:
      params: The parameters of a `zoh` system.
      u: Inputs.
      steps: Duration of every sample, in units of the layer's own step; positive.
      state: State before the first input. Default: zero.
      rate: ε is multiplied by it.
      stability: The parametrization of Re Λ.

    Returns:
      `(y, state)`, y in the dtype of `u`.

    Raises:
      TypeError: If `u` or `steps` is not real.
      ValueError: If shapes do not fit, or a concrete step is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = init_params(jax.random.key(0), 3, 8)
      >>> y, state = apply_irregular(params, jnp.ones((5, 3)), jnp.asarray([1.0, 2, 1, 0.5, 1]))
      >>> print(y.shape, state.shape)
      (5, 3) (3, 4)

    Source: Smith, Warrington, Linderman 2022 (arXiv 2208.04933, sec. 6.3); post 10162.
    """
    heads = params["c"].shape[0]
    modes.check_sequence("u", u, heads, axes=2)
    check_floating("steps", steps)
    modes.check_rate(rate)
    if steps.shape != u.shape[:-1]:
        raise ValueError(f"steps must have shape {u.shape[:-1]}; got {tuple(steps.shape)}.")
    if not is_traced(steps) and not bool(jnp.all(steps > 0)):
        raise ValueError(f"steps must be positive; got a smallest one of {steps.min()}.")
    part = _scaled(params, rate, stability)
    real = params["d"].dtype
    spread = steps.astype(real)[..., None, None]
    ndim = spread.ndim
    log_transition = modes.batched(part.scaled, ndim) * modes.like(spread, part.scaled)
    x = u.astype(real)
    drive = (
        _expm1(log_transition)
        * modes.batched(part.input / part.eigenvalues, ndim)
        * modes.like(x, part.input)[..., None]
    )
    transition = jnp.exp(log_transition)
    if state is not None:
        modes.check_state(state, u.shape[:-2], part.scaled.shape)
        drive = drive.at[..., 0, :, :].add(transition[..., 0, :, :] * state)

    def combine(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    _, states = jax.lax.associative_scan(combine, (transition, drive), axis=ndim - 3)
    factor = 2.0 if jnp.iscomplexobj(part.scaled) else 1.0
    y = factor * jnp.real(jnp.sum(modes.batched(part.output, ndim) * states, axis=-1))
    y = y + modes.batched(params["d"], x.ndim) * x
    return y.astype(u.dtype), states[..., -1, :, :]
