"""Initial state matrices of S4 layers, computed on the host in float64.

A state matrix is kept in the basis where it is diagonal plus low rank,

    A = Λ − Σ_r P_r P_r^*,

and holds one member of each conjugate pair: M = N/2 modes with Im Λ ≥ 0 stand for N real states. A
sum over all states is then twice the real part of the sum over modes.

Sources: Gu, Goel, Ré 2021 (arXiv 2111.00396); Gu, Gupta, Goel, Ré 2022 (2206.11893); Gu et al. 2022
(2206.12037); posts 10162 and 10180 on kexue.fm.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxkit._checks import check_choice, check_int

__all__ = ["DIAGONAL_INITS", "DPLR", "DPLR_INITS", "Diagonal", "diagonal", "dplr"]


class DPLR(NamedTuple):
    """Λ `[modes]`, P `[rank, modes]` and B `[modes]`, complex128, of `A = Λ − Σ_r P_r P_r^*`."""

    eigenvalues: np.ndarray
    low_rank: np.ndarray
    input: np.ndarray


class Diagonal(NamedTuple):
    """Λ and B of a diagonal system: complex128 `[modes]`, or float64 `[state]` if `A` is real."""

    eigenvalues: np.ndarray
    input: np.ndarray


def check_state_size(state_size: int, *, even: bool = True) -> int:
    """`state_size` as an `int`; even where modes stand for conjugate pairs."""
    state_size = check_int("state_size", state_size, least=1)
    if even and state_size % 2:
        raise ValueError(
            f"state_size must be even, since modes stand for conjugate pairs; got {state_size}."
        )
    return state_size


def _from_skew(skew: np.ndarray, shift: float, low_rank: np.ndarray, input_: np.ndarray) -> DPLR:
    """The DPLR form of `shift·I + skew − low_rank^T low_rank`, by a Hermitian eigenproblem."""
    beta, vectors = np.linalg.eigh(-1j * skew)
    # The spectrum is symmetric about zero and ascending: the upper half holds one of each pair.
    half = slice(len(beta) // 2, None)
    to_modes = vectors[:, half].conj().T
    return DPLR(shift + 1j * beta[half], low_rank @ to_modes.T, to_modes @ input_)


def _antisymmetric(weights: np.ndarray, *, opposite_parity: bool = False) -> np.ndarray:
    """`S_nk = w_n w_k sign(k − n)`, kept everywhere or where n and k differ in parity."""
    n = np.arange(len(weights))
    sign = np.sign(n[None, :] - n[:, None]).astype(float)
    if opposite_parity:
        sign = sign * ((n[None, :] + n[:, None]) % 2)
    return sign * np.outer(weights, weights)


def _legs(size: int) -> DPLR:
    n = np.arange(size)
    p = np.sqrt(n + 0.5)
    return _from_skew(_antisymmetric(p), -0.5, p[None], np.sqrt(2.0) * p)


def _legt(size: int) -> DPLR:
    r = np.sqrt(2.0 * np.arange(size) + 1.0)
    parity = np.arange(size) % 2
    p = np.stack([r * (parity == 0), r * (parity == 1)])
    return _from_skew(_antisymmetric(r, opposite_parity=True), 0.0, p, r)


def _lagt(size: int) -> DPLR:
    p = np.full(size, np.sqrt(0.5))
    return _from_skew(_antisymmetric(p), 0.0, p[None], np.ones(size))


def _fout(size: int) -> DPLR:
    modes = size // 2
    # The mode n = 0 is real and counts once. Scaling its coordinate by 1/√2 lets the common
    # factor 2 Re Σ serve it too: 2·(1/√2)² = 1.
    weight = np.ones(modes)
    weight[0] = np.sqrt(0.5)
    return DPLR(
        2j * np.pi * np.arange(modes),
        (np.sqrt(2.0) * weight)[None].astype(complex),
        (2.0 * weight).astype(complex),
    )


_DPLR: dict[str, Callable[[int], DPLR]] = {
    "legs": _legs,
    "legt": _legt,
    "fout": _fout,
    "lagt": _lagt,
}
DPLR_INITS = (*_DPLR, "random")
DIAGONAL_INITS = ("lin", "inv", "legs", "real", "random")


def dplr(init: str, state_size: int, *, seed: int = 0) -> DPLR:
    """The diagonal-plus-low-rank form of a HiPPO matrix (or a random one).

    With the symmetric part of A of low rank up to a multiple of I, `A + PP^T + ½I` (LegS) or
    `A + PP^T` (LegT, LagT) is skew: its Hermitian multiple `−iS = V β V^*` is diagonalised
    stably, and `Λ = −½ + iβ`, `P ← V^*P`, `B ← V^*B` over the half with β > 0. Eigenvectors have
    free phases, so only `|P_n|²`, `B_n/P_n` and kernels mean something.

    | init | rank | state it stands for (window 1, orthonormal basis) |
    |---|---|---|
    | `legs` | 1 | scaled Legendre, used as a time-invariant system: exponential memory |
    | `legt` | 2 | Legendre over a sliding window |
    | `fout` | 1 | Fourier over a sliding window: N − 1 real states, since the mode n = 0 is real |
    | `lagt` | 1 | Laguerre, orthonormal (β = 0) |
    | `random` | 1 | Re Λ = −e^{N(0,1)}, Im Λ = \\|N(0,1)\\|, P and B complex normal |

    Args:
      init: One of `DPLR_INITS`.
      state_size: N, even.
      seed: Seed of `random`; the others take none.

    Returns:
      `DPLR(eigenvalues [N/2], low_rank [rank, N/2], input [N/2])`, complex128.

    Raises:
      ValueError: If `init` is unknown, or `state_size` is odd or below 1.

    Example:
      >>> system = dplr("legs", 4)
      >>> print(system.eigenvalues.imag.round(4), (abs(system.low_rank[0]) ** 2).round(4))
      [0.5565 4.6033] [0.4675 3.5325]

    Source: Gu, Goel, Ré 2021 (arXiv 2111.00396, app. C); Gu et al. 2022 (2206.12037); post 10162.
    """
    check_choice("init", init, DPLR_INITS)
    size = check_state_size(state_size)
    if init == "random":
        return _random(size, seed)
    return _DPLR[init](size)


def _random(size: int, seed: int) -> DPLR:
    rng = np.random.default_rng(seed)
    modes = size // 2
    eigenvalues = -np.exp(rng.standard_normal(modes)) + 1j * abs(rng.standard_normal(modes))
    draws = rng.standard_normal((2, 2, modes)) / np.sqrt(2.0)
    low_rank, input_ = draws[:, 0] + 1j * draws[:, 1]
    return DPLR(eigenvalues, low_rank[None], input_)


def diagonal(init: str, state_size: int, *, halve_input: bool = False, seed: int = 0) -> Diagonal:
    """The initial spectrum and input of a diagonal system (S4D).

    | init | Λ_n | B_n |
    |---|---|---|
    | `lin` | −½ + iπn | 1 |
    | `inv` | −½ + i(N/π)(N/(2n+1) − 1) | 1 |
    | `legs` | the Λ of the DPLR form of LegS | its B; B/2 with `halve_input` |
    | `real` | −(n+1), N real states | 1 |
    | `random` | Re Λ = −e^{N(0,1)}, Im Λ = \\|N(0,1)\\| | 1 |

    Theory wants B/2 for `legs`: dropping the low-rank term leaves a system that converges
    (weakly) to LegS only with half the input. The reference code keeps B.

    Args:
      init: One of `DIAGONAL_INITS`.
      state_size: N; even, except for `real`.
      halve_input: Use B/2; for `legs` only.
      seed: Seed of `random`; the others take none.

    Returns:
      `Diagonal(eigenvalues, input)`: complex128 `[N/2]`, or float64 `[N]` for `real`.

    Raises:
      ValueError: If `init` is unknown, `state_size` is odd or below 1, or `halve_input` is given
        for another init.

    Example:
      >>> print(diagonal("inv", 4).eigenvalues.round(4))
      [-0.5+3.8197j -0.5+0.4244j]

    Source: Gu, Gupta, Goel, Ré 2022 (arXiv 2206.11893, sec. 4); post 10162.
    """
    check_choice("init", init, DIAGONAL_INITS)
    size = check_state_size(state_size, even=init != "real")
    if halve_input and init != "legs":
        raise ValueError(f"halve_input applies to init 'legs' only; got init {init!r}.")
    n = np.arange(size if init == "real" else size // 2)
    ones = np.ones(len(n), dtype=float if init == "real" else complex)
    if init == "real":
        return Diagonal(-(n + 1.0), ones)
    if init == "lin":
        return Diagonal(-0.5 + 1j * np.pi * n, ones)
    if init == "inv":
        return Diagonal(-0.5 + 1j * (size / np.pi) * (size / (2 * n + 1) - 1), ones)
    if init == "random":
        return Diagonal(_random(size, seed).eigenvalues, ones)
    system = _legs(size)
    return Diagonal(system.eigenvalues, system.input * (0.5 if halve_input else 1.0))
