"""Two processes that train together over loopback give what one device gives."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jaxkit_experiments.runner import run_experiment
from rich.console import Console

from tests.experiments.tiny import Config, Tiny
from tests.tolerance import tol

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(out):
    port = free_port()
    path = [str(ROOT / name) for name in ("", "kernels", "experiments")]
    processes = []
    for index in range(2):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": "1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        arguments = ["run", "tiny", "--out", str(out), "--steps", "8", "--arms", "line"]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.experiments.tiny", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [printed for printed, _ in outputs]


@pytest.mark.slow
def test_two_processes_equal_one_device_and_resume(tmp_path):
    config = Config(steps=8, arms=("line",))
    alone = run_experiment(Tiny(), config, tmp_path / "one", console=Console(file=io.StringIO()))
    out = tmp_path / "two"
    first, second = run_two(out)
    assert "line: error" in first
    assert "line" not in second  # one process speaks and writes
    near = tol("float32", 8 * 16)

    def check():
        summary = json.loads((out / "summary.json").read_text())
        for name in ("error", "bias"):
            np.testing.assert_allclose(
                summary["arms"]["line"][name],
                alone.results.metric("line", name),
                rtol=near,
                atol=near,
            )
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]

    check()
    here = json.loads((out / "environment.json").read_text())
    assert here["device"]["processes"] == 2
    assert here["device"]["count"] == 4
    # As if both had been killed after the checkpoint of step 4.
    (out / "summary.json").unlink()
    (out / "arms/line/result.json").unlink()
    manifest = out / "arms/line/checkpoints/train/step_00000008/manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    first, _ = run_two(out)
    assert "step_00000008 is not used" in first.replace("\n", "")
    check()
