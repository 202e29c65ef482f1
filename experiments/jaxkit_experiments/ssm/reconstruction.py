"""How much of a signal a fixed-size linear memory keeps, and over which time.

A band-limited signal of at most F cycles runs once through each memory; from the last state alone
the past is rebuilt. LegS holds the whole history, LegT and FouT a window of its last half.

* `legs-exact`, `legs` (bilinear in log time), `legs-reciprocal` (the paper's and the post's input
  weight 1/k) and `legs-forward` (forward Euler): four ways to discretize LegS;
* `legt`, `fout`: sliding windows by zero-order hold;
* `fout_post`: FouT with the gain 1 of post 10114 and of the first code, which is no window;
* `legs-lti`: the LegS matrix as a time-invariant system, as S4 uses it (timescale part alone).

The timescale part shows one continuous signal at growing sampling rates: LegS needs no step size,
a window fixed in samples and a time-invariant LegS fit one rate.

Source: kexue.fm 10114 and 10137; Gu, Dao, Ermon, Rudra, Ré 2020, *HiPPO* (2008.07669); Gu et al.
2022, *How to Train Your HiPPO* (2206.12037).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxkit import _checks
from jaxkit.ssm import discretize, hippo
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.ssm.tasks import blwn, continuous_signal

__all__ = ["Reconstruction", "ReconstructionConfig"]

LEGS_ARMS = ("legs-exact", "legs", "legs-reciprocal", "legs-forward")
WINDOW_ARMS = ("legt", "fout", "fout_post")
ARMS = (*LEGS_ARMS, *WINDOW_ARMS, "legs-lti")
_LEGS_OPTIONS: dict[str, dict[str, Any]] = {
    "legs-exact": {"method": "exact"},
    "legs": {"method": "bilinear"},
    "legs-reciprocal": {"method": "gbt_t", "weight": "paper"},
    "legs-forward": {"method": "forward", "unsafe": True},
}

# The methods card, part (a): mean relative error over seeds 0..2 at T = 2048; "below 1e-4" is 0.
CARD: dict[tuple[int, int], dict[str, float]] = {
    (4, 8): {"legs-exact": 0.4933, "legt": 0.0633, "fout": 0.1744, "fout_post": 0.385},
    (4, 16): {"legs-exact": 0.0108, "legt": 0.0, "fout": 0.0910, "fout_post": 0.371},
    (4, 32): {"legs-exact": 0.0, "legt": 0.0, "fout": 0.0542, "fout_post": 0.367},
    (16, 16): {"legs-exact": 0.8020, "legt": 0.7003, "fout": 0.5087, "fout_post": 0.571},
    (16, 32): {"legs-exact": 0.5547, "legt": 0.0015, "fout": 0.1571, "fout_post": 0.426},
    (16, 64): {"legs-exact": 1.0e-4, "legt": 1.0e-4, "fout": 0.0758, "fout_post": 0.418},
}
# One signal (seed 0, F = 4) through N = 32 states at T samples.
CARD_TIMESCALE: dict[int, dict[str, float]] = {
    256: {"legs": 0.0019, "legt": 0.435, "legs-lti": 0.488},
    512: {"legs": 0.0005, "legt": 0.088, "legs-lti": 0.311},
    1024: {"legs": 0.0001, "legt": 0.047, "legs-lti": 0.169},
    2048: {"legs": 0.0, "legt": 0.770, "legs-lti": 0.150},
    4096: {"legs": 0.0, "legt": 0.948, "legs-lti": 0.282},
}


def near_card(value: float, card: float) -> bool:
    """Whether a value is the card's to 5 percent or 1e-4, whichever is more.

    Example:
        >>> near_card(0.51, 0.50), near_card(0.53, 0.50)
        (True, False)
    """
    return abs(value - card) <= max(0.05 * card, 1e-4)


@dataclass(frozen=True)
class ReconstructionConfig:
    """Signals and memories.

    Example:
        >>> ReconstructionConfig().samples
        2048
    """

    samples: int = 2048
    """Samples T of each signal; even, at least 2 F."""
    frequencies: tuple[int, ...] = (4, 16)
    """Cycles F in the whole signal."""
    states: tuple[int, ...] = (8, 16, 32, 64)
    """State sizes N; FouT takes the largest odd size up to N."""
    timescale_samples: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Numbers of samples of the one continuous signal; empty leaves the part out."""
    timescale_frequency: int = 4
    """Its cycles F."""
    timescale_state: int = 32
    """State size of that part."""
    timescale_window: int = 1024
    """LegT's window, and the time-invariant LegS's time unit, in samples."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the signals."""
    arms: tuple[str, ...] = ARMS
    """Memories."""

    def __post_init__(self) -> None:
        _checks.check_int("samples", self.samples, least=2)
        if self.samples % 2:
            raise ValueError(f"samples must be even, half of them a window; got {self.samples}.")
        for name, values in (("frequencies", self.frequencies), ("states", self.states)):
            if not values or list(values) != sorted(set(values)) or values[0] < 1:
                raise ValueError(f"{name} must be growing positive integers; got {values!r}.")
        if self.samples < 2 * self.frequencies[-1]:
            raise ValueError(
                f"samples must be at least 2 F = {2 * self.frequencies[-1]}; got {self.samples}."
            )
        if self.timescale_samples and min(self.timescale_samples) < 2 * self.timescale_frequency:
            raise ValueError(
                f"timescale_samples must be at least 2 F = {2 * self.timescale_frequency}; "
                f"got {self.timescale_samples!r}."
            )
        _checks.check_int("timescale_state", self.timescale_state, least=1)
        _checks.check_int("timescale_window", self.timescale_window, least=1)
        if not self.seeds:
            raise ValueError("seeds must hold at least one seed; got none.")
        for arm in self.arms:
            _checks.check_choice("arms", arm, ARMS)


def _fourier_size(state: int) -> int:
    return 2 * ((state - 1) // 2) + 1


def _chunk(samples: int) -> int:
    """As many chunks as there are samples in one: the fewest matrix products in a row."""
    return max(1, int(np.sqrt(samples)))


def legs_last_state(arm: str, u: np.ndarray, state: int) -> np.ndarray:
    """Last LegS state [batch, N] of signals [batch, T], float32 arithmetic, O(N) memory.

    Example:
        >>> mean, slope = legs_last_state("legs", np.ones((1, 8)), 2)[0]
        >>> bool(abs(mean - 1) < 1e-6), bool(abs(slope) < 1e-6)
        (True, True)
    """
    signals = jnp.asarray(u, jnp.float32)
    last = hippo.legs_scan(signals, state, last_only=True, **_LEGS_OPTIONS[arm])
    return np.asarray(last, np.float64)


def exact_projection(u: np.ndarray, state: int, *, block: int = 65536) -> np.ndarray:
    r"""Coefficients of held signals on the whole history, float64 on the host: the reference.

    $x_n = r_n \sum_j u_j [Q_n(t_{j+1}) - Q_n(t_j)]$, $Q_n = (P_{n+1} - P_{n-1})/(2(2n+1))$.

    Example:
        >>> exact_projection(np.array([[1.0, 2.0, 4.0]]), 3).round(6).tolist()
        [[2.333333, 1.154701, 0.165635]]
    """
    batch, samples = u.shape
    n = np.arange(1, state)
    out = np.zeros((batch, state))
    for start in range(0, samples, block):
        stop = min(start + block, samples)
        s = np.arange(start, stop + 1) / samples
        legendre = np.polynomial.legendre.legvander(2 * s - 1, state)
        integral = np.empty((len(s), state))
        integral[:, 0] = s
        integral[:, 1:] = (legendre[:, 2:] - legendre[:, :-2]) / (2 * (2 * n + 1))
        out += u[:, start:stop] @ np.diff(integral, axis=0)
    return out * np.sqrt(2 * np.arange(state) + 1.0)


def rebuild(arm: str, x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The signal [batch, points] that states [batch, N] stand for, at positions s in [0, 1].

    1 is now; 0 is the start for LegS, the far end of the window for LegT and FouT.

    Example:
        >>> rebuild("legs", np.array([[1.0, 0.0]]), np.array([0.25])).tolist()
        [[1.0]]
    """
    measure = "legs" if arm.startswith("legs") else arm
    return np.asarray(hippo.reconstruct(jnp.asarray(x), s, measure=measure), np.float64)


def relative_error(rebuilt: np.ndarray, u: np.ndarray) -> np.ndarray:
    """|rebuilt - u| / |u| along the last axis; infinite where the state was not finite.

    Example:
        >>> relative_error(np.array([[np.nan, 0.0]]), np.ones((1, 2))).tolist()
        [inf]
    """
    with np.errstate(all="ignore"):
        error = np.linalg.norm(rebuilt - u, axis=-1) / np.linalg.norm(u, axis=-1)
    return np.where(np.isfinite(error), error, np.inf)


def window_state(arm: str, u: np.ndarray, state: int, window: float) -> np.ndarray:
    """Last state of a sliding window of so many samples."""
    last = hippo.project(
        jnp.asarray(u, jnp.float32),
        _fourier_size(state) if arm.startswith("fout") else state,
        measure=arm,
        dt=1.0,
        window=float(window),
        parallel=True,
        chunk=_chunk(u.shape[-1]),
        last_only=True,
    )
    return np.asarray(last, np.float64)


def timescale_error(arm: str, u: np.ndarray, *, state: int, window: int) -> np.ndarray | None:
    """Relative error over the whole history, or None for arms that have no part in it.

    LegT's window is `window` samples and it says 0 of what lies before; the time-invariant LegS
    counts its age in units of `window` samples.
    """
    samples = u.shape[-1]
    age = (samples - np.arange(samples) - 0.5) / window
    if arm == "legs":
        s = (np.arange(samples) + 0.5) / samples
        return relative_error(rebuild(arm, legs_last_state(arm, u, state), s), u)
    if arm == "legt":
        inside = age <= 1
        rebuilt = np.zeros_like(u)
        x = window_state(arm, u, state, window)
        rebuilt[:, inside] = rebuild(arm, x, 1 - age[inside])
        return relative_error(rebuilt, u)
    if arm == "legs-lti":
        A, B = hippo.transition("legs", state)
        system = discretize.zoh(A, B, 1 / window)
        signals = jnp.asarray(u, jnp.float32)
        last = hippo.lti_scan(*system, signals, chunk=_chunk(samples), last_only=True)
        return relative_error(rebuild(arm, np.asarray(last), np.exp(-age)), u)
    return None


def _name(frequency: int, state: int, kind: str = "error") -> str:
    return f"{kind}_F{frequency}_N{state}"


class Reconstruction(Experiment):
    """Error of what six memories keep, against N and F, and against the sampling rate."""

    name = "hippo-reconstruction"
    title = "How much of a signal a fixed-size linear memory keeps"
    description = (
        "Band-limited signals run through LegS (four discretizations), LegT and FouT (corrected "
        "and as posted); the past is rebuilt from the last state alone. A second part shows one "
        "signal at growing sampling rates."
    )
    sources = ("kexue.fm 10114", "kexue.fm 10137", "arXiv 2008.07669", "arXiv 2206.12037")
    config_class = ReconstructionConfig
    presets: ClassVar[dict[str, ReconstructionConfig]] = {
        "smoke": ReconstructionConfig(
            samples=256,
            frequencies=(4,),
            states=(8, 16),
            timescale_samples=(64, 128),
            timescale_state=16,
            timescale_window=64,
            seeds=(0,),
        ),
        "cpu": ReconstructionConfig(),
        "gpu": ReconstructionConfig(
            samples=1_000_000, frequencies=(16, 64), states=(64, 128, 256), timescale_samples=()
        ),
    }
    arms = ARMS
    columns = ("error_F4_N16", "error_F4_N32", "error_F16_N32", "error_F16_N64", "error_F64_N256")

    def run_arm(
        self, config: ReconstructionConfig, arm: str, ctx: Context
    ) -> dict[str, list[float]]:
        """Run one memory over all signals.

        Returns:
            One value per seed: `error_F…_N…` (relative; infinite where the state overflowed), for
            LegS `gap_F…_N…` (relative distance of the state from the exact one), and
            `timescale_T…`.
        """
        metrics: dict[str, list[float]] = {}
        T, window = config.samples, config.samples // 2
        signals = {
            F: np.stack([blwn(T, F, seed) for seed in config.seeds]) for F in config.frequencies
        }
        # All frequencies and seeds are one batch: one scan for each N.
        batch = np.concatenate(list(signals.values()))
        total = len(config.states) * (arm != "legs-lti") + len(config.timescale_samples)
        with ctx.progress(arm, total) as task:
            for state in config.states if arm != "legs-lti" else ():
                if arm in LEGS_ARMS:
                    x, seen = legs_last_state(arm, batch, state), batch
                else:
                    x, seen = window_state(arm, batch, state, window), batch[:, window:]
                s = (np.arange(seen.shape[1]) + 0.5) / seen.shape[1]
                kinds = {"error": relative_error(rebuild(arm, x, s), seen)}
                if arm in LEGS_ARMS:
                    kinds["gap"] = relative_error(x, exact_projection(batch, state))
                for kind, values in kinds.items():
                    for F, of in zip(signals, np.split(values, len(signals)), strict=True):
                        metrics[_name(F, state, kind)] = of.tolist()
                        ctx.log(N=state, F=F, **{kind: of.tolist()})
                ctx.save_arrays(f"state-{arm}-N{state}", x=x)
                task.advance()
            for samples in config.timescale_samples:
                u = np.stack(
                    [
                        continuous_signal(samples, config.timescale_frequency, seed)
                        for seed in config.seeds
                    ]
                )
                kept = timescale_error(
                    arm, u, state=config.timescale_state, window=config.timescale_window
                )
                if kept is not None:
                    metrics[f"timescale_T{samples}"] = kept.tolist()
                    ctx.log(T=samples, timescale=kept.tolist())
                task.advance()
        return metrics

    def plot(self, results: Results, ctx: Context) -> list[Path]:
        """Error against N, rebuilt signals, and error against the sampling rate."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        folder = ctx.run_dir / "plots"
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for file, draw in (
            ("error.png", self._plot_error),
            ("signals.png", self._plot_signals),
            ("timescale.png", self._plot_timescale),
        ):
            figure = draw(plt, results, ctx)
            if figure is not None:
                paths.append(folder / file)
                figure.savefig(paths[-1], dpi=130)
                plt.close(figure)
        return paths

    @staticmethod
    def _plot_error(plt: Any, results: Results, ctx: Context) -> Any:
        config = results.config
        figure, axes = plt.subplots(
            1,
            len(config.frequencies),
            figsize=(5 * len(config.frequencies), 3.8),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for axis, F in zip(axes[0], config.frequencies, strict=True):
            for arm in results.arms:
                points = [
                    (N, results.mean(arm, _name(F, N)))
                    for N in config.states
                    if results.has(arm, _name(F, N))
                ]
                points = [(N, error) for N, error in points if np.isfinite(error)]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=arm)
            axis.axvline(np.pi * F, color="gray", linestyle=":", label="N = πF")
            axis.set(xscale="log", yscale="log", xlabel="N", title=f"F = {F} cycles")
            axis.set_xticks(config.states, [str(N) for N in config.states])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3, which="both")
        axes[0][0].set_ylabel("relative error")
        axes[0][-1].legend(fontsize=7)
        return figure

    @staticmethod
    def _plot_signals(plt: Any, results: Results, ctx: Context) -> Any:
        config = results.config
        arms = [arm for arm in ("legs", "legt", "fout", "fout_post") if arm in results.arms]
        if not arms:
            return None
        # The middle size of the lowest frequency shows both what is kept and what is lost.
        N, F = config.states[len(config.states) // 2], config.frequencies[0]
        T = config.samples
        keep = np.linspace(0, T - 1, min(T, 2000)).astype(int)
        time = (keep + 0.5) / T
        u = blwn(T, F, config.seeds[0])
        figure, axes = plt.subplots(
            len(arms), 1, figsize=(8, 1.7 * len(arms)), sharex=True, layout="constrained"
        )
        for axis, arm in zip(np.atleast_1d(axes), arms, strict=True):
            x = ctx.load_arrays(f"state-{arm}-N{N}")["x"][:1]
            s = time if arm == "legs" else 2 * time - 1
            inside = s >= 0
            axis.plot(time, u[keep], color="gray", linewidth=1, label="signal")
            axis.plot(time[inside], rebuild(arm, x, s[inside])[0], linewidth=1, label=arm)
            axis.legend(fontsize=7, loc="upper left")
        np.atleast_1d(axes)[-1].set_xlabel(f"time (N = {N}, F = {F})")
        return figure

    @staticmethod
    def _plot_timescale(plt: Any, results: Results, ctx: Context) -> Any:
        config = results.config
        if not config.timescale_samples:
            return None
        figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
        for arm in results.arms:
            points = [
                (T, results.mean(arm, f"timescale_T{T}"))
                for T in config.timescale_samples
                if results.has(arm, f"timescale_T{T}")
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=arm)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="samples of the same signal",
            ylabel="relative error over the whole history",
        )
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
        return figure

    def epilogue(self, results: Results, ctx: Context) -> str:
        """Both tables in full: mean relative error of every arm at every size."""
        config = results.config
        rows = [["relative error", *results.arms]]
        for F in config.frequencies:
            for N in config.states:
                rows.append([f"F={F} N={N}", *_cells(results, _name(F, N))])
        for T in config.timescale_samples:
            rows.append([f"timescale T={T}", *_cells(results, f"timescale_T{T}")])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def _cells(results: Results, name: str) -> list[str]:
    return [
        f"{results.mean(arm, name):.3g}" if results.has(arm, name) else "-" for arm in results.arms
    ]


def _pairs(results: Results) -> list[tuple[int, int]]:
    config = results.config
    return [(F, N) for F in config.frequencies for N in config.states]


def _card(results: Results) -> Verdict:
    config = results.config
    if config.samples != 2048 or tuple(config.seeds) != (0, 1, 2):
        return Verdict("not testable", "the card's table is for T = 2048 and seeds 0, 1, 2")
    compared, wrong = 0, []
    for (F, N), row in CARD.items():
        for arm, card in row.items():
            if results.has(arm, _name(F, N)):
                compared += 1
                value = results.mean(arm, _name(F, N))
                if not near_card(value, card):
                    wrong.append(f"{arm} F={F} N={N}: {value:.4g} for {card:g}")
    if not compared:
        return Verdict("not testable", "none of the table's entries was run")
    text = f"{compared - len(wrong)} of {compared} entries within 5 % or 1e-4"
    return Verdict.of(not wrong, "; ".join([text, *wrong]))


def _card_timescale(results: Results) -> Verdict:
    config = results.config
    same = (config.timescale_frequency, config.timescale_state, config.timescale_window)
    if same != (4, 32, 1024) or 0 not in config.seeds:
        return Verdict("not testable", "the card's table is for F = 4, N = 32, 1024 steps, seed 0")
    position = list(config.seeds).index(0)
    compared, wrong = 0, []
    for T, row in CARD_TIMESCALE.items():
        for arm, card in row.items():
            if results.has(arm, f"timescale_T{T}"):
                compared += 1
                value = float(results.metric(arm, f"timescale_T{T}")[position])
                if not near_card(value, card):
                    wrong.append(f"{arm} T={T}: {value:.4g} for {card:g}")
    if not compared:
        return Verdict("not testable", "none of the table's entries was run")
    text = f"{compared - len(wrong)} of {compared} entries within 5 % or 1e-4"
    return Verdict.of(not wrong, "; ".join([text, *wrong]))


def _cliff(results: Results) -> Verdict:
    arm = "legs-exact" if "legs-exact" in results.arms else "legs"
    below, above = [], []
    for F, N in _pairs(results):
        error = results.mean(arm, _name(F, N))
        if 0.7 * np.pi * F >= N:
            below.append((error, f"F={F} N={N}: {error:.3g}"))
        elif 1.25 * np.pi * F <= N:
            above.append((error, f"F={F} N={N}: {error:.3g}"))
    if not below or not above:
        return Verdict("not testable", "needs sizes well below and well above N = πF")
    good = min(error for error, _ in below) > 0.3 and max(error for error, _ in above) < 0.02
    return Verdict.of(
        good, ", ".join(text for _, text in below + above) + " (above 0.3, then below 0.02)"
    )


def _window(results: Results) -> Verdict:
    legs = "legs-exact" if "legs-exact" in results.arms else "legs"
    pairs = _pairs(results)
    gaps = [results.mean("legt", _name(*p)) - results.mean(legs, _name(*p)) for p in pairs]
    worst = int(np.argmax(gaps))
    F, N = pairs[worst]
    return Verdict.of(
        max(gaps) <= 1e-4, f"largest excess of LegT: {gaps[worst]:.2g} at F={F} N={N}"
    )


def _fourier(results: Results) -> Verdict:
    F, N = results.config.frequencies[0], results.config.states[-1]
    first = results.config.states[0]
    if (N - 1) // 2 < 2 * F or 4 * first > N:
        return Verdict("not testable", "needs N above 4 F and four times the smallest")
    fixed = [results.mean("fout", _name(F, n)) for n in (first, N)]
    posted = [results.mean("fout_post", _name(F, n)) for n in (first, N)]
    good = fixed[1] < 0.1 and fixed[1] < fixed[0] / 2 and min(posted) > 0.3
    return Verdict.of(
        good,
        f"F={F}, N={first} to {N}: gain 2 from {fixed[0]:.3g} to {fixed[1]:.3g}, "
        f"gain 1 from {posted[0]:.3g} to {posted[1]:.3g}",
    )


def _forward(results: Results) -> Verdict:
    sizes = [N for N in results.config.states if N >= 64]
    if not sizes:
        return Verdict("not testable", "stated for N = 64 on")
    F = results.config.frequencies[0]
    values = {N: results.metric("legs-forward", _name(F, N)) for N in sizes}
    bad = all(not np.isfinite(of).any() for of in values.values())
    return Verdict.of(bad, ", ".join(f"N={N}: {of.max():.3g}" for N, of in values.items()))


def _order(results: Results) -> Verdict:
    pairs = _pairs(results)
    if results.config.samples < 2048:
        return Verdict("not testable", "needs T >= 2048 for the order to show")
    ratios = [
        results.mean("legs-reciprocal", _name(*p, "gap")) / results.mean("legs", _name(*p, "gap"))
        for p in pairs
    ]
    return Verdict.of(
        min(ratios) >= 3,
        f"the state's error is {min(ratios):.3g} to {max(ratios):.3g} times that of the default",
    )


def _timescale(results: Results) -> Verdict:
    samples = results.config.timescale_samples
    if len(samples) < 3 or samples[-1] < 8 * samples[0]:
        return Verdict("not testable", "needs sampling rates that differ eightfold")

    def errors(arm: str) -> list[float]:
        return [results.mean(arm, f"timescale_T{T}") for T in samples]

    legs, others = errors("legs"), {arm: errors(arm) for arm in ("legt", "legs-lti")}
    falls = all(later <= before + 1e-4 for before, later in itertools.pairwise(legs))
    good = falls and max(legs) < 0.01 and all(max(of) > 0.2 for of in others.values())
    spans: Sequence[str] = [
        f"{arm} {min(of):.2g} to {max(of):.2g}" for arm, of in {"legs": legs, **others}.items()
    ]
    return Verdict.of(good, ", ".join(spans))


Reconstruction.claims = tuple(
    Claim(text, source, check)
    for text, source, check in (
        (
            "LegS keeps F cycles from N = πF on: the error is a cliff, not a slope",
            "methods card",
            _cliff,
        ),
        (
            "a Legendre window over the last half keeps it at least as well as LegS the whole",
            "arXiv 2008.07669; methods card",
            _window,
        ),
        (
            "FouT with the corrected gain 2 converges; with the post's gain 1 it stays above 0.3",
            "kexue.fm 10114, corrected",
            _fourier,
        ),
        (
            "forward Euler on LegS is not finite in float32 from N = 64",
            "kexue.fm 10137",
            _forward,
        ),
        (
            "the input weight 1/k costs LegS accuracy: at least 3x the default's state error",
            "kexue.fm 10137, corrected",
            _order,
        ),
        (
            "LegS needs no timescale: finer sampling never hurts; a fixed step size fits one rate",
            "arXiv 2008.07669",
            _timescale,
        ),
        ("the errors are those of the card's table", "methods card", _card),
        ("the timescale errors are those of the card's table", "methods card", _card_timescale),
    )
)
