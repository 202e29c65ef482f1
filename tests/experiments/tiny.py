"""A whole experiment that trains in a second, and a command line that knows it.

python -m tests.experiments.tiny run tiny --out DIR
"""

import dataclasses
import sys
import time
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxkit_experiments import REGISTRY
from jaxkit_experiments.cli import main
from jaxkit_experiments.experiment import Claim, Experiment, Verdict
from jaxkit_experiments.training import train


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (0, 1)
    arms: tuple[str, ...] = ("line", "curve")
    steps: int = 12
    learning_rate: float = 0.1
    pause: float = 0.0  # seconds to wait for a batch, so that a test can kill the run
    poison: int = -1  # step whose batch is not finite

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}.")


class Batches:
    def __init__(self, seed, config):
        self.seed, self.config = seed, config

    def __getitem__(self, step):
        time.sleep(self.config.pause)
        x = np.random.default_rng((self.seed, step)).standard_normal((16, 2)).astype(np.float32)
        y = x.sum(1) if step != self.config.poison else x.sum(1) * np.inf
        return {"x": x, "y": y}


def init(key):
    return nnx.Linear(2, 1, rngs=nnx.Rngs(key))


class Tiny(Experiment):
    name = "tiny"
    title = "A line and a curve <fitted> to a sum"
    description = "Two arms learn x₀ + x₁; the curve cannot."
    sources = ("Nobody 2020 (arXiv 0000.00000)",)
    config_class = Config
    presets: ClassVar = {"smoke": Config(steps=4), "cpu": Config(), "gpu": Config(steps=100)}
    arms = ("line", "curve", "absent")
    columns = ("error", "bias")
    paper: ClassVar = {"line": {"error": 0.25}}
    paper_note = "The paper <drew> with a ruler."
    claims = (
        Claim(
            "The line fits better than the curve",
            "a source",
            lambda results: Verdict.of(
                results.mean("line", "error") < results.mean("curve", "error"),
                f"{results.mean('line', 'error'):.3g} against {results.mean('curve', 'error'):.3g}",
            ),
        ),
        Claim(
            "The line has no error at all",
            "a source",
            lambda results: Verdict.of(results.mean("line", "error") == 0.0),
        ),
        Claim(
            "The absent arm is best",
            "a source",
            lambda results: Verdict.of(results.mean("absent", "error") == 0.0),
        ),
    )

    def run_arm(self, config, arm, ctx):
        squash = jnp.tanh if arm == "curve" else lambda x: x

        def loss(model, batch, key):
            error = squash(model(batch["x"]))[:, 0] - batch["y"]
            return jnp.mean(error**2), {"bias": jnp.mean(error)}

        result = train(
            init=init,
            loss=loss,
            optimizer=optax.sgd(config.learning_rate),
            batches=lambda seed: Batches(seed, config),
            steps=config.steps,
            seeds=config.seeds,
            chunk=2,
            checkpoint_every=4,
            ctx=ctx,
        )
        ctx.save_arrays(f"weights-{arm}", kernel=result.params["kernel"][...])
        return {"error": result.metrics["loss"], "bias": result.metrics["bias"]}

    def epilogue(self, results, ctx):
        return f"weights of the line: {ctx.load_arrays('weights-line')['kernel'].shape}"


REGISTRY["tiny"] = "tests.experiments.tiny:Tiny"

if __name__ == "__main__":
    sys.exit(main())
