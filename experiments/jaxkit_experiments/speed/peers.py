"""Other ways to compute the same S4 kernel, as tutorials and first drafts do, to compare with.

All take one parameter dictionary of real arrays (`s4_problem`) and give `[heads, length]`, so
that every pair of forms can be checked against each other before it is timed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxkit_kernels._dispatch import Implementation
from jaxkit_kernels.cauchy import dplr_generating_function
from jaxkit_kernels.vandermonde import vandermonde

from jaxkit import _checks
from jaxkit._typing import Array, Float, Params

__all__ = [
    "cast",
    "dplr_broadcast",
    "dplr_fused",
    "power_iteration",
    "power_operands",
    "power_operands_host",
    "rtf",
    "rtf_problem",
    "s4_problem",
    "vandermonde_direct",
    "vandermonde_operands",
    "vandermonde_two_level",
]


def _legs(state: int) -> tuple[np.ndarray, np.ndarray]:
    root = np.sqrt(2 * np.arange(state) + 1.0)
    a = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(state) + 1.0)
    return a, root


def _dense(problem: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear Abar [heads, state, state] and Bbar [heads, state] of LegS in its real basis."""
    step = np.exp(problem["log_step"])
    state = 2 * problem["lam_re"].shape[-1]
    a, b = _legs(state)
    eye = np.eye(state)
    left = eye - step[:, None, None] / 2 * a
    bar_a = np.linalg.solve(left, eye + step[:, None, None] / 2 * a)
    bar_b = np.linalg.solve(left, (step[:, None] * b)[..., None])[..., 0]
    return bar_a, bar_b


def s4_problem(
    heads: int, state: int, length: int, *, seed: int = 0, derive_c_tilde: bool = True
) -> dict[str, np.ndarray]:
    r"""Random S4-LegS channels in every form that the candidates need, in float64 on the host.

    The matrix is LegS, split as $A + PP^T + I/2 = S$ skew and diagonalised; $C$ is normal,
    $\log \varepsilon$ uniform on $[\log 10^{-3}, \log 10^{-1}]$, and
    $\tilde C = C (I - \bar A^L)$ with the bilinear $\bar A$.

    Args:
        heads: channels H.
        state: N, even.
        length: L, to which `ct` is tied.
        seed: of C and the steps.
        derive_c_tilde: without it `ct` is C itself, which costs the same to time and no matrix
            powers to set up.

    Returns:
        `lam_re`, `lam_im` [H, M], complex `p`, `b`, `c`, `ct` [H, M, 2] as (re, im), `log_step`
        [H] and the real `c_real` [H, N].

    Raises:
        ValueError: `heads` or `length` below one, or `state` odd.

    Example:
        >>> problem = s4_problem(2, 4, 16)
        >>> problem["lam_im"].round(4)[0].tolist()
        [0.5565, 4.6033]
    """
    _checks.check_int("heads", heads, least=1)
    _checks.check_int("length", length, least=1)
    _checks.check_int("state", state, least=2)
    if state % 2:
        raise ValueError(f"state must be even; got {state}.")
    rng = np.random.default_rng(seed)
    a, b_real = _legs(state)
    p_real = np.sqrt(np.arange(state) + 0.5)
    skew = a + np.outer(p_real, p_real) + 0.5 * np.eye(state)
    beta, vectors = np.linalg.eigh(-1j * skew)
    half = beta > 0
    lam, vectors = beta[half], vectors[:, half]
    c_real = rng.standard_normal((heads, state))
    log_step = rng.uniform(np.log(1e-3), np.log(1e-1), heads)

    def pair(value: np.ndarray) -> np.ndarray:
        value = np.broadcast_to(value, (heads, state // 2))
        return np.stack([value.real, value.imag], -1)

    problem = {
        "lam_re": np.full((heads, state // 2), -0.5),
        "lam_im": np.broadcast_to(lam, (heads, state // 2)).copy(),
        "p": pair(vectors.conj().T @ p_real),
        "b": pair(vectors.conj().T @ b_real),
        "c": pair(c_real @ vectors),
        "log_step": log_step,
        "c_real": c_real,
    }
    problem["ct"] = problem["c"]
    if derive_c_tilde:
        bar_a, _ = _dense(problem)
        last = np.linalg.matrix_power(bar_a, length)
        problem["ct"] = pair((c_real - np.einsum("hn,hnm->hm", c_real, last)) @ vectors)
    return problem


def cast(problem: dict[str, np.ndarray], dtype: str = "float32") -> Params:
    """The arrays of a problem on the device, in `dtype`.

    Example:
        >>> cast(s4_problem(1, 4, 8))["log_step"].dtype.name
        'float32'
    """
    return {name: jnp.asarray(value, dtype) for name, value in problem.items()}


def _join(pair: Array) -> Array:
    return jax.lax.complex(pair[..., 0], pair[..., 1])


def dplr_broadcast(
    params: Params, *, length: int, half: bool = True
) -> Float[Array, "heads length"]:
    r"""The tutorials' DPLR kernel: $v/(g-\lambda)$ summed under vmap over complex numbers.

    $K = \mathrm{irfft}\, \frac{2}{1+z}[k_{00} - k_{01} k_{10}/(1+k_{11})]$ with four sums
    $k = \sum_n v_n/(g-\lambda_n)$ over all N eigenvalues, $g = \frac2\varepsilon\frac{1-z}{1+z}$,
    $z_l = e^{-2\pi i l/L}$.

    Args:
        params: `s4_problem`, cast.
        length: L.
        half: the L/2 + 1 nodes that a real kernel needs; without it all L and a complex inverse
            transform, as the tutorial's own code has it.

    Returns:
        The kernel.

    Example:
        >>> dplr_broadcast(cast(s4_problem(2, 4, 16)), length=16).shape
        (2, 16)

    Source: Gu, Goel, Ré 2021 (2111.00396); the form is that of Rush and Karamcheti's tutorial.
    """
    dtype = params["lam_re"].dtype

    def both(value: Array) -> Array:
        return jnp.concatenate([value, jnp.conj(value)], -1)

    lam = both(jax.lax.complex(params["lam_re"], params["lam_im"]))
    p, b, ct = both(_join(params["p"])), both(_join(params["b"])), both(_join(params["ct"]))
    nodes = length // 2 + 1 if half else length
    turn = jnp.asarray(2 * np.pi * np.arange(nodes) / length, dtype)
    z = jax.lax.complex(jnp.cos(turn), -jnp.sin(turn))

    def cauchy(v: Array, nodes: Array, poles: Array) -> Array:
        return jax.vmap(lambda node: jnp.sum(v / (node - poles)))(nodes)

    def channel(lam: Array, p: Array, b: Array, ct: Array, step: Array) -> Array:
        nodes = (2 / step).astype(z.dtype) * ((1 - z) / (1 + z))
        k00 = cauchy(ct * b, nodes, lam)
        k01 = cauchy(ct * p, nodes, lam)
        k10 = cauchy(jnp.conj(p) * b, nodes, lam)
        k11 = cauchy(jnp.conj(p) * p, nodes, lam)
        return 2 / (1 + z) * (k00 - k01 * (1 / (1 + k11)) * k10)

    spectrum = jax.vmap(channel)(lam, p, b, ct, jnp.exp(params["log_step"]))
    return jnp.fft.irfft(spectrum, n=length) if half else jnp.fft.ifft(spectrum).real


def dplr_fused(
    params: Params, *, length: int, implementation: Implementation = "auto"
) -> Float[Array, "heads length"]:
    """The same kernel by `jaxkit_kernels.cauchy`: real arithmetic, half the modes, one pass.

    Args:
        params: `s4_problem`, cast.
        length: L.
        implementation: of the kernel.

    Returns:
        The kernel.

    Example:
        >>> dplr_fused(cast(s4_problem(2, 4, 16)), length=16).shape
        (2, 16)
    """
    step = jnp.exp(params["log_step"])[:, None]
    half = step / 2

    def product(x: Array, y: Array, *, conjugate: bool = False) -> tuple[Array, Array]:
        x_re, x_im = x[..., 0], -x[..., 1] if conjugate else x[..., 1]
        y_re, y_im = y[..., 0], y[..., 1]
        return step * (x_re * y_re - x_im * y_im), step * (x_re * y_im + x_im * y_re)

    p, b, ct = params["p"], params["b"], params["ct"]
    cp, pb = product(ct, p), product(p, b, conjugate=True)
    re, im = dplr_generating_function(
        -half * params["lam_re"],
        half * params["lam_im"],
        product(ct, b),
        (cp[0][:, None], cp[1][:, None]),
        (pb[0][:, None], pb[1][:, None]),
        (step * jnp.sum(p * p, -1))[:, None, None],
        length=length,
        implementation=implementation,
    )
    return jnp.fft.irfft(jax.lax.complex(re, im), n=length)


def power_operands_host(problem: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dense bilinear `bar_a` [H, N, N], `bar_b` and `c` [H, N], real LegS basis, float64.

    Example:
        >>> power_operands_host(s4_problem(2, 4, 16))["bar_a"].shape
        (2, 4, 4)
    """
    bar_a, bar_b = _dense(problem)
    return {"bar_a": bar_a, "bar_b": bar_b, "c": problem["c_real"]}


def power_operands(problem: dict[str, np.ndarray], dtype: str = "float32") -> Params:
    """The same on the device, in `dtype`.

    Example:
        >>> power_operands(s4_problem(2, 4, 16))["c"].dtype.name
        'float32'
    """
    return cast(power_operands_host(problem), dtype)


def power_iteration(params: Params, *, length: int) -> Float[Array, "heads length"]:
    r"""The definition: $K_l = C \bar A^l \bar B$, one matrix-vector product per step.

    Args:
        params: `power_operands`.
        length: L.

    Returns:
        The kernel.

    Example:
        >>> power_iteration(power_operands(s4_problem(2, 4, 16)), length=16).shape
        (2, 16)
    """

    def advance(x: Array, _: None) -> tuple[Array, Array]:
        return jnp.einsum("hnm,hm->hn", params["bar_a"], x), jnp.sum(params["c"] * x, -1)

    return jax.lax.scan(advance, params["bar_b"], None, length=length)[1].T


def vandermonde_operands(problem: dict[str, np.ndarray], dtype: str = "float32") -> Params:
    r"""`alpha`, `beta`, `v_re`, `v_im` [H, M] of the diagonal part alone, zero-order hold.

    Example:
        >>> sorted(vandermonde_operands(s4_problem(2, 4, 16)))
        ['alpha', 'beta', 'v_im', 'v_re']
    """
    step = np.exp(problem["log_step"])[:, None]
    lam = problem["lam_re"] + 1j * problem["lam_im"]
    b, c = (problem[name][..., 0] + 1j * problem[name][..., 1] for name in ("b", "c"))
    v = c * b * np.expm1(step * lam) / lam
    alpha, beta = -(step * lam).real, (step * lam).imag
    return cast({"alpha": alpha, "beta": beta, "v_re": v.real, "v_im": v.imag}, dtype)


def vandermonde_direct(params: Params, *, length: int) -> Float[Array, "heads length"]:
    r"""The definition $K_l = 2\sum_n e^{-\alpha l}(a\cos\beta l - b\sin\beta l)$, broadcast.

    Args:
        params: `vandermonde_operands`.
        length: L.

    Returns:
        The kernel.

    Example:
        >>> vandermonde_direct(vandermonde_operands(s4_problem(2, 4, 16)), length=16).shape
        (2, 16)

    Source: Gu, Gupta, Goel, Ré 2022 (2206.11893).
    """
    alpha, beta, a, b = (params[name][..., None] for name in ("alpha", "beta", "v_re", "v_im"))
    l = jnp.arange(length, dtype=alpha.dtype)[None, None, :]
    wave = a * jnp.cos(beta * l) - b * jnp.sin(beta * l)
    return 2 * jnp.sum(jnp.exp(-alpha * l) * wave, axis=1)


def vandermonde_two_level(
    params: Params, *, length: int, implementation: Implementation = "auto"
) -> Float[Array, "heads length"]:
    """The same by `jaxkit_kernels.vandermonde`: a matrix product over two levels of powers.

    Args:
        params: `vandermonde_operands`.
        length: L.
        implementation: of the kernel.

    Returns:
        The kernel.

    Example:
        >>> vandermonde_two_level(vandermonde_operands(s4_problem(2, 4, 16)), length=16).shape
        (2, 16)
    """
    names = ("alpha", "beta", "v_re", "v_im")
    return vandermonde(
        *(params[name] for name in names), length=length, implementation=implementation
    )


def rtf_problem(heads: int, state: int, *, seed: int = 0, dtype: str = "float32") -> Params:
    """Random rational transfer functions of order `state`: `a` with |a|_1 < 1 (stable), and `b`.

    Example:
        >>> bool((abs(rtf_problem(2, 4)["a"]).sum(-1) < 1).all())
        True
    """
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, heads, state))
    a *= 0.5 / np.sum(np.abs(a), -1, keepdims=True)
    return cast({"a": a, "b": b}, dtype)


@partial(jax.jit, static_argnames="length")
def rtf(params: Params, *, length: int) -> Float[Array, "heads length"]:
    r"""$K = \mathrm{irfft}(\mathrm{rfft}(b)/\mathrm{rfft}([1, a]))$, both padded to `length`.

    Args:
        params: `rtf_problem`.
        length: L, more than the order.

    Returns:
        The kernel.

    Example:
        >>> params = {"a": jnp.array([[-0.5]]), "b": jnp.array([[1.0]])}
        >>> (15 * rtf(params, length=4)).round(4).tolist()
        [[16.0, 8.0, 4.0, 2.0]]

    Source: Parnichkun et al. 2024 (2405.06147); kexue.fm 10180.
    """
    a, b = params["a"], params["b"]
    one = jnp.ones_like(a[..., :1])
    over = jnp.fft.rfft(b, n=length)
    under = jnp.fft.rfft(jnp.concatenate([one, a], -1), n=length)
    return jnp.fft.irfft(over / under, n=length)
