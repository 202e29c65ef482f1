"""The delay task in closed form: how much of a fixed linear memory reaches back τ steps?

White noise below a cutoff drives a system that is not trained; a ridge regression on its states is
asked for the input τ steps ago. With nothing to optimize, what remains is the memory that the
initialisation brings.

Sources: Gu et al. 2022 (arXiv 2206.12037); Voelker, Kajić, Eliasmith 2019 (NeurIPS); posts 10137
and 10162 on kexue.fm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxkit._checks import check_choice, check_int, check_real
from jaxkit.ssm import init
from jaxkit.ssm.discretize import zoh
from jaxkit.ssm.hippo import transition
from jaxkit_experiments.ssm.tasks import check_lag, white

__all__ = ["SYSTEMS", "TIMESCALES", "DelayScore", "delay_nrmse", "delay_states", "delay_table"]

SYSTEMS = ("legt", "fout", "legs", "s4d-lin", "s4d-inv", "s4d-real")
TIMESCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclasses.dataclass(frozen=True)
class DelayScore:
    """Test errors of one system at one size.

    Attributes:
      nrmse: the smallest error over the timescales.
      timescale: Δτ of that error.
      errors: the error at each timescale.
    """

    nrmse: float
    timescale: float
    errors: dict[float, float]


def delay_states(system: str, state_size: int, step: float, u: np.ndarray) -> np.ndarray:
    """States of a linear memory driven by `u`, real and imaginary parts as features.

    HiPPO systems are the dense time-invariant `x' = A x + B u` (`legs` included: its exponential
    memory), S4D ones diagonal with B = 1; all by zero-order hold with step Δ.

    Args:
      system: one of `SYSTEMS`.
      state_size: N; `fout` has 2⌊(N−1)/2⌋ + 1 states.
      step: Δ, in units of the system's own time (the window of `legt` and `fout` is 1).
      u: input `[T]`.

    Returns:
      Features `[T, N]` float64; row k has seen `u[:k + 1]`.

    Raises:
      ValueError: unknown system, odd N of a complex diagonal system, or Δ not positive.

    Example:
      >>> delay_states("s4d-real", 2, 0.5, np.ones(3))[:, 0].round(3).tolist()
      [0.393, 0.632, 0.777]

    Source: Gu et al. 2022 (arXiv 2206.12037); Gu, Gupta, Goel, Ré 2022 (2206.11893).
    """
    check_choice("system", system, SYSTEMS)
    size = check_int("state_size", state_size, least=1)
    check_real("step", step, above=0.0)
    u = np.asarray(u, np.float64)
    if system.startswith("s4d-"):
        eigenvalues = init.diagonal(system.removeprefix("s4d-"), size).eigenvalues
        a_bar, b_bar = np.exp(step * eigenvalues), np.expm1(step * eigenvalues) / eigenvalues
        move = lambda x: a_bar * x
    else:
        if system == "fout":
            size = 2 * ((size - 1) // 2) + 1
        a_bar, b_bar = zoh(*transition(system, size), step)
        move = lambda x: a_bar @ x
    states = np.zeros((len(u), len(b_bar)), b_bar.dtype)
    x = np.zeros(len(b_bar), b_bar.dtype)
    for k, now in enumerate(u):
        x = move(x) + b_bar * now
        states[k] = x
    if np.iscomplexobj(states):
        return np.concatenate([states.real, states.imag], axis=1)
    return states


def _deviation(x: np.ndarray) -> np.ndarray:
    deviation = x.std(axis=0)
    # A real mode of a complex system (n = 0 of `s4d-lin`) has no imaginary part to scale.
    return np.where(deviation == 0, 1.0, deviation)


def delay_nrmse(
    system: str,
    state_size: int,
    *,
    timescale: float = 1.0,
    lag: int = 64,
    samples: int = 4096,
    cutoff: float = 0.1,
    warmup: int = 512,
    ridge: float = 1e-8,
    seeds: tuple[int, int] = (0, 1),
    scale_by: str = "train",
) -> float:
    """Error of the best linear read-out of `u_{k−τ}`, on a signal it was not fitted to.

    `C = (X^T X + λ n I)^{-1} X^T y` on the states of `white(T, f_c, seeds[0])`, each divided by its
    standard deviation; tested on `seeds[1]`. The step is Δ = Δτ/τ, so that at Δτ = 1 a window of
    length 1 just holds the delay.

    Args:
      system: one of `SYSTEMS`.
      state_size: N.
      timescale: Δτ.
      lag: τ.
      samples: T.
      cutoff: f_c, in cycles a sample.
      warmup: rows dropped at the start, beside the first τ.
      ridge: λ.
      seeds: of the signals of training and test.
      scale_by: "train": test features are divided by the training deviations, as they must be;
        "test": by their own, which spoils the result (LegT's 2e-4 becomes 0.3) and is here to show
        that.

    Returns:
      Root mean squared error; the target has unit variance.

    Raises:
      ValueError: τ ≥ T, no row is left, or an argument is out of range.

    Example:
      >>> delay_nrmse("legt", 32, samples=2048) < 1e-3
      True

    Source: Gu et al. 2022 (arXiv 2206.12037), section 4.3.
    """
    check_choice("scale_by", scale_by, ("train", "test"))
    check_real("timescale", timescale, above=0.0)
    check_real("ridge", ridge, least=0.0)
    samples, lag = check_lag(samples, lag)
    lag = check_int("lag", lag, least=1)
    drop = lag + check_int("warmup", warmup, least=0)
    if drop >= samples:
        raise ValueError(
            f"warmup must leave a row: lag + warmup = {drop} of {samples} samples are dropped."
        )

    def problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
        u = white(samples, cutoff, seed)
        states = delay_states(system, state_size, timescale / lag, u)
        return states[drop:], u[drop - lag : samples - lag]

    x, y = problem(seeds[0])
    deviation = _deviation(x)
    x = x / deviation
    gram = x.T @ x + ridge * len(x) * np.eye(x.shape[1])
    readout = np.linalg.solve(gram, x.T @ y)
    x, y = problem(seeds[1])
    x = x / (deviation if scale_by == "train" else _deviation(x))
    return float(np.sqrt(np.mean((x @ readout - y) ** 2)))


def delay_table(
    systems: Sequence[str] = SYSTEMS,
    state_sizes: Sequence[int] = (16, 32, 64),
    *,
    timescales: Sequence[float] = TIMESCALES,
    **options: Any,
) -> dict[tuple[str, int], DelayScore]:
    """Best errors over the timescales, for every system and size.

    Args:
      systems: some of `SYSTEMS`.
      state_sizes: values of N.
      timescales: values of Δτ to choose from.
      **options: of `delay_nrmse`.

    Returns:
      `{(system, N): DelayScore}`.

    Raises:
      ValueError: as `delay_nrmse`, or nothing to choose from.

    Example:
      >>> scores = delay_table(["legt"], [32], timescales=[0.5, 1.0], samples=2048)
      >>> scores["legt", 32].timescale
      1.0

    Source: Gu et al. 2022 (arXiv 2206.12037), section 4.3.
    """
    if not len(timescales):
        raise ValueError("timescales must hold at least one value; got none.")
    for system in systems:
        check_choice("systems", system, SYSTEMS)
    scores = {}
    for system in systems:
        for size in state_sizes:
            errors = {
                float(timescale): delay_nrmse(system, size, timescale=timescale, **options)
                for timescale in timescales
            }
            best = min(errors, key=errors.__getitem__)
            scores[system, size] = DelayScore(errors[best], best, errors)
    return scores
