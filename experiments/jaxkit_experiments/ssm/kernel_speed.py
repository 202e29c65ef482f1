"""What each S4 kernel algorithm costs as the length and the state grow.

Six ways to the kernel [heads, length] of one set of S4-LegS channels, each timed forward and
forward with VJP, with the scratch memory of the compiled program:

* `power`: the definition, one dense matrix-vector product per step;
* `dplr-unfused`: tutorials' broadcast of v/(g - lambda) over complex numbers;
* `dplr-fused`: `jaxkit_kernels.cauchy`;
* `vandermonde`: the direct sum of exponentials (diagonal part alone, zero-order hold);
* `vandermonde-two-level`: `jaxkit_kernels.vandermonde`;
* `rtf`: a rational transfer function of order N, by FFT alone.

Source: kexue.fm 10162 and 10180; Gu, Goel, Ré 2021 (2111.00396); Parnichkun et al. 2024
(2405.06147).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.signal

from jaxkit import _checks
from jaxkit_experiments.experiment import Claim, Experiment, Results, Verdict
from jaxkit_experiments.speed import measure, peers

__all__ = ["KernelSpeed", "KernelSpeedConfig"]

ARMS = (
    "power",
    "dplr-unfused",
    "dplr-fused",
    "vandermonde",
    "vandermonde-two-level",
    "rtf",
)
# Below this a timing is the cost of a call, and says nothing about growth.
OVERHEAD = 0.1  # ms


@dataclass(frozen=True)
class KernelSpeedConfig:
    """Sizes and limits.

    Example:
        >>> KernelSpeedConfig().heads
        8
    """

    heads: int = 8
    """Channels H."""
    lengths: tuple[int, ...] = (1024, 4096)
    """Lengths L, growing."""
    states: tuple[int, ...] = (16, 64, 256)
    """State sizes N, even, growing."""
    repeats: int = 5
    """Timed runs of each size; the shortest counts."""
    vjp: bool = True
    """Whether to time forward with VJP as well."""
    max_seconds: float = 2.0
    """A size expected to take longer per run is left out."""
    max_gigabytes: float = 8.0
    """A size whose compiled scratch memory is larger is left out."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the output map and the steps."""
    arms: tuple[str, ...] = ARMS
    """Algorithms."""

    def __post_init__(self) -> None:
        _checks.check_int("heads", self.heads, least=1)
        _checks.check_int("repeats", self.repeats, least=1)
        for name, values, least in (("lengths", self.lengths, 1), ("states", self.states, 2)):
            if not values or list(values) != sorted(set(values)) or values[0] < least:
                raise ValueError(
                    f"{name} must be growing integers of at least {least}; got {values!r}."
                )
        if any(state % 2 for state in self.states):
            raise ValueError(f"states must be even; got {self.states!r}.")
        if self.lengths[0] <= self.states[-1] and "rtf" in self.arms:
            raise ValueError(
                f"lengths must all exceed the largest state (RTF needs d < L); got "
                f"{self.lengths!r} with states {self.states!r}."
            )
        for arm in self.arms:
            _checks.check_choice("arms", arm, ARMS)


Form = Callable[[dict[str, jax.Array]], jax.Array]


@functools.lru_cache(maxsize=1)
def _operands(arm: str, heads: int, state: int, seed: int) -> dict[str, jax.Array]:
    if arm == "rtf":
        return peers.rtf_problem(heads, state, seed=seed)
    # The result needs an output map tied to L; its timing does not.
    problem = peers.s4_problem(heads, state, 1, seed=seed, derive_c_tilde=False)
    if arm == "power":
        return peers.power_operands(problem)
    if arm.startswith("vandermonde"):
        return peers.vandermonde_operands(problem)
    return {
        name: jnp.asarray(problem[name], jnp.float32)
        for name in ("lam_re", "lam_im", "p", "b", "ct", "log_step")
    }


_FORMS: dict[str, Callable[..., jax.Array]] = {
    "power": peers.power_iteration,
    "dplr-unfused": peers.dplr_broadcast,
    "dplr-fused": peers.dplr_fused,
    "vandermonde": peers.vandermonde_direct,
    "vandermonde-two-level": peers.vandermonde_two_level,
    "rtf": peers.rtf,
}


def reference_error(arm: str, *, heads: int, state: int, length: int, seed: int = 0) -> float:
    """Largest error of an arm's float32 kernel against its definition in float64 on the host.

    DPLR and power iteration are compared with powers of the dense matrix, Vandermonde with powers
    of the rounded exponents, RTF with the impulse response of its filter.

    Args:
        arm: one of the arms.
        heads: H.
        state: N.
        length: L.
        seed: of the problem.

    Returns:
        The largest error over the largest |K|.

    Example:
        >>> reference_error("rtf", heads=1, state=4, length=64) < 1e-5
        True
    """
    _checks.check_choice("arm", arm, ARMS)
    if arm == "rtf":
        params = peers.rtf_problem(heads, state, seed=seed)
        a, b = (np.asarray(params[name], np.float64) for name in ("a", "b"))
        # L samples of the spectrum fold the response at L; it has died out after 60 N steps.
        periods = 1 + -(-60 * state // length)
        impulse = np.eye(1, periods * length)[0]
        responses = [scipy.signal.lfilter(b[h], [1.0, *a[h]], impulse) for h in range(heads)]
        wanted = np.stack(responses).reshape(heads, periods, length).sum(1)
    else:
        problem = peers.s4_problem(heads, state, length, seed=seed)
        if arm.startswith("vandermonde"):
            params = peers.vandermonde_operands(problem)
            alpha, beta, re, im = (
                np.asarray(params[name], np.float64) for name in ("alpha", "beta", "v_re", "v_im")
            )
            powers = np.exp((-alpha + 1j * beta)[..., None] * np.arange(length))
            wanted = 2 * np.einsum("hm,hml->hl", re + 1j * im, powers).real
        else:
            dense = peers.power_operands_host(problem)
            x, wanted = dense["bar_b"], np.empty((heads, length))
            for l in range(length):
                wanted[:, l] = np.einsum("hn,hn->h", dense["c"], x)
                x = np.einsum("hnm,hm->hn", dense["bar_a"], x)
            params = (
                peers.power_operands(problem) if arm == "power" else peers.cast(problem, "float32")
            )
    got = np.asarray(_FORMS[arm](params, length=length), np.float64)
    return float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))


def _size(kind: str, length: int, state: int) -> str:
    return f"{kind}_L{length}_N{state}"


def _value_and_vjp(form: Form) -> Callable[..., Any]:
    def both(params: Any, cotangent: jax.Array) -> Any:
        out, pull = jax.vjp(form, params)
        return out, pull(cotangent)

    return both


def _too_large(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


class KernelSpeed(Experiment):
    """Time and memory of six kernel algorithms over L and N."""

    name = "s4-kernel-speed"
    title = "What each S4 kernel algorithm costs as L and N grow"
    description = (
        "Kernel generation [H, L] in float32, forward and forward with VJP: power iteration, "
        "DPLR unfused and fused, Vandermonde direct and two-level, RTF."
    )
    sources = ("kexue.fm 10162", "kexue.fm 10180", "arXiv 2111.00396", "arXiv 2405.06147")
    config_class = KernelSpeedConfig
    presets: ClassVar[dict[str, KernelSpeedConfig]] = {
        "smoke": KernelSpeedConfig(heads=2, lengths=(64, 128), states=(4, 8), vjp=False),
        "cpu": KernelSpeedConfig(),
        "gpu": KernelSpeedConfig(
            heads=256,
            lengths=tuple(2**k for k in range(11, 21)),
            states=(16, 64, 256, 1024),
            max_seconds=20.0,
            max_gigabytes=60.0,
        ),
    }
    columns = ("ms", "vjp_ms", "temp_mb", "slope_length", "slope_state", "error")
    paper: ClassVar[dict[str, dict[str, float]]] = {}

    def run_arm(self, config: KernelSpeedConfig, arm: str, ctx: Any) -> dict[str, list[float]]:
        """Time one algorithm at every size within the limits.

        Returns:
            One value per seed of `ms_L…_N…`, `vjp_ms_…` and `temp_mb_…` for each size, of the
            same at the smallest length and largest state without the size in their name, of the
            fitted exponents `slope_length` (largest state) and `slope_state` (largest length
            at which two states were timed), and of `error` against float64.
        """
        metrics: dict[str, list[float]] = {}
        for seed in config.seeds:
            sizes = self._one_seed(config, arm, seed, ctx)
            for name, value in sizes.items():
                metrics.setdefault(name, []).append(value)
        # A size left out for one seed is left out for all.
        return {k: v for k, v in metrics.items() if len(v) == len(config.seeds)}

    def _one_seed(
        self, config: KernelSpeedConfig, arm: str, seed: int, ctx: Any
    ) -> dict[str, float]:
        out: dict[str, float] = {}
        kinds = ("ms", "vjp_ms") if config.vjp else ("ms",)
        for kind in kinds:
            for state in config.states:
                for length in config.lengths:
                    expected = self._expected(out, kind, config, length, state)
                    if expected > config.max_seconds:
                        ctx.log(arm=arm, seed=seed, kind=kind, L=length, N=state, left_out="time")
                        continue
                    self._one_size(config, arm, seed, kind, length, state, out, ctx)
        out["error"] = reference_error(
            arm,
            heads=min(config.heads, 4),
            state=config.states[0],
            length=min(config.lengths[0], 1024),
            seed=seed,
        )
        length, state = config.lengths[0], config.states[-1]
        for kind in (*kinds, "temp_mb"):
            if _size(kind, length, state) in out:
                out[kind] = out[_size(kind, length, state)]
        slopes = {
            "slope_length": [(L, config.states[-1]) for L in config.lengths],
            "slope_state": [(config.lengths[-1], N) for N in config.states],
        }
        for name, points in slopes.items():
            timed = [(L, N) for L, N in points if _size("ms", L, N) in out]
            if len(timed) >= 2:
                grown = [L if name == "slope_length" else N for L, N in timed]
                out[name] = measure.fit_slope(grown, [out[_size("ms", *p)] for p in timed])
        return out

    @staticmethod
    def _expected(
        out: dict[str, float], kind: str, config: KernelSpeedConfig, length: int, state: int
    ) -> float:
        """Seconds from the nearest smaller size, by the steepest law, N^2 L; 0 if unknown."""
        i, j = config.lengths.index(length), config.states.index(state)
        guesses = [0.0]
        if i and _size(kind, config.lengths[i - 1], state) not in out:
            return float("inf")
        if i:
            before = out[_size(kind, config.lengths[i - 1], state)]
            guesses.append(before / 1e3 * length / config.lengths[i - 1])
        elif j:
            if _size(kind, length, config.states[j - 1]) not in out:
                return float("inf")
            before = out[_size(kind, length, config.states[j - 1])]
            guesses.append(before / 1e3 * (state / config.states[j - 1]) ** 2)
        return max(guesses)

    @staticmethod
    def _one_size(
        config: KernelSpeedConfig,
        arm: str,
        seed: int,
        kind: str,
        length: int,
        state: int,
        out: dict[str, float],
        ctx: Any,
    ) -> None:
        form: Form = functools.partial(_FORMS[arm], length=length)
        params = _operands(arm, config.heads, state, seed)
        arguments: tuple[Any, ...] = (params,)
        function: Callable[..., Any] = form
        if kind == "vjp_ms":
            function = _value_and_vjp(form)
            arguments = (params, jnp.ones((config.heads, length), jnp.float32))
        try:
            compiled = jax.jit(function).lower(*arguments).compile()
            plan = compiled.memory_analysis()
            temp = float(plan.temp_size_in_bytes) if plan is not None else None
            if temp is not None and temp > config.max_gigabytes * 1e9:
                ctx.log(arm=arm, seed=seed, kind=kind, L=length, N=state, left_out="memory")
                return
            timing = measure.compare(
                {"run": lambda: compiled(*arguments)}, repeats=config.repeats, min_sample=1e-3
            )["run"]
        except jax.errors.JaxRuntimeError as error:
            if not _too_large(error):
                raise
            ctx.log(arm=arm, seed=seed, kind=kind, L=length, N=state, left_out="memory")
            return
        out[_size(kind, length, state)] = 1e3 * timing.best
        if temp is not None:
            prefix = "" if kind == "ms" else "vjp_"
            out[_size(f"{prefix}temp_mb", length, state)] = temp / 1e6
        ctx.log(arm=arm, seed=seed, kind=kind, L=length, N=state, ms=1e3 * timing.best, temp=temp)

    def plot(self, results: Results, ctx: Any) -> list[Path]:
        """Time against L, time against N and scratch memory against N, all log-log."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        config = results.config
        folder = Path(ctx.run_dir) / "plots"
        folder.mkdir(parents=True, exist_ok=True)
        panels = [
            ("ms", "L", [(L, config.states[-1]) for L in config.lengths], "ms"),
            ("ms", "N", [(config.lengths[-1], N) for N in config.states], "ms"),
            ("temp_mb", "N", [(config.lengths[-1], N) for N in config.states], "scratch MB"),
        ]
        if config.vjp:
            panels[2:2] = [
                ("vjp_ms", "N", [(config.lengths[-1], N) for N in config.states], "ms with VJP")
            ]
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained"
        )
        for axis, (kind, letter, points, label) in zip(axes, panels, strict=True):
            for arm in results.arms:
                timed = [p for p in points if results.has(arm, _size(kind, *p))]
                xs = [L if letter == "L" else N for L, N in timed]
                ys = [results.mean(arm, _size(kind, *p)) for p in timed]
                if any(y > 0 for y in ys):
                    axis.plot(xs, ys, marker="o", label=arm)
            axis.set(xscale="log", yscale="log", xlabel=letter, ylabel=label)
            fixed = f"N={points[0][1]}" if letter == "L" else f"L={points[0][0]}"
            axis.set_title(f"H={config.heads}, {fixed}")
            ticks = config.lengths if letter == "L" else config.states
            axis.set_xticks(ticks, [str(tick) for tick in ticks], rotation=30)
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3, which="both")
        axes[0].legend(fontsize=7)
        path = folder / "kernel-speed.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        return [path]

    def epilogue(self, results: Results, ctx: Any) -> str:
        """The time of every algorithm at every size, in milliseconds."""
        config = results.config
        sizes = [(L, N) for L in config.lengths for N in config.states]
        kinds = [("ms", "forward")] + ([("vjp_ms", "forward with VJP")] if config.vjp else [])
        blocks = []
        for kind, title in kinds:
            rows = [["ms, " + title, *results.arms]]
            for L, N in sizes:
                cells = [
                    f"{results.mean(arm, _size(kind, L, N)):.3g}"
                    if results.has(arm, _size(kind, L, N))
                    else "left out"
                    for arm in results.arms
                ]
                rows.append([f"L={L} N={N}", *cells])
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            blocks.append(
                "\n".join(
                    "  ".join(
                        cell.ljust(w) if i == 0 else cell.rjust(w)
                        for i, (cell, w) in enumerate(zip(row, widths, strict=True))
                    )
                    for row in rows
                )
            )
        return "\n\n".join(blocks)


def _exponent(results: Results, arm: str, letter: str, low: float, high: float) -> Verdict:
    """Judge the growth between the first and last size along one axis, where calls cost nothing."""
    config = results.config
    if arm not in results.arms:
        return Verdict("not testable", f"{arm} was not run")
    points = (
        [(L, config.states[-1]) for L in config.lengths]
        if letter == "L"
        else [(config.lengths[-1], N) for N in config.states]
    )
    timed = [
        (L if letter == "L" else N, results.mean(arm, _size("ms", L, N)))
        for L, N in points
        if results.has(arm, _size("ms", L, N))
    ]
    timed = [(x, ms) for x, ms in timed if ms >= OVERHEAD]
    if len(timed) < 2 or timed[-1][0] < 4 * timed[0][0]:
        return Verdict(
            "not testable",
            f"{arm}: too few sizes above {OVERHEAD} ms to see the growth in {letter}",
        )
    slope = measure.fit_slope(*zip(*timed, strict=True))
    text = f"{arm} grows as {letter}^{slope:.2f} over {timed[0][0]}..{timed[-1][0]}"
    return Verdict(
        "held" if low <= slope <= high else "not held", f"{text} (accepted {low:g} to {high:g})"
    )


def _all(*verdicts: Verdict) -> Verdict:
    """Held where all are; not held where one is not; else not testable."""
    detail = "; ".join(verdict.detail for verdict in verdicts)
    for status in ("not held", "not testable"):
        if any(verdict.status == status for verdict in verdicts):
            return Verdict(status, detail)
    return Verdict("held", detail)


def _rtf_flat(results: Results) -> Verdict:
    config = results.config
    if "rtf" not in results.arms:
        return Verdict("not testable", "rtf was not run")
    length = config.lengths[-1]
    times = [
        results.mean("rtf", _size("ms", length, N))
        for N in config.states
        if results.has("rtf", _size("ms", length, N))
    ]
    grown = config.states[-1] / config.states[0]
    if len(times) < 2 or grown < 4 or max(times) < OVERHEAD / 2:
        shown = ", ".join(f"{time:.3g} ms" for time in times)
        return Verdict("not testable", f"sizes too small or too few: {shown}")
    ratio = max(times) / min(times)
    return Verdict(
        "held" if ratio <= 1.5 else "not held",
        f"times at L={length} differ by {ratio:.2f}x while d grows {grown:g}x (accepted 1.5x)",
    )


def _power(results: Results) -> Verdict:
    return _all(
        _exponent(results, "power", "L", 0.8, 1.3), _exponent(results, "power", "N", 1.5, 2.5)
    )


def _linear(*arms: str) -> Callable[[Results], Verdict]:
    def check(results: Results) -> Verdict:
        return _all(
            *(_exponent(results, arm, letter, 0.65, 1.35) for arm in arms for letter in ("L", "N"))
        )

    return check


def _ratio(slow: str, fast: str, least: float, min_length: int) -> Callable[[Results], Verdict]:
    def check(results: Results) -> Verdict:
        config = results.config
        length = config.lengths[-1]
        if slow not in results.arms or fast not in results.arms:
            return Verdict("not testable", f"{slow} and {fast} were not both run")
        if length < min_length:
            return Verdict("not testable", f"stated for L >= {min_length}; the longest is {length}")
        ratios = {
            N: results.mean(slow, _size("ms", length, N))
            / results.mean(fast, _size("ms", length, N))
            for N in config.states
            if results.has(slow, _size("ms", length, N))
            and results.has(fast, _size("ms", length, N))
        }
        if not ratios:
            return Verdict("not testable", "no size was timed for both")
        text = ", ".join(f"N={N}: {ratio:.1f}x" for N, ratio in ratios.items())
        return Verdict(
            "held" if min(ratios.values()) >= least else "not held", f"L={length}: {text}"
        )

    return check


def _memory(results: Results) -> Verdict:
    """What one more sample costs a channel in scratch; block buffers of fixed size do not count."""
    config = results.config
    first, last, state = config.lengths[0], config.lengths[-1], config.states[-1]
    if state < 64 or last < 4 * first:
        return Verdict("not testable", "needs N >= 64 and lengths that differ fourfold")
    growth = [results.mean("dplr-fused", _size("temp_mb", L, state)) for L in (first, last)]
    floats = (growth[1] - growth[0]) * 1e6 / 4 / config.heads / (last - first)
    return Verdict.of(
        floats <= state / 10,
        f"{floats:.3g} floats of scratch for each further sample of a channel at N={state}, "
        f"{growth[1]:.3g} MB at L={last} (accepted {state / 10:g} floats)",
    )


KernelSpeed.claims = (
    Claim("RTF's time does not depend on the state size", "arXiv 2405.06147", _rtf_flat),
    Claim("power iteration is proportional to N^2 L", "kexue.fm 10162; arXiv 2111.00396", _power),
    Claim(
        "DPLR is proportional to N L",
        "kexue.fm 10162; arXiv 2111.00396",
        _linear("dplr-unfused", "dplr-fused"),
    ),
    Claim("Vandermonde is proportional to N L", "arXiv 2206.11893", _linear("vandermonde")),
    Claim(
        "the fused DPLR kernel is several times (at least 2x) faster than the unfused one",
        "methods card",
        _ratio("dplr-unfused", "dplr-fused", 2.0, 1024),
    ),
    Claim("the fused DPLR kernel's memory is of order H L, not H N L", "methods card", _memory),
    Claim(
        "two-level Vandermonde is at least 3x the direct form from L=16384",
        "methods card",
        _ratio("vandermonde", "vandermonde-two-level", 3.0, 16384),
    ),
)
