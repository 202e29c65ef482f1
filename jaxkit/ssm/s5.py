"""S5: one diagonal state for all channels, many inputs and many outputs, run by a parallel scan.

    x' = Λ x + B u,   y = 2 Re(C x) + D ∘ u,   B ∈ C^{M×H},  C ∈ C^{H×M},  Δ ∈ R^M

One member of each conjugate pair is held (M = N/2 modes), C is not conjugated. Where S4 has a
system for each channel and mixes channels afterwards, S5 has one system that mixes them. Initially
Λ is J copies of the spectrum of HiPPO-LegS without its low-rank term.

Parameters are a dict of real arrays:

| key | shape | meaning |
|---|---|---|
| `log_neg_re` | `[modes]` | θ with Re Λ = −exp θ (or another `stability`) |
| `im` | `[modes]` | Im Λ |
| `b` | `[modes, heads, 2]` | B, real and imaginary part last |
| `c` | `[heads, modes, 2]` | C |
| `c_backward` | `[heads, modes, 2]` | only if bidirectional: what reads the reversed scan |
| `log_step` | `[modes]` | log Δ |
| `d` | `[heads]` | D |

Sources: Smith, Warrington, Linderman 2022 (arXiv 2208.04933); post 10162 on kexue.fm.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_choice, check_floating, check_int
from jaxkit._typing import Array, Complex, DType, Float, Key, Params
from jaxkit.ssm import _modes as modes
from jaxkit.ssm import init as inits
from jaxkit.ssm.scan import Planes, diagonal_scan, zoh_transition

__all__ = [
    "DISCRETIZATIONS",
    "System",
    "apply",
    "discretize",
    "init_params",
    "init_state",
    "prefill",
    "step",
]

DISCRETIZATIONS = ("zoh", "bilinear")
_HIGHEST = jax.lax.Precision.HIGHEST


class System(NamedTuple):
    """A discretised system, ready to step; complex values as planes (re, im).

    Attributes:
      transition: Ā, `[modes]`.
      input: B̄, `[modes, heads]`.
      output: C, `[heads, modes]`.
      skip: D, `[heads]`.
    """

    transition: Planes
    input: Planes
    output: Planes
    skip: Float[Array, " heads"]


def init_params(
    key: Key,
    heads: int,
    state_size: int,
    *,
    blocks: int = 1,
    dt_min: float = 1e-3,
    dt_max: float = 1e-1,
    bidirectional: bool = False,
    stability: str = "exp",
    dtype: DType = jnp.float32,
) -> Params:
    """Initial parameters of one system of N states for all channels.

    Λ is `blocks` copies of the spectrum −½ + iβ of LegS of size N/J (its normal part `A + PP^T`).
    B and C are drawn in the eigenbasis: since it is unitary, real normal matrices become complex
    normal ones there, of variance 1/H for B and 1/N for C. D ~ N(0, 1); log Δ uniform on
    [log dt_min, log dt_max], one for each mode.

    Args:
      key: a random key.
      heads: number of channels H.
      state_size: N, all blocks together.
      blocks: J; N/J must be an even integer.
      dt_min: smallest initial step.
      dt_max: largest initial step.
      bidirectional: also hold a read-out of the reversed scan.
      stability: how Re Λ < 0 is kept: `exp`, `softplus` or `relu`.
      dtype: float32 or float64.

    Returns:
      The parameters, as the module docstring lists them.

    Raises:
      ValueError: N/J is not an even integer, a size is below 1, `dt_min` not in (0, dt_max), or
        `stability` unknown.
      TypeError: `dtype` is not float32 or float64.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 3, 16, blocks=2)
      >>> print(params["b"].shape, params["c"].shape)
      (8, 3, 2) (3, 8, 2)

    Source: Smith, Warrington, Linderman 2022 (arXiv 2208.04933), section 4.3 and appendix B.1.
    """
    heads, _ = modes.check_layer_sizes(heads, None, dt_min, dt_max, dtype)
    blocks = check_int("blocks", blocks, least=1)
    size = inits.check_state_size(state_size)
    if size % (2 * blocks):
        raise ValueError(
            f"state_size must be an even multiple of blocks = {blocks}; got {state_size}."
        )
    half = size // 2
    spectrum = np.tile(inits.dplr("legs", size // blocks).eigenvalues, blocks)
    key_b, key_c, key_back, key_d, key_step = jax.random.split(key, 5)
    normal = lambda key, shape, variance: (
        modes.complex_normal(key, shape, dtype) * math.sqrt(variance)
    )
    theta = modes.real_part_parameter(spectrum, 1, stability, dtype, named=True)[0]
    params: Params = {
        "log_neg_re": theta,
        "im": jnp.asarray(spectrum.imag, dtype),
        "b": normal(key_b, (half, heads), 1 / heads),
        "c": normal(key_c, (heads, half), 1 / size),
        "log_step": modes.draw_log_step(key_step, (half,), dt_min, dt_max, dtype),
        "d": jax.random.normal(key_d, (heads,), dtype),
    }
    if bidirectional:
        params["c_backward"] = normal(key_back, (heads, half), 1 / size)
    return params


def _scaled(params: Params, rate: Any, stability: str) -> tuple[Array, Planes]:
    """Δ `[modes]` and ΔΛ as planes."""
    modes.check_rate(rate)
    log_step = params["log_step"]
    delta = jnp.exp(log_step) * jnp.asarray(rate, log_step.dtype)
    return delta, (
        delta * modes.negative_real(params["log_neg_re"], stability),
        delta * params["im"],
    )


def _bilinear(scaled: Planes) -> tuple[Planes, Planes]:
    """(1 + z/2)/(1 − z/2) and 1/(1 − z/2)."""
    x, y = 1 - 0.5 * scaled[0], -0.5 * scaled[1]
    square = x * x + y * y
    inverse = x / square, -y / square
    # (1 + z/2)/(1 − z/2) = 2/(1 − z/2) − 1.
    return (2 * inverse[0] - 1, 2 * inverse[1]), inverse


def _product(x: Planes, y: Planes) -> Planes:
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _read(output: Planes, states: Planes) -> Array:
    """`2 Re(C x)` of `[..., modes]`."""
    dot = lambda c, x: jnp.einsum("hm,...m->...h", c, x, precision=_HIGHEST)
    return 2 * (dot(output[0], states[0]) - dot(output[1], states[1]))


def _drive(matrix: Planes, u: Array) -> Planes:
    """`B u` of `[..., heads]`."""
    dot = lambda b: jnp.einsum("mh,...h->...m", b, u, precision=_HIGHEST)
    return dot(matrix[0]), dot(matrix[1])


def discretize(
    params: Params, *, rate: Any = 1.0, discretization: str = "zoh", stability: str = "exp"
) -> System:
    """The recurrence: ZOH `Ā = e^{ΔΛ}, B̄ = (e^{ΔΛ} − 1)Λ^{-1}B`, or bilinear.

    Args:
      params: the parameters.
      rate: Δ is multiplied by it: 2 for the same signals with half as many samples. Exact with
        `zoh` for inputs that are held.
      discretization: one of `DISCRETIZATIONS`.
      stability: the parametrization of Re Λ.

    Returns:
      A `System` for `step` and `prefill`.

    Raises:
      ValueError: `rate` is not positive, a name unknown, or the parameters are those of a
        bidirectional layer, whose outputs depend on the future.

    Example:
      >>> import jax
      >>> print(discretize(init_params(jax.random.key(0), 3, 8)).input[0].shape)
      (4, 3)

    Source: Smith, Warrington, Linderman 2022 (arXiv 2208.04933), equation 6.
    """
    if "c_backward" in params:
        raise ValueError(
            "params must not be bidirectional (hold 'c_backward') for a recurrence: its outputs "
            "depend on the future. Use apply."
        )
    return _system(params, rate, discretization, stability)


def _system(params: Params, rate: Any, discretization: str, stability: str) -> System:
    check_choice("discretization", discretization, DISCRETIZATIONS)
    delta, scaled = _scaled(params, rate, stability)
    if discretization == "zoh":
        # One step of length 1 for the eigenvalues ΔΛ; its gain is (e^{ΔΛ} − 1)/(ΔΛ).
        transition, gain = zoh_transition(scaled, jnp.ones((), delta.dtype))
    else:
        transition, gain = _bilinear(scaled)
    factor = (delta * gain[0])[:, None], (delta * gain[1])[:, None]
    return System(
        transition,
        _product(factor, modes.planes(params["b"])),
        modes.planes(params["c"]),
        params["d"],
    )


def apply(
    params: Params,
    u: Float[Array, "*batch length heads"],
    *,
    steps: Float[Array, "*batch length"] | None = None,
    rate: Any = 1.0,
    discretization: str = "zoh",
    stability: str = "exp",
    chunk_size: int | None = None,
) -> Float[Array, "*batch length heads"]:
    """The layer on whole sequences, from the zero state.

    With `c_backward` among the parameters a second scan runs from the end over the same `B̄ u`, and
    `y = 2 Re(C x + C_b x_b) + D u`: both scans contain the present input. Time O(L M H), at a
    depth of O(log L).

    Args:
      params: the parameters.
      u: real inputs.
      steps: durations of the samples in units of Δ, positive: irregular sampling, `zoh` only.
        Default: ones.
      rate: Δ is multiplied by it.
      discretization: one of `DISCRETIZATIONS`.
      stability: the parametrization of Re Λ.
      chunk_size: scan in chunks of this many steps, for memory; see `diagonal_scan`.

    Returns:
      Outputs, with the shape and dtype of `u`.

    Raises:
      TypeError: `u` or `steps` is not real.
      ValueError: shapes do not fit, a known step is not positive, or `steps` comes with `bilinear`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = init_params(jax.random.key(0), 3, 8)
      >>> print(apply(params, jnp.ones((2, 10, 3))).shape)
      (2, 10, 3)

    Source: Smith, Warrington, Linderman 2022 (arXiv 2208.04933), section 3; section 6.3 for
    irregular sampling.
    """
    _check_u(u, params["d"], axes=2)
    check_choice("discretization", discretization, DISCRETIZATIONS)
    x = u.astype(params["d"].dtype)
    if steps is None:
        system = _system(params, rate, discretization, stability)
        decay, drive = system.transition, _drive(system.input, x)
    else:
        if discretization != "zoh":
            raise ValueError(
                f"steps needs discretization 'zoh' (held inputs); got {discretization!r}."
            )
        decay, drive = _irregular(params, x, steps, rate, stability)
    states = diagonal_scan(decay, drive, chunk_size=chunk_size)
    y = _read(modes.planes(params["c"]), states)
    if "c_backward" in params:
        back = diagonal_scan(decay, drive, chunk_size=chunk_size, reverse=True)
        y = y + _read(modes.planes(params["c_backward"]), back)
    return (y + modes.batched(params["d"], x.ndim) * x).astype(u.dtype)


def _irregular(
    params: Params, x: Array, steps: Array, rate: Any, stability: str
) -> tuple[Planes, Planes]:
    check_floating("steps", steps)
    if steps.shape not in (x.shape[:-1], x.shape[-2:-1]):
        raise ValueError(
            f"steps must have shape {x.shape[:-1]} or {x.shape[-2:-1]}; got {tuple(steps.shape)}."
        )
    delta, scaled = _scaled(params, rate, stability)
    decay, gain = zoh_transition(scaled, steps)
    drive = _drive(modes.planes(params["b"]), x)
    factor = tuple(modes.batched(part * modes.batched(delta, part.ndim), x.ndim) for part in gain)
    return decay, _product((factor[0], factor[1]), drive)


def init_state(
    state_size: int, *, batch_shape: tuple[int, ...] = (), dtype: DType = jnp.float32
) -> Complex[Array, "*batch modes"]:
    """The zero state, shared by all channels.

    Args:
      state_size: N, even.
      batch_shape: leading axes.
      dtype: real dtype of the parameters.

    Returns:
      Complex zeros `[*batch_shape, N/2]`.

    Raises:
      ValueError: `state_size` is odd.

    Example:
      >>> print(init_state(8, batch_shape=(2,)).shape)
      (2, 4)

    Source: Smith, Warrington, Linderman 2022 (arXiv 2208.04933).
    """
    size = inits.check_state_size(state_size)
    return jnp.zeros(
        (*batch_shape, size // 2),
        jnp.complex128 if jnp.dtype(dtype) == jnp.float64 else jnp.complex64,
    )


def _check_u(u: Any, skip: Array, *, axes: int) -> None:
    modes.check_sequence("u", u, skip.shape[0], axes=axes)
    if axes == 2 and u.shape[-2] < 1:
        raise ValueError(f"u must have at least one position; got shape {tuple(u.shape)}.")


def step(
    system: System, state: Complex[Array, "*batch modes"], u: Float[Array, "*batch heads"]
) -> tuple[Float[Array, "*batch heads"], Complex[Array, "*batch modes"]]:
    """One step in O(M H): `x ← Ā x + B̄ u`, `y = 2 Re(C x) + D u`.

    Args:
      system: from `discretize`.
      state: state before the step.
      u: input of every channel.

    Returns:
      `(y, state)`, y in the dtype of `u`.

    Raises:
      TypeError: `u` is not real.
      ValueError: `u` has another number of channels, or `state` another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> system = discretize(init_params(jax.random.key(0), 3, 8))
      >>> y, state = step(system, init_state(8), jnp.ones(3))
      >>> print(y.shape, state.shape)
      (3,) (4,)

    Source: Smith, Warrington, Linderman 2022 (arXiv 2208.04933), section 3.3.
    """
    _check_u(u, system.skip, axes=1)
    modes.check_state(state, u.shape[:-1], system.transition[0].shape)
    x = u.astype(system.skip.dtype)
    decay = tuple(modes.batched(part, state.ndim) for part in system.transition)
    moved = _product((decay[0], decay[1]), (jnp.real(state), jnp.imag(state)))
    drive = _drive(system.input, x)
    planes = moved[0] + drive[0], moved[1] + drive[1]
    y = _read(system.output, planes) + modes.batched(system.skip, x.ndim) * x
    return y.astype(u.dtype), jax.lax.complex(*planes)


def prefill(
    system: System,
    state: Complex[Array, "*batch modes"],
    u: Float[Array, "*batch length heads"],
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "*batch length heads"], Complex[Array, "*batch modes"]]:
    """Outputs and exact final state for a stretch of input, from any state.

    Any split of a sequence gives the same outputs and state.

    Args:
      system: from `discretize`.
      state: state before the first input.
      u: inputs.
      chunk_size: scan in chunks of this many steps; see `diagonal_scan`.

    Returns:
      `(y, state)`, y in the dtype of `u`.

    Raises:
      TypeError: `u` is not real.
      ValueError: shapes do not fit, or `chunk_size` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> system = discretize(init_params(jax.random.key(0), 3, 8))
      >>> y, state = prefill(system, init_state(8, batch_shape=(2,)), jnp.ones((2, 5, 3)))
      >>> print(y.shape, state.shape)
      (2, 5, 3) (2, 4)

    Source: Smith, Warrington, Linderman 2022 (arXiv 2208.04933), section 3.3.
    """
    _check_u(u, system.skip, axes=2)
    modes.check_state(state, u.shape[:-2], system.transition[0].shape)
    x = u.astype(system.skip.dtype)
    states = diagonal_scan(
        system.transition,
        _drive(system.input, x),
        initial=(jnp.real(state), jnp.imag(state)),
        chunk_size=chunk_size,
    )
    y = _read(system.output, states) + modes.batched(system.skip, x.ndim) * x
    return y.astype(u.dtype), jax.lax.complex(states[0][..., -1, :], states[1][..., -1, :])
