"""What the DPLR and the diagonal family share: parameters of modes, steps, chunked prefill."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_choice, check_floating, check_int, check_real, is_traced
from jaxkit._typing import Array, DType, Key

# Where the mathematics puts Re Λ on the imaginary axis (LegT, FouT, LagT), the parameter starts
# at this decay: every parametrization excludes zero, and the change over 1/ε steps is 1e-4.
MIN_DECAY = 1e-4
STABILITIES = ("exp", "softplus", "relu")


def negative_real(theta: Any, stability: str, xp: ModuleType = jnp) -> Any:
    """Re Λ < 0 from its parameter: −exp θ, −softplus θ or −relu θ − 1e-4."""
    check_choice("stability", stability, STABILITIES)
    if stability == "exp":
        return -xp.exp(theta)
    if stability == "softplus":
        return -xp.logaddexp(theta, xp.zeros_like(theta))
    return -xp.maximum(theta, xp.zeros_like(theta)) - MIN_DECAY


def inverse_negative_real(real: Any, stability: str, xp: ModuleType = np) -> Any:
    """The parameter that gives Re Λ = `real`."""
    check_choice("stability", stability, STABILITIES)
    if stability == "exp":
        return xp.log(-real)
    if stability == "softplus":
        return -real + xp.log(-xp.expm1(real))
    return -real - MIN_DECAY


def real_part_parameter(
    eigenvalues: np.ndarray, n_ssm: int, stability: str, dtype: DType, *, named: bool
) -> Array:
    """Parameters of Re Λ for `n_ssm` copies; a given spectrum must be stable already."""
    real = np.asarray(eigenvalues).real.astype(np.float64)
    if named:
        real = np.minimum(real, -MIN_DECAY)
    elif not np.all(real < 0):
        raise ValueError(
            f"init must have eigenvalues with negative real parts; got Re Λ up to {real.max()}."
        )
    return jnp.tile(jnp.asarray(inverse_negative_real(real, stability), dtype), (n_ssm, 1))


def pair(value: np.ndarray, dtype: DType) -> Array:
    """A host complex array as real numbers, `[..., 2]`."""
    return jnp.asarray(np.stack([value.real, value.imag], axis=-1), dtype)


def to_complex(value: Any, xp: ModuleType = jnp) -> Any:
    """`[..., 2]` real numbers as complex ones."""
    return join(*planes(value), xp)


def join(real: Any, imag: Any, xp: ModuleType = jnp) -> Any:
    """`real + i imag`."""
    return real + 1j * imag if xp is np else jax.lax.complex(real, imag)


def planes(value: Any) -> tuple[Any, Any]:
    """The real and the imaginary plane of `[..., 2]`."""
    return value[..., 0], value[..., 1]


def like(real: Any, other: Any, xp: ModuleType = jnp) -> Any:
    """`real` in the dtype of `other`, complex where that is: promotion is always explicit."""
    return real.astype(other.dtype) if xp is jnp else real


def batched(value: Array, ndim: int) -> Array:
    """Lead `value` with unit axes up to `ndim` axes: explicit rank promotion."""
    return value.reshape((1,) * (ndim - value.ndim) + value.shape)


def complex_normal(key: Key, shape: tuple[int, ...], dtype: DType) -> Array:
    """Complex N(0, 1), half the variance in each part, as `[..., 2]`."""
    return jax.random.normal(key, (*shape, 2), dtype) * jnp.asarray(math.sqrt(0.5), dtype)


def repeat_heads(value: Any, heads: int, xp: ModuleType = jnp) -> Any:
    """Copy what n_ssm systems share to all heads: `[n_ssm, ...]` to `[heads, ...]`."""
    return value if value.shape[0] == heads else xp.repeat(value, heads // value.shape[0], axis=0)


def check_layer_sizes(
    heads: int, n_ssm: int | None, dt_min: float, dt_max: float, dtype: DType
) -> tuple[int, int]:
    """Check what every family's `init_params` takes; return heads and n_ssm."""
    heads = check_int("heads", heads, least=1)
    n_ssm = heads if n_ssm is None else check_int("n_ssm", n_ssm, least=1)
    if heads % n_ssm:
        raise ValueError(f"n_ssm must divide heads = {heads}; got {n_ssm}.")
    check_real("dt_min", dt_min, above=0.0)
    check_real("dt_max", dt_max, above=0.0)
    if not dt_min < dt_max:
        raise ValueError(f"dt_min must be less than dt_max = {dt_max}; got {dt_min}.")
    if jnp.dtype(dtype) not in (jnp.dtype("float32"), jnp.dtype("float64")):
        raise TypeError(f"dtype must be float32 or float64; got {jnp.dtype(dtype).name}.")
    return heads, n_ssm


def draw_log_step(
    key: Key, shape: tuple[int, ...], dt_min: float, dt_max: float, dtype: DType
) -> Array:
    """log ε, uniform between log dt_min and log dt_max."""
    return jax.random.uniform(key, shape, dtype, math.log(dt_min), math.log(dt_max))


def steps(params: dict[str, Any], heads: int, rate: Any, xp: ModuleType = jnp) -> Any:
    """ε `[heads, 1]`, or `[heads, modes]` where every mode has its own, times the rate."""
    log_step = params["log_step"]
    step = xp.exp(log_step) * xp.asarray(rate, log_step.dtype)
    return step[:, None] if step.ndim == 1 else step


def check_length(name: str, length: Any) -> int:
    """`length` as an `int` of at least 1."""
    return check_int(name, length, least=1)


def check_rate(rate: Any) -> Any:
    """A sampling rate ratio: positive, or traced."""
    return check_real("rate", rate, above=0.0)


def check_sequence(name: str, u: Any, heads: int, *, axes: int) -> None:
    """Raise unless `u` is real with `heads` channels last and `axes` axes at least."""
    check_floating(name, u)
    if u.ndim < axes or u.shape[-1] != heads:
        wanted = "[..., length, heads]" if axes == 2 else "[..., heads]"
        raise ValueError(
            f"{name} must have shape {wanted} with heads = {heads}; got {tuple(u.shape)}."
        )


def check_state(state: Any, u_batch: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise unless `state` is `[*u_batch, *shape]`."""
    if tuple(state.shape) != (*u_batch, *shape):
        raise ValueError(
            f"state must have shape {(*u_batch, *shape)} to go with the input; "
            f"got {tuple(state.shape)}."
        )


def on_host(params: dict[str, Any]) -> bool:
    """Whether every parameter is concrete, so that float64 on the host is possible."""
    return not any(is_traced(value) for value in params.values())


def host(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The parameters in NumPy float64."""
    return {name: np.asarray(value, np.float64) for name, value in params.items()}


class Chunk(NamedTuple):
    """A stretch of `length` steps of one linear system, everything precomputed.

    Attributes:
      kernel: K_0 … K_{length−1}, `[heads, length]`, the skip included in K_0.
      observe: State before the chunk to its free response `[..., length, heads]`.
      collect: Inputs `[..., length, heads]` to the state that they leave behind.
      advance: State before the chunk to what is left of it after.
    """

    kernel: Array
    observe: Callable[[Array], Array]
    collect: Callable[[Array], Array]
    advance: Callable[[Array], Array]


def run_chunks(
    chunk: Callable[[int], Chunk], state: Array, u: Array, chunk_size: int
) -> tuple[Array, Array]:
    """Outputs and last state of a linear system, `chunk_size` steps at a time.

    Inside a chunk everything is a matrix product, so the result does not depend on where the
    sequence is cut but for rounding.
    """
    length = u.shape[-2]
    whole, rest = divmod(length, chunk_size)

    def apply(part: Chunk, state: Array, u: Array) -> tuple[Array, Array]:
        size = u.shape[-2]
        lag = np.arange(size)[:, None] - np.arange(size)[None, :]
        toeplitz = jnp.where(lag >= 0, part.kernel[:, np.maximum(lag, 0)], 0)
        forced = jnp.einsum("hij,...jh->...ih", toeplitz, u, precision=jax.lax.Precision.HIGHEST)
        return forced + part.observe(state), part.advance(state) + part.collect(u)

    outputs = []
    if whole:
        part = chunk(chunk_size)
        blocks = u[..., : whole * chunk_size, :]
        blocks = blocks.reshape(*u.shape[:-2], whole, chunk_size, u.shape[-1])

        def body(state, block):
            y, state = apply(part, state, block)
            return state, y

        state, y = jax.lax.scan(body, state, jnp.moveaxis(blocks, -3, 0))
        outputs.append(jnp.moveaxis(y, 0, -3).reshape(*u.shape[:-2], -1, u.shape[-1]))
    if rest:
        y, state = apply(chunk(rest), state, u[..., whole * chunk_size :, :])
        outputs.append(y)
    if not outputs:
        return u, state
    return jnp.concatenate(outputs, axis=-2) if len(outputs) > 1 else outputs[0], state
