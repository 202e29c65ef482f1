"""The command line: what it prints, what it returns, and one line for each mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest
from jaxkit_experiments import REGISTRY
from jaxkit_experiments.cli import main

from tests.experiments import tiny


def test_list_names_all_without_importing_jax():
    program = (
        "import sys; from jaxkit_experiments.cli import main; main(['list', '--names']);"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.split() == [name for name in REGISTRY if name != "tiny"]


def test_list_shows_titles(capsys):
    assert main(["list"]) == 0
    assert any(
        line.split(maxsplit=1) == ["tiny", "A line and a curve <fitted> to a sum"]
        for line in capsys.readouterr().out.splitlines()
    )


def test_run_with_overrides_then_again_then_fresh(tmp_path, capsys):
    out = str(tmp_path / "r")
    base = ["run", "tiny", "--preset", "smoke", "--out", out, "--learning-rate", "0.05"]
    base += ["--seeds", "4", "--arms", "line"]
    assert main(base) == 0
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config["preset"] == "smoke"
    assert config["config"] == {
        "seeds": [4],
        "arms": ["line"],
        "steps": 4,
        "learning_rate": 0.05,
        "pause": 0.0,
        "poison": -1,
    }
    assert "line: error" in capsys.readouterr().out
    assert main([*base, "--resume"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert main([*base, "--steps=6"]) == 1
    assert "steps 4 instead of 6" in capsys.readouterr().err
    assert main([*base, "--steps=6", "--fresh"]) == 0
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert "1 run\n" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rum"], "unknown command 'rum'; did you mean run?"),
        (["run"], "takes the NAME of an experiment first"),
        (["run", "tinny"], "unknown experiment 'tinny'; did you mean tiny?"),
        (["run", "zzz"], "there are: "),
        (["run", "tiny", "--preset", "smok"], "unknown preset 'smok'; did you mean smoke?"),
        (["run", "tiny", "--preset", "x"], "there are: smoke, cpu, gpu"),
        (["run", "tiny", "--stps", "3"], "unknown override '--stps'; did you mean --steps?"),
        (["run", "tiny", "--learning_rat=3"], "did you mean --learning-rate?"),
        (["run", "tiny", "--steps", "many"], "--steps: invalid literal for int()"),
        (["run", "tiny", "--steps", "0"], "steps must be at least 1; got 0"),
        (["run", "tiny", "--arms", "lin"], "unknown arm 'lin'; did you mean line?"),
        (["run", "tiny", "--data", "/nowhere"], "--data must be a file or a folder"),
        (["run", "tiny", "--resume", "--fresh"], "not allowed with argument --resume"),
        (["run", "tiny", "--resume", "--out", "/nowhere"], "there is no run in /nowhere"),
        (["run", "tiny", "stray"], "stray"),
        (["list", "--nmes"], "--nmes"),
        (["report", "/nowhere"], "no run folder in /nowhere"),
        (["bench", "smm"], "unknown benchmark 'smm'; did you mean ssm?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("jaxkit: error: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_non_finite_loss_is_one_line_and_exit_code_1(tmp_path, capsys):
    out = tmp_path / "r"
    assert main(["run", "tiny", "--out", str(out), "--poison", "5"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "line: non-finite loss or parameters at step 5 (seed 0, 1)" in error
    assert "last finite metrics: loss" in error
    assert "last_finite_00000005" in error
    assert (out / "arms/line/checkpoints/train/last_finite_00000005/manifest.json").exists()


def test_a_value_that_a_check_refuses_is_one_line_but_a_fault_is_shown(
    monkeypatch, tmp_path, capsys
):
    from jaxkit._checks import check_int

    def refuse(self, config, arm, ctx):
        check_int("batch_size", 0, least=1)

    def fault(self, config, arm, ctx):
        int("one")

    def missing(self, config, arm, ctx):
        np.load("/nowhere")

    out = ["run", "tiny", "--out", str(tmp_path / "r")]
    monkeypatch.setattr(tiny.Tiny, "run_arm", refuse)
    assert main(out) == 1
    assert capsys.readouterr().err == "jaxkit: error: batch_size must be at least 1; got 0.\n"
    monkeypatch.setattr(tiny.Tiny, "run_arm", missing)
    assert main(out) == 1
    assert "No such file or directory: '/nowhere'" in capsys.readouterr().err
    monkeypatch.setattr(tiny.Tiny, "run_arm", fault)
    with pytest.raises(ValueError, match="invalid literal"):
        main(out)


def test_an_interrupt_is_one_line(monkeypatch, tmp_path, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny.Tiny, "run_arm", stop)
    assert main(["run", "tiny", "--out", str(tmp_path / "r")]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["run", "tiny", "--help"], ["bench", "--help"]]
)
def test_help(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "NAME" in printed
    if "tiny" in arguments:
        assert "--learning-rate" in printed
