"""Real compilation for TPU v5e, TPU v6e and H200, on a machine that has none of them."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.kernels.cases import CASES, OPERATIONS

ROOT = pathlib.Path(__file__).parents[2]
COMPILERS = {
    "v5e:2x2": ("libtpu",),
    "v6e:2x2": ("libtpu",),
    "h200": ("jax_plugins.xla_cuda13", "jax_cuda13_plugin"),
}


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("target", list(COMPILERS))
def test_every_kernel_compiles(target):
    missing = [module for module in COMPILERS[target] if not _present(module)]
    if missing:
        pytest.skip(f"no compiler for {target}: {', '.join(missing)} is absent (extra `aot`)")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env.pop("XLA_FLAGS", None)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.kernels.aot_worker", target],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    records = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    programs = [operation.programs("auto") for operation in OPERATIONS.values()]
    assert len(records) == 4 * len(CASES) + 2 * sum(len(names) for names in programs)
    for record in records:
        assert "error" not in record, record
        assert record["kernel"], f"the kernel was passed over: {record}"
        # Beside a few KiB that any program takes.
        assert record["temporary"] < record["limit"] + (1 << 18), record
