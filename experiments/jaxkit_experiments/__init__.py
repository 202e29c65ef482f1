"""Experiments that reproduce papers' claims, and benchmarks: `jaxkit list | run | report | bench`.

`REGISTRY` maps each experiment's name to where its class is; nothing is imported until it is asked
for, so that `jaxkit list` starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxkit_experiments.experiment import Experiment

__all__ = ["REGISTRY", "load_experiment"]

# One line an experiment: name, "module:Class".
REGISTRY: dict[str, str] = {
    "s4-digits": "jaxkit_experiments.ssm.sequence_tasks:Digits",
    "s4-permuted-digits": "jaxkit_experiments.ssm.sequence_tasks:PermutedDigits",
    "s4-rate-change": "jaxkit_experiments.ssm.sequence_tasks:RateChange",
    "s4-copying": "jaxkit_experiments.ssm.sequence_tasks:Copying",
    "s4-selective-copying": "jaxkit_experiments.ssm.sequence_tasks:SelectiveCopying",
    "s4-delay": "jaxkit_experiments.ssm.sequence_tasks:Delay",
    "s4-adding": "jaxkit_experiments.ssm.sequence_tasks:Adding",
    "s4-listops": "jaxkit_experiments.ssm.sequence_tasks:ListOps",
    "hippo-reconstruction": "jaxkit_experiments.ssm.reconstruction:Reconstruction",
    "s4-kernel-speed": "jaxkit_experiments.ssm.kernel_speed:KernelSpeed",
    "vq-markov": "jaxkit_experiments.vq.markov:Markov",
    "vq-language-model": "jaxkit_experiments.vq.language_model:LanguageModel",
    "vq-digits": "jaxkit_experiments.vq.digits:DigitsVQ",
    "vq-digits-sweep": "jaxkit_experiments.vq.digits_sweep:DigitsVQSweep",
    "attention-constant-space": "jaxkit_experiments.vq.constant_space:ConstantSpace",
    "attention-scratchpad": "jaxkit_experiments.vq.scratchpad:Scratchpad",
    "eg-sparse-regression": "jaxkit_experiments.optim.sparse_regression:SparseRegression",
    "eg-step-sizes": "jaxkit_experiments.optim.step_sizes:StepSizeAdaptation",
    "optim-embeddings": "jaxkit_experiments.optim.embeddings:EmbeddingAnomaly",
    "optim-language-model": "jaxkit_experiments.optim.language_model:OptimizerComparison",
    "multitask-toy": "jaxkit_experiments.optim.multitask:Toy",
    "multitask-digits": "jaxkit_experiments.optim.multitask:Digits",
    "batch-size": "jaxkit_experiments.optim.batch_size:BatchSize",
    "sgd-bound": "jaxkit_experiments.optim.sgd_bound:SGDBound",
    "mixed-precision": "jaxkit_experiments.optim.precision:MixedPrecision",
}


def load_experiment(name: str) -> Experiment:
    """The experiment registered as `name`.

    Raises:
      ValueError: no experiment has this name; the message lists the nearest ones.

    Example:
      >>> load_experiment("no-such-experiment")
      Traceback (most recent call last):
      ...
      ValueError: experiment must be one of ...; got 'no-such-experiment'.
    """
    from jaxkit._checks import check_choice

    check_choice("experiment", name, REGISTRY)
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()
