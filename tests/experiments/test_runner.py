"""Run folders, arms, claims and the faults of a run, with an experiment that takes a second."""

import dataclasses
import io
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jaxkit_experiments import environment
from jaxkit_experiments.experiment import Claim, Context, Experiment, Results, Verdict
from jaxkit_experiments.runfolder import (
    MetricLog,
    RunError,
    RunLocked,
    RunWarning,
    lock,
    write_json,
)
from jaxkit_experiments.runner import run_experiment
from rich.console import Console

from tests.experiments.tiny import Config, Tiny


def run(path, config=None, experiment=None, width=100, **options):
    console = Console(file=io.StringIO(), width=width)
    result = run_experiment(
        experiment or Tiny(), config or Config(), path, console=console, **options
    )
    return result, console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    return path, *run(path, preset="cpu")


def test_the_folder_holds_what_the_run_was_and_found(finished):
    path, result, _ = finished
    config = json.loads((path / "config.json").read_text())
    assert config["experiment"] == "tiny"
    assert config["config"]["steps"] == 12
    here = json.loads((path / "environment.json").read_text())
    assert here["versions"]["jax"] == jax.__version__
    assert here["device"]["platform"] == "cpu"
    summary = json.loads((path / "summary.json").read_text())
    assert summary["arms"]["line"]["error"] == result.results.metric("line", "error").tolist()
    assert summary["plots"] == ["plots/curve-loss-train.png", "plots/curve-bias-train.png"]
    assert (path / "plots/curve-loss-train.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["arm"], r["step"]) for r in records] == [
        (arm, step) for arm in ("line", "curve") for step in range(2, 13, 2)
    ]
    assert (path / "arms/line/checkpoints/train/step_00000012").is_dir()


def test_no_number_is_cut_off_on_a_narrow_terminal(finished):
    path, *_ = finished
    _, printed = run(path, preset="cpu", width=20)
    head, *rows = printed[printed.index("\narm ") :].strip().splitlines()[:3]
    assert head.split()[:3] == ["arm", "error", "paper"]
    assert all("…" not in row and "±" in row for row in rows)


def test_prints_the_table_beside_the_paper_and_the_claims(finished):
    _, result, printed = finished
    mean, spread = result.results.mean("line", "error"), result.results.spread("line", "error")
    (row,) = [line for line in printed.splitlines() if line.startswith("line")]
    assert f"{mean:.4g} ± {spread:.2g}" in row
    assert "0.25" in row
    assert "held: The line fits better than the curve (a source)" in printed
    assert "not held: The line has no error at all" in printed
    assert "not testable: The absent arm is best" in printed
    assert "arm 'absent' was not run" in printed
    assert "weights of the line: (2, 2, 1)" in printed
    assert [verdict.status for verdict in result.verdicts] == ["held", "not held", "not testable"]


class Counting(Tiny):
    """Counts the arms that it runs, and can fail in one."""

    def __init__(self, fail=None):
        self.ran, self.fail = [], fail

    def run_arm(self, config, arm, ctx):
        self.ran.append(arm)
        ctx.log(note="started")
        if arm == self.fail:
            raise RunError("stopped by the test")
        return {"error": [float(seed) for seed in config.seeds]}

    def plot(self, results, ctx):
        return []

    def epilogue(self, results, ctx):
        return None


def test_a_finished_run_is_shown_again_without_computing(tmp_path):
    first, _ = run(tmp_path / "r", experiment=Counting())
    counting = Counting()
    again, printed = run(tmp_path / "r", experiment=counting)
    assert counting.ran == []
    assert "finished before" in printed
    assert "not testable: The absent arm is best" in printed
    assert again.verdicts == first.verdicts
    assert again.summary == json.loads((tmp_path / "r/summary.json").read_text())


def test_resumes_at_the_arm_that_was_not_done(tmp_path):
    with pytest.raises(RunError, match="stopped by the test"):
        run(tmp_path / "r", experiment=Counting(fail="curve"))
    counting = Counting()
    result, printed = run(tmp_path / "r", experiment=counting)
    assert counting.ran == ["curve"]
    assert "done before" in printed
    assert result.results.metric("line", "error").tolist() == [0.0, 1.0]
    records = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert records == [{"arm": arm, "note": "started"} for arm in ("line", "curve")]
    here = json.loads((tmp_path / "r/environment.json").read_text())
    assert len(here["resumed"]) == 1


def test_a_corrupt_arm_is_reported_and_run_again(tmp_path):
    run(tmp_path / "r", experiment=Counting())
    (tmp_path / "r/summary.json").unlink()
    (tmp_path / "r/arms/line/result.json").write_text('{"metrics": {"err')
    counting = Counting()
    _, printed = run(tmp_path / "r", experiment=counting)
    assert counting.ran == ["line"]
    assert "warning:" in printed
    assert "arms/line/result.json is corrupt" in printed.replace("\n", "")


def test_fresh_starts_anew(tmp_path):
    run(tmp_path / "r", experiment=Counting())
    counting = Counting()
    run(tmp_path / "r", Config(steps=5), experiment=counting, fresh=True)
    assert counting.ran == ["line", "curve"]
    assert len((tmp_path / "r/metrics.jsonl").read_text().splitlines()) == 2


def test_another_config_is_refused_by_the_fields_that_differ(tmp_path):
    run(tmp_path / "r", experiment=Counting())
    with pytest.raises(RunError, match=r"holds a run with steps 12 instead of 13; pause 0.0 inst"):
        run(tmp_path / "r", Config(steps=13, pause=0.1), experiment=Counting())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(RunError, match="not a run folder"):
            run(tmp_path, experiment=Counting(), fresh=fresh)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("killed_at", ["config.json", "environment.json"])
def test_killed_while_making_the_folder(tmp_path, monkeypatch, killed_at):
    def write(path, value):
        if path.name == killed_at:
            path.with_name(f".{path.name}.1.tmp").write_text("{")
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr("jaxkit_experiments.runner.write_json", write)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "r", experiment=Counting())
    run(tmp_path / "r", experiment=Counting())
    assert (tmp_path / "r/environment.json").exists()


def test_progress_shows_loss_and_speed(tmp_path):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    config = Config(steps=8, arms=("line",), pause=0.1)
    run_experiment(Tiny(), config, tmp_path / "r", console=console)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert re.search(r"line .*[246]/8 +loss [0-9.]+ +steps/s [0-9.]+", shown), shown


def test_two_runs_cannot_share_a_folder(tmp_path):
    program = (
        "import sys, pathlib\n"
        "from jaxkit_experiments.runfolder import lock\n"
        "with lock(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "r")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunLocked, match=f"in use by process {other.pid} on"):
            run(tmp_path / "r", experiment=Counting())
    finally:
        # However its holder ends, the lock is free again.
        other.kill()
        other.communicate()
    with lock(tmp_path / "r"):
        pass


def test_metrics_need_one_value_for_each_seed(tmp_path):
    class Short(Counting):
        def run_arm(self, config, arm, ctx):
            return {"error": [1.0]}

    with pytest.raises(ValueError, match=r"metric 'error' of arm 'line' must .* 3 seeds; got 1"):
        run(tmp_path, Config(seeds=(0, 1, 2)), experiment=Short())


def test_unknown_arms_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"arms must be one of .*got 'lines'. Did you mean 'line'"):
        run(tmp_path, Config(arms=("lines",)))


def test_non_finite_metrics_survive_the_folder(tmp_path):
    class Odd(Counting):
        def run_arm(self, config, arm, ctx):
            return {"error": [float("nan"), float("inf")]}

    first, printed = run(tmp_path / "r", experiment=Odd())
    (tmp_path / "r/summary.json").unlink()
    again, _ = run(tmp_path / "r", experiment=Odd())
    for result in (first, again):
        assert result.results.metric("line", "error").tolist() == [float("inf")]
    assert "inf" in printed


def test_a_cut_metrics_line_is_reported_and_dropped(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.append({"arm": "a", "step": 1})
    log.append({"arm": "b", "step": 1})
    with log.path.open("a") as file:
        file.write('{"arm": "b", "st')
    with pytest.warns(RunWarning, match=r"metrics.jsonl, line 3: not a whole record; dropped"):
        assert log.read() == [{"arm": "a", "step": 1}, {"arm": "b", "step": 1}]
    with pytest.warns(RunWarning):
        log.drop(arm="b")
    assert log.path.read_text() == '{"arm": "a", "step": 1}\n'


def test_results_say_what_there_is():
    results = Results(None, {"a": {"x": [1.0, np.nan, 3.0], "y": [np.nan]}, "b": {"x": [2.0]}})
    assert results.metric("a", "x").tolist() == [1.0, 3.0]
    assert results.mean("a", "x") == 2.0
    assert results.spread("a", "x") == pytest.approx(np.sqrt(2))
    assert results.spread("b", "x") == 0.0
    assert [results.has(*each) for each in (("a", "x"), ("a", "y"), ("b", "y"), ("c", "x"))] == [
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(KeyError, match="arm 'a' has no metric 'z'; it has x, y"):
        results.metric("a", "z")
    with pytest.raises(KeyError, match=r"arm 'c' was not run \(there are: a, b\)"):
        results.metric("c", "x")
    # A misspelt metric is a mistake of the claim, not a claim that cannot be tested.
    claim = Claim("t", "s", lambda results: Verdict.of(results.mean("a", "acuracy") > 0))
    with pytest.raises(KeyError, match="acuracy"):
        claim.judge(results)
    with pytest.raises(ValueError, match="status must be one of"):
        Verdict("maybe")


def test_arrays_and_their_names(tmp_path):
    ctx = Context(tmp_path)
    ctx.save_arrays("confusion", counts=np.eye(3))
    np.testing.assert_array_equal(ctx.load_arrays("confusion")["counts"], np.eye(3))
    with pytest.raises(KeyError, match=r"no arrays 'other'.*\['confusion'\]"):
        ctx.load_arrays("other")


def test_an_installed_copy_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.commit() is None


def test_an_experiment_must_say_how_an_arm_runs():
    with pytest.raises(TypeError, match="run_arm"):
        Experiment()
    assert dataclasses.is_dataclass(Config)
