"""S4: diagonal-plus-low-rank state matrices, the Cauchy kernel, and the O(N) recurrent step.

Per channel `x' = A x + B u`, `y = C x + D u` with `A = Λ − Σ_r P_r P_r^*`, discretised by the
bilinear rule with step ε: `Ā = (I − εA/2)^{-1}(I + εA/2)`, `B̄ = (I − εA/2)^{-1} ε B`. C is not
conjugated; one member of each conjugate pair is held, so that `y_k = 2 Re Σ_n C_n x_{k,n} + D u_k`.

What is trained in the place of C is `C̃ = C (I − Ā^L)` at one fixed length L, since the generating
function of the kernel truncated to L steps is `C̃ (I − zĀ)^{-1} B̄` at the L-th roots of unity.

Parameters are a dict of real arrays (`modes` = N/2; n_ssm divides heads):

| key | shape | meaning |
|---|---|---|
| `log_neg_re` | `[n_ssm, modes]` | θ with Re Λ = −exp θ (or another `stability`) |
| `im` | `[n_ssm, modes]` | Im Λ |
| `p` | `[n_ssm, rank, modes, 2]` | P, real and imaginary part last |
| `b` | `[n_ssm, modes, 2]` | B |
| `c` | `[heads, modes, 2]` | C̃ at the length `l_max` |
| `log_step` | `[heads]` or `[heads, modes]` | log ε; one for each mode if untied |
| `d` | `[heads]` | D |

Sources: Gu, Goel, Ré 2021 (arXiv 2111.00396); Goel, Gu, Donahue, Ré 2022 (2202.09729) for the
stable form `Λ − PP^*`; posts 10162 and 10180 on kexue.fm.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxkit_kernels.cauchy import dplr_generating_function

from jaxkit._checks import check_int, check_real
from jaxkit._typing import Array, Complex, DType, Float, Key, Params
from jaxkit.ssm import _modes as modes
from jaxkit.ssm import init as inits

__all__ = [
    "System",
    "change_length",
    "change_rate",
    "discretize",
    "double_length",
    "free_response",
    "from_truncated",
    "init_params",
    "init_state",
    "kernel",
    "prefill",
    "step",
    "to_truncated",
    "transition",
]


class System(NamedTuple):
    """A discretised DPLR system, ready to step. `(I − εA/2)^{-1} v = D v − left · 2Re Σ right v`.

    Attributes:
      inverse: D = 1/(1 − εΛ/2).
      left: Column factors of the Woodbury correction.
      right: Row factors, `P̄ D`.
      input: εB.
      output: C, for stepping (not C̃).
      skip: D of the feed-through.
    """

    inverse: Complex[Array, "heads modes"]
    left: Complex[Array, "heads rank modes"]
    right: Complex[Array, "heads rank modes"]
    input: Complex[Array, "heads modes"]
    output: Complex[Array, "heads modes"]
    skip: Float[Array, " heads"]


def init_params(
    key: Key,
    heads: int,
    state_size: int,
    *,
    l_max: int,
    init: str | inits.DPLR = "legs",
    n_ssm: int | None = None,
    dt_min: float = 1e-3,
    dt_max: float = 1e-1,
    tie_step: bool = True,
    stability: str = "exp",
    dtype: DType = jnp.float32,
) -> Params:
    """Initial parameters of `heads` DPLR systems.

    Λ, P and B as `jaxkit.ssm.init.dplr` gives them, C complex N(0, 1) turned into C̃ at `l_max`,
    D ~ N(0, 1), log ε uniform on [log dt_min, log dt_max]. The memory is about 1/ε steps, so choose
    `dt_min` up to 1/length. `legt`, `fout` and `lagt` have Re Λ = 0, which no stability
    parametrization contains: they start at Re Λ = −1e-4.

    Args:
      key: A random key.
      heads: Number of channels.
      state_size: N, even.
      l_max: The length at which C̃ is defined.
      init: One of `jaxkit.ssm.init.DPLR_INITS`, or a `DPLR` triple with Re Λ < 0.
      n_ssm: Number of different (Λ, P, B), shared by heads / n_ssm channels each. Default: heads.
      dt_min: Smallest initial step.
      dt_max: Largest initial step.
      tie_step: One step for each channel; otherwise one for each of its modes.
      stability: How Re Λ < 0 is kept: `exp`, `softplus` or `relu`.
      dtype: float32 or float64.

    Returns:
      The parameters, as the module docstring lists them.

    Raises:
      ValueError: If `state_size` is odd, `l_max` below 1, `dt_min` not in (0, dt_max), `n_ssm` no
        divisor of `heads`, a name unknown, or a given Re Λ not negative.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 3, 8, l_max=16)
      >>> print(kernel(params, 16).shape)
      (3, 16)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396); post 10162.
    """
    heads, n_ssm = modes.check_layer_sizes(heads, n_ssm, dt_min, dt_max, dtype)
    size = inits.check_state_size(state_size)
    modes.check_length("l_max", l_max)
    key_c, key_d, key_step, key_a, key_p, key_b = jax.random.split(key, 6)
    half = size // 2
    params: Params = {}
    if isinstance(init, str) and init == "random":
        normal = jax.random.normal(key_a, (2, n_ssm, half), dtype)
        params["log_neg_re"] = modes.inverse_negative_real(-jnp.exp(normal[0]), stability, jnp)
        params["im"] = jnp.abs(normal[1])
        params["p"] = modes.complex_normal(key_p, (n_ssm, 1, half), dtype)
        params["b"] = modes.complex_normal(key_b, (n_ssm, half), dtype)
    else:
        named = isinstance(init, str)
        system = inits.dplr(init, size) if isinstance(init, str) else init
        _check_system(system, half)
        theta = modes.real_part_parameter(system.eigenvalues, n_ssm, stability, dtype, named=named)
        params["log_neg_re"] = theta
        params["im"] = jnp.tile(jnp.asarray(system.eigenvalues.imag, dtype), (n_ssm, 1))
        params["p"] = jnp.tile(modes.pair(system.low_rank, dtype), (n_ssm, 1, 1, 1))
        params["b"] = jnp.tile(modes.pair(system.input, dtype), (n_ssm, 1, 1))
    params["c"] = modes.complex_normal(key_c, (heads, half), dtype)
    shape = (heads,) if tie_step else (heads, half)
    params["log_step"] = modes.draw_log_step(key_step, shape, dt_min, dt_max, dtype)
    params["d"] = jax.random.normal(key_d, (heads,), dtype)
    return to_truncated(params, length=l_max, stability=stability)


def _check_system(system: inits.DPLR, half: int) -> None:
    if not isinstance(system, inits.DPLR):
        raise TypeError(f"init must be a name or a DPLR triple; got {system!r}.")
    shapes = tuple(np.shape(part) for part in system)
    good = (
        shapes[0] == (half,)
        and shapes[2] == (half,)
        and len(shapes[1]) == 2
        and shapes[1][1] == half
    )
    if not good:
        raise ValueError(
            f"init must have parts of shape [{half}], [rank, {half}], [{half}]; got {shapes}."
        )


class _Continuous(NamedTuple):
    """εΛ `[H, M]`, εP and P `[H, R, M]`, εB and C `[H, M]`: everything for each head."""

    scaled: Any
    scaled_low_rank: Any
    low_rank: Any
    input: Any
    output: Any


def _continuous(
    params: dict[str, Any],
    rate: Any,
    stability: str,
    band_limit: float | None = None,
    xp: ModuleType = jnp,
) -> _Continuous:
    heads = params["c"].shape[0]
    eps = modes.steps(params, heads, rate, xp)
    re = modes.repeat_heads(modes.negative_real(params["log_neg_re"], stability, xp), heads, xp)
    im = modes.repeat_heads(params["im"], heads, xp)
    p = modes.repeat_heads(modes.to_complex(params["p"], xp), heads, xp)
    b = modes.repeat_heads(modes.to_complex(params["b"], xp), heads, xp)
    c = modes.to_complex(params["c"], xp)
    if band_limit is not None:
        check_real("band_limit", band_limit, above=0.0)
        c = xp.where(eps * xp.abs(im) < np.pi * band_limit, c, xp.zeros_like(c))
    scaled = modes.join(eps * re, eps * im, xp)
    factor = modes.like(eps, scaled, xp)
    return _Continuous(scaled, factor[:, None, :] * p, p, factor * b, c)


def _woodbury(parts: _Continuous, xp: ModuleType = jnp) -> tuple[Any, Any, Any]:
    """D, left and right of `(I − εA/2)^{-1} v = D v − Σ_r left_r 2Re Σ_n right_rn v_n`."""
    inverse = 1.0 / (1.0 - 0.5 * parts.scaled)
    right = xp.conj(parts.low_rank) * inverse[:, None, :]
    half_p = 0.5 * parts.scaled_low_rank
    gram = 2.0 * xp.real(xp.einsum("hrm,hsm->hrs", right, half_p))
    rank = gram.shape[-1]
    column = inverse[:, None, :] * half_p
    if rank == 1:
        return inverse, column / modes.like(1.0 + gram, column, xp), right
    weights = xp.linalg.inv(xp.eye(rank, dtype=gram.dtype)[None] + gram)
    return inverse, xp.einsum("hsm,hsr->hrm", column, modes.like(weights, column, xp)), right


def _dense(inverse: Any, left: Any, right: Any, xp: ModuleType = jnp) -> Any:
    """Ā as a real matrix `[H, N, N]` on (Re x, Im x).

    With P ≠ 0 the powers of Ā mix the two members of a pair, so they are not products on the held
    half; on the real and imaginary parts they are, in real arithmetic.
    """
    diagonal = 2.0 * inverse - 1.0
    eye = xp.eye(diagonal.shape[-1], dtype=xp.real(diagonal).dtype)[None]
    real, imag = xp.real(diagonal)[:, :, None] * eye, xp.imag(diagonal)[:, :, None] * eye
    blocks = xp.concatenate(
        [xp.concatenate([real, -imag], axis=2), xp.concatenate([imag, real], axis=2)], axis=1
    )
    columns = xp.concatenate([xp.real(left), xp.imag(left)], axis=-1)
    rows = 2.0 * xp.concatenate([xp.real(right), -xp.imag(right)], axis=-1)
    return blocks - 2.0 * xp.matmul(xp.swapaxes(columns, 1, 2), rows)


def _functional(c: Any, xp: ModuleType = jnp) -> Any:
    """The row f with `f · (Re x, Im x) = 2 Re Σ C x`."""
    return 2.0 * xp.concatenate([xp.real(c), -xp.imag(c)], axis=-1)


def _from_functional(row: Any, xp: ModuleType = jnp) -> Any:
    """C as `[..., modes, 2]` of a row made by `_functional`."""
    half = row.shape[-1] // 2
    return 0.5 * xp.stack([row[..., :half], -row[..., half:]], axis=-1)


def _power_minus(matrix: Any, length: int, xp: ModuleType) -> Any:
    """`I − matrix^length`."""
    eye = xp.eye(matrix.shape[-1], dtype=matrix.dtype)[None]
    if xp is np:
        return eye - np.linalg.matrix_power(matrix, length)
    with jax.default_matmul_precision("highest"):
        return eye - jnp.linalg.matrix_power(matrix, length)


def _convert(params: Params, stability: str, change: Any) -> Params:
    """Replace `c` by `change(row, matrix_of, xp)`, in float64 on the host if values are known."""
    dtype = params["c"].dtype
    xp: ModuleType = np if modes.on_host(params) else jnp
    values = modes.host(params) if xp is np else params

    def matrix_of(rate: Any) -> Any:
        return _dense(*_woodbury(_continuous(values, rate, stability, xp=xp), xp), xp)

    row = _functional(modes.to_complex(values["c"], xp), xp)
    row = change(row, matrix_of, xp)
    return {**params, "c": jnp.asarray(_from_functional(row, xp), dtype)}


def _times(row: Any, matrix: Any, xp: ModuleType) -> Any:
    if xp is np:
        return np.einsum("hi,hij->hj", row, matrix)
    return jnp.einsum("hi,hij->hj", row, matrix, precision=jax.lax.Precision.HIGHEST)


def _divide(row: Any, matrix: Any, xp: ModuleType) -> Any:
    """`row · matrix^{-1}`: the transposed system."""
    return xp.linalg.solve(xp.swapaxes(matrix, 1, 2), row[..., None])[..., 0]


def to_truncated(params: Params, *, length: int, rate: Any = 1.0, stability: str = "exp") -> Params:
    """Replace C by `C̃ = C (I − Ā^L)`.

    Concrete parameters are converted in float64 on the host, traced ones in their own dtype.
    Time O(N³ log L) for each head.

    Args:
      params: Parameters whose `c` holds C.
      length: L.
      rate: ε is multiplied by it.
      stability: The parametrization of Re Λ.

    Returns:
      The parameters with C̃ at `length` in `c`.

    Raises:
      ValueError: If `length` is below 1 or `rate` not positive.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 2, 4, l_max=8)
      >>> again = to_truncated(from_truncated(params, length=8), length=8)
      >>> print(bool(abs(again["c"] - params["c"]).max() < 1e-5))
      True

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396, app. C.3); post 10162.
    """
    modes.check_length("length", length)
    modes.check_rate(rate)
    return _convert(
        params,
        stability,
        lambda row, matrix, xp: _times(row, _power_minus(matrix(rate), length, xp), xp),
    )


def from_truncated(
    params: Params, *, length: int, rate: Any = 1.0, stability: str = "exp"
) -> Params:
    """Replace C̃ at `length` by C: solve the transposed system `C (I − Ā^L) = C̃`.

    Args:
      params: Parameters whose `c` holds C̃ at `length`.
      length: L.
      rate: ε is multiplied by it.
      stability: The parametrization of Re Λ.

    Returns:
      The parameters with C in `c`.

    Raises:
      ValueError: If `length` is below 1 or `rate` not positive.

    Example: see `to_truncated`.

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396, app. C.3); post 10162.
    """
    modes.check_length("length", length)
    modes.check_rate(rate)
    return _convert(
        params,
        stability,
        lambda row, matrix, xp: _divide(row, _power_minus(matrix(rate), length, xp), xp),
    )


def double_length(params: Params, *, length: int, stability: str = "exp") -> Params:
    """C̃ at 2L from C̃ at L: `C̃ ← C̃ (I + Ā^L)`. No system to solve.

    Args:
      params: Parameters whose `c` holds C̃ at `length`.
      length: L.
      stability: The parametrization of Re Λ.

    Returns:
      The parameters with C̃ at `2 * length`.

    Raises:
      ValueError: If `length` is below 1.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 2, 4, l_max=8)
      >>> print(kernel(double_length(params, length=8), 16).shape)
      (2, 16)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396); post 10162.
    """
    modes.check_length("length", length)

    def change(row, matrix, xp):
        return 2.0 * row - _times(row, _power_minus(matrix(1.0), length, xp), xp)

    return _convert(params, stability, change)


def change_length(
    params: Params, *, length: int, new_length: int, stability: str = "exp"
) -> Params:
    """C̃ at any other length, through C.

    Args:
      params: Parameters whose `c` holds C̃ at `length`.
      length: L.
      new_length: The length wanted.
      stability: The parametrization of Re Λ.

    Returns:
      The parameters with C̃ at `new_length`; the kernel is the same, longer or shorter.

    Raises:
      ValueError: If a length is below 1.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 2, 4, l_max=8)
      >>> print(kernel(change_length(params, length=8, new_length=13), 13).shape)
      (2, 13)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396); post 10162.
    """
    modes.check_length("length", length)
    modes.check_length("new_length", new_length)

    def change(row, matrix, xp):
        dense = matrix(1.0)
        row = _divide(row, _power_minus(dense, length, xp), xp)
        return _times(row, _power_minus(dense, new_length, xp), xp)

    return _convert(params, stability, change)


def change_rate(
    params: Params,
    *,
    length: int,
    rate: Any,
    new_length: int | None = None,
    stability: str = "exp",
) -> Params:
    """The same continuous system sampled `rate` times more sparsely: ε → rate · ε.

    C̃ is tied to ε, so it goes back to C with the old step and to C̃ again with the new one. (The
    reference code reuses C̃ with L/rate nodes, which is approximate.)

    Args:
      params: Parameters whose `c` holds C̃ at `length`.
      length: L.
      rate: Positive ratio; 2 halves the number of samples of the same signal.
      new_length: The length at which the new C̃ is wanted. Default: `length`.
      stability: The parametrization of Re Λ.

    Returns:
      Parameters with the new step and C̃ at `new_length`.

    Raises:
      ValueError: If a length is below 1 or `rate` not positive.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 2, 4, l_max=8)
      >>> half = change_rate(params, length=8, rate=2.0, new_length=4)
      >>> print(kernel(half, 4).shape)
      (2, 4)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396, sec. 4.3); post 10162.
    """
    modes.check_length("length", length)
    modes.check_rate(rate)
    new_length = length if new_length is None else modes.check_length("new_length", new_length)

    def change(row, matrix, xp):
        row = _divide(row, _power_minus(matrix(1.0), length, xp), xp)
        return _times(row, _power_minus(matrix(rate), new_length, xp), xp)

    changed = _convert(params, stability, change)
    log_step = params["log_step"]
    return {**changed, "log_step": log_step + jnp.log(jnp.asarray(rate, log_step.dtype))}


def _is_one(rate: Any) -> bool:
    return isinstance(rate, int | float) and rate == 1


def _generate(parts: _Continuous, vector: Any, length: int, implementation: Any) -> Array:
    """`C̃ (I − zĀ)^{-1} (I − εA/2)^{-1} vector` on the unit circle, back in time: `[H, length]`."""

    def both(value: Array) -> tuple[Array, Array]:
        return jnp.real(value), jnp.imag(value)

    p, ep = parts.low_rank, parts.scaled_low_rank
    conj = jnp.conj(p)
    if p.shape[1] == 1:
        pp: Any = jnp.real(conj[:, :, None, :] * ep[:, None, :, :])
    else:
        pp = both(conj[:, :, None, :] * ep[:, None, :, :])
    re, im = dplr_generating_function(
        -0.5 * jnp.real(parts.scaled),
        0.5 * jnp.imag(parts.scaled),
        both(parts.output * vector),
        both(parts.output[:, None, :] * ep),
        both(conj * vector[:, None, :]),
        pp,
        length=length,
        implementation=implementation,
    )
    return jnp.fft.irfft(jax.lax.complex(re, im), n=length, axis=-1)


def kernel(
    params: Params,
    length: int,
    *,
    rate: Any = 1.0,
    l_max: int | None = None,
    band_limit: float | None = None,
    stability: str = "exp",
    implementation: Any = "auto",
) -> Float[Array, "heads length"]:
    """The convolution kernel `K_l = 2 Re Σ C Ā^l B̄` (without D).

    At the nodes `z_l = e^{−2πil/L}` the truncated generating function is a few Cauchy sums with a
    Woodbury correction, free of the singularity at z = −1 of the textbook form; the kernel is its
    inverse real FFT. Time O(N·L) elementwise and O(L log L), memory O(N + L) where fused.

    Args:
      params: Parameters whose `c` holds C̃ at `l_max`.
      length: Number of steps wanted, up to `l_max`.
      rate: ε is multiplied by it, exactly (C̃ is re-derived).
      l_max: The length at which C̃ is defined. Default: `length`.
      band_limit: Zero C̃ where ε|Im Λ|/2π ≥ ½ · band_limit.
      stability: The parametrization of Re Λ.
      implementation: Which Cauchy kernel; see `jaxkit_kernels.cauchy`.

    Returns:
      K `[heads, length]`.

    Raises:
      ValueError: If `length` is below 1 or above `l_max`, `rate` or `band_limit` not positive.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 3, 8, l_max=16)
      >>> print(kernel(params, 10, l_max=16).shape, kernel(params, 8, rate=2.0, l_max=16).shape)
      (3, 10) (3, 8)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396, alg. 1); posts 10162, 10180.
    """
    params, length, l_max = _prepare(params, length, rate, l_max, band_limit, stability)
    parts = _continuous(params, 1.0, stability)
    return _generate(parts, parts.input, l_max, implementation)[:, :length]


def _prepare(
    params: Params,
    length: int,
    rate: Any,
    l_max: int | None,
    band_limit: float | None,
    stability: str,
) -> tuple[Params, int, int]:
    """Parameters at rate 1 with C̃ at the returned l_max, after all checks."""
    length = modes.check_length("length", length)
    l_max = length if l_max is None else modes.check_length("l_max", l_max)
    modes.check_rate(rate)
    if length > l_max and _is_one(rate):
        raise ValueError(
            f"length must be at most l_max = {l_max}, the length at which C̃ is defined; got "
            f"{length}. Re-derive C̃ with double_length or change_length."
        )
    params = _limit(params, rate, band_limit, stability)
    if not _is_one(rate):
        params = change_rate(
            params, length=l_max, rate=rate, new_length=length, stability=stability
        )
        l_max = length
    return params, length, l_max


def _limit(params: Params, rate: Any, band_limit: float | None, stability: str) -> Params:
    if band_limit is None:
        return params
    c = _continuous(params, rate, stability, band_limit).output
    return {**params, "c": jnp.stack([jnp.real(c), jnp.imag(c)], axis=-1)}


def discretize(
    params: Params,
    *,
    l_max: int,
    rate: Any = 1.0,
    band_limit: float | None = None,
    stability: str = "exp",
) -> System:
    """The recurrence that the kernel stands for: one Woodbury solve a step, C from C̃.

    Args:
      params: Parameters whose `c` holds C̃ at `l_max`.
      l_max: The length at which C̃ is defined.
      rate: ε is multiplied by it.
      band_limit: As in `kernel`.
      stability: The parametrization of Re Λ.

    Returns:
      A `System` for `step` and `prefill`. Deriving it costs O(N³ log L) for each head, once.

    Raises:
      ValueError: If `l_max` is below 1, `rate` or `band_limit` not positive.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 3, 8, l_max=16)
      >>> print(discretize(params, l_max=16).output.shape)
      (3, 4)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396, app. C.2); post 10162.
    """
    modes.check_length("l_max", l_max)
    modes.check_rate(rate)
    params = _limit(params, rate, band_limit, stability)
    params = from_truncated(params, length=l_max, stability=stability)
    parts = _continuous(params, rate, stability)
    inverse, left, right = _woodbury(parts)
    return System(inverse, left, right, parts.input, parts.output, params["d"])


def init_state(
    heads: int,
    state_size: int,
    *,
    batch_shape: tuple[int, ...] = (),
    dtype: DType = jnp.float32,
) -> Complex[Array, "*batch heads modes"]:
    """The zero state.

    Args:
      heads: Number of channels.
      state_size: N, even.
      batch_shape: Leading axes.
      dtype: Real dtype of the parameters.

    Returns:
      Complex zeros `[*batch_shape, heads, N/2]`.

    Raises:
      ValueError: If `heads` is below 1 or `state_size` odd.

    Example:
      >>> print(init_state(3, 8, batch_shape=(2,)).shape)
      (2, 3, 4)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396).
    """
    size = inits.check_state_size(state_size)
    heads = check_int("heads", heads, least=1)
    return jnp.zeros(
        (*batch_shape, heads, size // 2), np.result_type(jnp.dtype(dtype), np.complex64)
    )


def _solve(system: System, vector: Array) -> Array:
    """`(I − εA/2)^{-1} vector` for `[..., heads, modes]`."""
    inverse = modes.batched(system.inverse, vector.ndim)
    reads = 2.0 * jnp.real(
        jnp.sum(modes.batched(system.right, vector.ndim + 1) * vector[..., None, :], axis=-1)
    )
    reads = modes.like(reads, vector)
    back = jnp.sum(modes.batched(system.left, vector.ndim + 1) * reads[..., None], axis=-2)
    return inverse * vector - back


def step(
    system: System, state: Complex[Array, "*batch heads modes"], u: Float[Array, "*batch heads"]
) -> tuple[Float[Array, "*batch heads"], Complex[Array, "*batch heads modes"]]:
    """One step in O(N): `x ← Ā x + B̄ u`, `y = 2 Re Σ C x + D u`.

    Since `Ā = 2 (I − εA/2)^{-1} − I`, the new state is `(I − εA/2)^{-1}(2x + εB u) − x`.

    Args:
      system: From `discretize`.
      state: State before the step.
      u: Input of every channel.

    Returns:
      `(y, state)`, y in the dtype of `u`.

    Raises:
      TypeError: If `u` is not real.
      ValueError: If `u` has another number of channels, or `state` another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = init_params(jax.random.key(0), 3, 8, l_max=16)
      >>> system = discretize(params, l_max=16)
      >>> y, state = step(system, init_state(3, 8), jnp.ones(3))
      >>> print(y.shape, state.shape)
      (3,) (3, 4)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396, app. C.2); post 10162.
    """
    modes.check_sequence("u", u, system.skip.shape[0], axes=1)
    modes.check_state(state, u.shape[:-1], system.output.shape)
    x = u.astype(system.skip.dtype)
    drive = modes.batched(system.input, state.ndim) * modes.like(x, state)[..., None]
    state = _solve(system, 2.0 * state + drive) - state
    y = 2.0 * jnp.real(jnp.sum(modes.batched(system.output, state.ndim) * state, axis=-1))
    return (y + modes.batched(system.skip, x.ndim) * x).astype(u.dtype), state


def transition(system: System) -> Float[Array, "heads state state"]:
    """Ā as a dense real matrix on (Re x, Im x); for powers and for tests.

    Args:
      system: From `discretize`.

    Returns:
      `[heads, N, N]`.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 3, 8, l_max=16)
      >>> print(transition(discretize(params, l_max=16)).shape)
      (3, 8, 8)

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396).
    """
    return _dense(system.inverse, system.left, system.right)


def _chunk(system: System, length: int) -> modes.Chunk:
    """Krylov matrices of `length` steps, each doubled from the one of half the length."""
    dense = transition(system)
    start = _solve(system, system.input)
    columns = jnp.concatenate([jnp.real(start), jnp.imag(start)], axis=-1)[..., None]
    matmul = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    rows = matmul(_functional(system.output)[:, None, :], dense)
    power = dense
    while columns.shape[-1] < length:
        columns = jnp.concatenate([columns, matmul(power, columns)], axis=-1)
        rows = jnp.concatenate([rows, matmul(rows, power)], axis=1)
        power = matmul(power, power)
    columns, rows = columns[..., :length], rows[:, :length]
    last = jnp.linalg.matrix_power(dense, length)
    taps = jnp.einsum(
        "hi,hij->hj", _functional(system.output), columns, precision=jax.lax.Precision.HIGHEST
    )
    taps = taps.at[:, 0].add(system.skip)
    half = dense.shape[-1] // 2

    def real(state: Array) -> Array:
        return jnp.concatenate([jnp.real(state), jnp.imag(state)], axis=-1)

    def complex_(state: Array) -> Array:
        return jax.lax.complex(state[..., :half], state[..., half:])

    def product(pattern: str, *arrays: Array) -> Array:
        return jnp.einsum(pattern, *arrays, precision=jax.lax.Precision.HIGHEST)

    return modes.Chunk(
        taps,
        lambda state: product("hln,...hn->...lh", rows, real(state)),
        lambda u: complex_(product("hnl,...lh->...hn", columns[..., ::-1], u)),
        lambda state: complex_(product("hij,...hj->...hi", last, real(state))),
    )


def prefill(
    system: System,
    state: Complex[Array, "*batch heads modes"],
    u: Float[Array, "*batch length heads"],
    *,
    chunk_size: int = 64,
) -> tuple[Float[Array, "*batch length heads"], Complex[Array, "*batch heads modes"]]:
    """Outputs and exact final state for a stretch of input, from any state.

    Chunk by chunk, with the Krylov matrices `[B̄, ĀB̄, …]` and `[CĀ; CĀ²; …]` of one chunk: matrix
    products in the place of steps. Any split of a sequence gives the same outputs and state.

    Args:
      system: From `discretize`.
      state: State before the first input.
      u: Inputs.
      chunk_size: Steps a chunk; time O(L (chunk_size + N)) for each head and batch entry, and
        O(N² chunk_size) once.

    Returns:
      `(y, state)`, y in the dtype of `u`.

    Raises:
      TypeError: If `u` is not real.
      ValueError: If shapes do not fit or `chunk_size` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = init_params(jax.random.key(0), 3, 8, l_max=16)
      >>> system = discretize(params, l_max=16)
      >>> y, state = prefill(system, init_state(3, 8, batch_shape=(2,)), jnp.ones((2, 5, 3)))
      >>> print(y.shape, state.shape)
      (2, 5, 3) (2, 3, 4)

    Source: post 10162; Gu, Goel, Ré 2021 (arXiv 2111.00396).
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
    state: Complex[Array, "*batch heads modes"],
    length: int,
    *,
    l_max: int | None = None,
    stability: str = "exp",
    implementation: Any = "auto",
) -> Float[Array, "*batch length heads"]:
    """What a state `x_0` alone puts out: `K^state_l = C Ā^{l+1} x_0`.

    It is the kernel with B replaced by `(1/ε)(I + εA/2) x_0`, so that B̄ becomes `Ā x_0`; a long
    prompt after a state is then the convolution plus this.

    Args:
      params: Parameters whose `c` holds C̃ at `l_max`.
      state: State before the first step.
      length: Number of steps, up to `l_max`.
      l_max: The length at which C̃ is defined. Default: `length`.
      stability: The parametrization of Re Λ.
      implementation: Which Cauchy kernel.

    Returns:
      `[*batch, length, heads]`.

    Raises:
      ValueError: If `length` is below 1 or above `l_max`, or `state` has another shape.

    Example:
      >>> import jax
      >>> params = init_params(jax.random.key(0), 3, 8, l_max=16)
      >>> print(free_response(params, init_state(3, 8, batch_shape=(2,)), 16).shape)
      (2, 16, 3)

    Source: post 10162.
    """
    params, length, l_max = _prepare(params, length, 1.0, l_max, None, stability)
    parts = _continuous(params, 1.0, stability)
    batch = state.shape[:-2]
    modes.check_state(state, batch, parts.output.shape)
    reads = 2.0 * jnp.real(
        jnp.sum(
            modes.batched(jnp.conj(parts.low_rank), state.ndim + 1) * state[..., None, :], axis=-1
        )
    )
    reads = modes.like(reads, state)
    back = jnp.sum(modes.batched(parts.scaled_low_rank, state.ndim + 1) * reads[..., None], axis=-2)
    vector = state + 0.5 * (modes.batched(parts.scaled, state.ndim) * state - back)
    flat = vector.reshape(-1, *vector.shape[-2:])
    response = jax.vmap(lambda v: _generate(parts, v, l_max, implementation))(flat)
    response = jnp.swapaxes(response[..., :length], 1, 2)
    return response.reshape(*batch, length, parts.output.shape[0])
