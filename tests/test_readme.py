"""The README's Python runs as it stands, block after block, as a reader would type it."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jaxkit_experiments

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order_and_print_what_is_said():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    # As a user has it: 32-bit types, one device, none of this suite's settings.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "kernels:experiments"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    error, shape, losses, streamed, sampled, by_tiger = done.stdout.splitlines()
    assert 0 < float(error) < 1e-2
    assert shape.startswith("(4, 100, 16)")
    assert float(shape.split()[-1]) < 1e-4
    first, *_, last = json.loads(losses)
    assert last < first
    assert float(streamed) < 1e-4
    assert sampled == "(2, 5)"
    first, *_, last = json.loads(by_tiger)
    assert last < first


def test_experiments_that_are_named_exist():
    named = re.findall(r"jaxkit run (\S+)", README)
    assert named
    assert set(named) <= set(jaxkit_experiments.REGISTRY)
