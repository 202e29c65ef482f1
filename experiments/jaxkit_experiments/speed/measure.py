"""Timing side by side, compiled memory, and what to write beside a number.

Two timings taken minutes apart on a busy machine compare the machine with itself. Here the
candidates take turns: every round times each of them once, in rotating order, so that a burst of
other work hits all of them alike, and a ratio is the median over rounds of paired ratios. A turn
opens with one call that is not timed: it would pay for the caches that the candidate before it
left behind, which a program that runs one of them does not.
"""

import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkit import _checks
from jaxkit_experiments import runfolder

__all__ = [
    "Memory",
    "Timing",
    "available_memory",
    "compare",
    "environment",
    "fit_slope",
    "measure_memory",
    "speedup",
    "write_json",
]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "jaxkit-research")


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round.

    Example:
        >>> Timing("f", (2e-3, 1e-3, 3e-3)).median
        0.002
    """

    name: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample: what is reported."""
        return float(np.median(self.samples))

    @property
    def best(self) -> float:
        """The shortest sample: closest to an idle machine."""
        return float(np.min(self.samples))

    @property
    def spread(self) -> float:
        """Half the interquartile range."""
        low, high = np.quantile(self.samples, (0.25, 0.75))
        return float(high - low) / 2


@dataclass(frozen=True)
class Memory:
    """Bytes planned by the compiler: scratch, arguments, results, and the peak of all three.

    Example:
        >>> Memory(temp=8, arguments=16, outputs=4, peak=28).temp
        8
    """

    temp: int
    arguments: int
    outputs: int
    peak: int


def _call(function: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(function())
    return (time.perf_counter() - start) / times


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 9,
    warmup: int = 1,
    min_sample: float = 1e-2,
    budget: float | None = None,
) -> dict[str, Timing]:
    """Time functions without arguments side by side: interleaved rounds after a warm-up.

    Every call is followed by `jax.block_until_ready`, and every turn opens with an untimed call.
    A function shorter than `min_sample` is called several times per sample, and the sample is the
    mean of those calls.

    Args:
        functions: name to function; compile (`jax.jit`) and bind the arguments first.
        repeats: rounds, one sample of every function per round.
        warmup: untimed calls of each function before the first round, at least one.
        min_sample: least length of one sample, in seconds.
        budget: no further round starts after so many seconds (three rounds always run).

    Returns:
        A `Timing` for each name, all with equally many samples.

    Raises:
        ValueError: no function was given, or `repeats` or `warmup` is below one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.ones(8)
        >>> double, square = jax.jit(lambda x: 2 * x), jax.jit(lambda x: x * x)
        >>> both = compare({"double": lambda: double(x), "square": lambda: square(x)}, repeats=3)
        >>> sorted(both), len(both["square"].samples)
        (['double', 'square'], 3)
    """
    if not functions:
        raise ValueError("functions must hold at least one function; got none.")
    repeats = _checks.check_int("repeats", repeats, least=1)
    warmup = _checks.check_int("warmup", warmup, least=1)
    times = {}
    for name, function in functions.items():
        for _ in range(warmup):
            jax.block_until_ready(function())
        once = max(_call(function, 1), 1e-7)
        times[name] = max(1, math.ceil(min_sample / once))

    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for round_ in range(repeats):
        if budget is not None and round_ >= 3 and time.perf_counter() - start > budget:
            break
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            jax.block_until_ready(functions[name]())
            samples[name].append(_call(functions[name], times[name]))
    return {name: Timing(name, tuple(values)) for name, values in samples.items()}


def speedup(slow: Timing, fast: Timing) -> float:
    """How many times shorter `fast` is: the median over rounds of paired ratios.

    Example:
        >>> speedup(Timing("a", (4.0, 8.0, 6.0)), Timing("b", (2.0, 2.0, 2.0)))
        3.0
    """
    if len(slow.samples) != len(fast.samples):
        raise ValueError(
            f"slow and fast must come from the same rounds; got {len(slow.samples)} and "
            f"{len(fast.samples)} samples."
        )
    return float(np.median(np.asarray(slow.samples) / np.asarray(fast.samples)))


def fit_slope(sizes: Any, values: Any) -> float:
    """The exponent p of values ~ sizes^p: least squares in log-log coordinates.

    Example:
        >>> round(fit_slope([1, 2, 4], [3.0, 12.0, 48.0]), 6)
        2.0
    """
    sizes, values = np.asarray(sizes, float), np.asarray(values, float)
    if sizes.shape != values.shape or sizes.size < 2 or np.ptp(sizes) == 0:
        raise ValueError(
            "sizes and values must be equally long with two different sizes at least; "
            f"got shapes {sizes.shape} and {values.shape}."
        )
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def available_memory() -> int | None:
    """Bytes that a program may still take on the default device; `None` if unknown."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else int(limit) - int(stats.get("bytes_in_use", 0))
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        # A container may be allowed less than the machine has.
        limit_text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit_text != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free.append(int(limit_text) - used)
    except (OSError, ValueError):
        pass
    return min(free, default=None)


def measure_memory(function: Callable[..., Any], *args: Any) -> Memory | None:
    """Bytes of the compiled function from the compiler's own plan, without running it.

    Args:
        function: a function, jitted or not.
        *args: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The plan, or `None` where the backend does not report one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> plan = measure_memory(lambda x: x @ x.T, jax.ShapeDtypeStruct((8, 4), jnp.float32))
        >>> plan.arguments, plan.outputs
        (128, 256)
    """
    plan = jax.jit(function).lower(*args).compile().memory_analysis()
    if plan is None:
        return None
    temp = int(plan.temp_size_in_bytes)
    arguments = int(plan.argument_size_in_bytes)
    outputs = int(plan.output_size_in_bytes)
    # Old plans have no peak; everything alive at once bounds it.
    peak = int(getattr(plan, "peak_memory_in_bytes", 0)) or temp + arguments + outputs
    return Memory(temp=temp, arguments=arguments, outputs=outputs, peak=peak)


def _git(*arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__).resolve()
    done = subprocess.run(
        [git, "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    # An installed copy may lie inside somebody else's repository: ask whether it is tracked.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "") if commit else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Device, versions, commit and load: what must stand beside a measured number.

    Example:
        >>> sorted(environment())
        ['commit', 'cores', 'device', 'load', 'platform', 'processor', 'python', 'versions', 'x64']
    """
    device = jax.devices()[0]
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "x64": bool(jax.config.read("jax_enable_x64")),
    }


def _rows(value: Any) -> Any:
    if isinstance(value, Timing):
        return {"median": value.median, "best": value.best, "samples": list(value.samples)}
    if isinstance(value, Memory):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _rows(item) for key, item in value.items()}
    return [_rows(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write a record (plain values, `Timing`, `Memory`) in one piece: a kill leaves no half file.

    Example:
        >>> import json, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_json(Path(folder) / "a" / "b.json", {"t": Timing("t", (1.5, 2.5))})
        ...     json.loads(path.read_text())["t"]["median"]
        2.0
    """
    path = Path(path)
    runfolder.write_json(path, _rows(record))
    return path
