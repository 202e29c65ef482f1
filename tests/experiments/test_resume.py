"""A run killed with SIGKILL, at moments that nobody chose, ends as one that was left alone."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jaxkit_experiments.runner import run_experiment
from rich.console import Console

from tests.experiments.tiny import Config, Tiny
from tests.tolerance import tol

ROOT = Path(__file__).parents[2]
CONFIG = Config(steps=24, pause=0.01)


def command(out):
    line = [sys.executable, "-m", "tests.experiments.tiny", "run", "tiny", "--out", str(out)]
    return [*line, "--steps", str(CONFIG.steps), "--pause", str(CONFIG.pause)]


def environment():
    path = [str(ROOT / name) for name in ("", "kernels", "experiments")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",  # as in this process
    }


def progress(out):
    """How much the run has written: grows with every record, checkpoint and finished arm."""
    log = out / "metrics.jsonl"
    return log.stat().st_size if log.exists() else 0


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_metrics(tmp_path):
    whole = run_experiment(
        Tiny(), CONFIG, tmp_path / "whole", console=Console(file=io.StringIO())
    ).results
    out = tmp_path / "killed"
    rng = random.Random(os.getpid())
    kills, moments = 0, []
    deadline = time.monotonic() + 240
    while kills < 3:
        before = progress(out)
        process = subprocess.Popen(
            command(out), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
        )
        # Wait until this process has trained something, then anything up to half a second.
        while progress(out) == before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        moments.append(progress(out))
    assert kills >= 1
    result = run_experiment(Tiny(), CONFIG, out, console=Console(file=io.StringIO())).results
    near = tol("float32", 24 * 16)
    for arm in whole.arms:
        for name in whole.metrics(arm):
            np.testing.assert_allclose(
                result.metric(arm, name),
                whole.metric(arm, name),
                rtol=near,
                atol=near,
                err_msg=f"killed with {moments} bytes of metrics",
            )
    records = [read(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert [identify(record) for record in records[0]] == [
        identify(record) for record in records[1]
    ]
    for one, other in zip(*records, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=near, atol=near)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def identify(record):
    return record["arm"], record["stage"], record["step"], record["split"]


class Died(BaseException):
    """Stands for SIGKILL: nothing catches it but the test."""


@pytest.mark.parametrize(
    "moment", ["record", "checkpoint", "manifest", "pruning", "result", "summary"]
)
def test_every_place_where_it_may_die(tmp_path, monkeypatch, moment):
    """Death between any two writes: cut there, resume, compare the whole folder."""
    from jaxkit_experiments import checkpoints, runfolder, runner

    config = Config(steps=8, arms=("line",))
    quiet = lambda: Console(file=io.StringIO())
    whole = run_experiment(Tiny(), config, tmp_path / "whole", console=quiet())

    class Half(runfolder.MetricLog):
        def append(self, record):
            if record["step"] == 6:
                with self.path.open("a") as file:
                    file.write('{"arm": "line", "stage": "tr')
                raise Died
            super().append(record)

    def die(*_, **__):
        raise Died

    original = runner.write_json

    def die_at(name):
        def write(path, value):
            if path.name == name:
                raise Died
            original(path, value)

        return write

    with monkeypatch.context() as patch:
        if moment == "record":
            patch.setattr("jaxkit_experiments.experiment.MetricLog", Half)
        elif moment == "checkpoint":
            patch.setattr("orbax.checkpoint.StandardCheckpointer.save", die)
        elif moment == "manifest":
            # As after a kill, the unfinished folder stays.
            patch.setattr(checkpoints, "write_json", die)
            patch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)
        elif moment == "pruning":
            patch.setattr(checkpoints.Checkpoints, "_steps", lambda self: [][self.die()])
            patch.setattr(checkpoints.Checkpoints, "die", die, raising=False)
            patch.setattr(checkpoints.Checkpoints, "restore", lambda self, template: None)
        else:
            patch.setattr(runner, "write_json", die_at(f"{moment}.json"))
        with pytest.raises(Died):
            run_experiment(Tiny(), config, tmp_path / "killed", console=quiet())
    console = quiet()
    again = run_experiment(Tiny(), config, tmp_path / "killed", console=console)
    assert ("warning" in console.file.getvalue()) == (moment in ("record", "manifest"))
    assert again.summary["arms"] == whole.summary["arms"]
    log = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert log[0] == log[1]
