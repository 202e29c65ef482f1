"""The mixed-precision experiment: its arms differ in what they are said to differ in."""

import dataclasses

import numpy as np
import pytest
from jaxkit_experiments.experiment import Context, Results
from jaxkit_experiments.optim.precision import MixedPrecision, MixedPrecisionConfig

from tests.settings import users_settings

CONFIG = MixedPrecisionConfig(
    arms=(
        "float32",
        "float16",
        "float16-dynamic",
        "fault-none",
        "traps-mask",
        "traps-epsilon",
        "traps-none",
    ),
    seeds=(0, 1),
    steps=40,
    batch_size=64,
    width=16,
    fault_run=3,
    report_every=20,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    experiment, folder = MixedPrecision(), tmp_path_factory.mktemp("run")
    run = lambda arm: experiment.run_arm(CONFIG, arm, Context(folder).for_arm(arm))
    # As a user runs it, with 32-bit types and the usual promotion.
    with users_settings():
        return Results(CONFIG, {arm: run(arm) for arm in CONFIG.arms}), folder


def test_float16_gradients_are_zeros_unless_scaled(results):
    results, _ = results
    assert results.mean("float16", "zeros") > 0.9
    assert results.mean("float16-dynamic", "zeros") < 0.3
    full, scaled = (results.metric(arm, "train_loss") for arm in ("float32", "float16-dynamic"))
    np.testing.assert_allclose(scaled, full, rtol=0.02)
    assert results.mean("float16", "train_loss") > 1.3 * full.mean()


def test_faults_and_traps_end_in_nan_and_count_as_wrong(results):
    results, _ = results
    for arm in ("fault-none", "traps-mask", "traps-epsilon"):
        assert results.mean(arm, "accuracy") == 0.0
        assert not results.has(arm, "train_loss")
    assert results.mean("traps-none", "accuracy") > 0.2


def test_claims_and_plot(results):
    results, folder = results
    claims = {claim.text: claim.judge(results) for claim in MixedPrecision.claims}
    assert sum(v.status == "not testable" for v in claims.values()) == 5, claims
    plots = MixedPrecision().plot(results, Context(folder))
    assert all(path.stat().st_size > 10_000 for path in plots)


def test_presets_and_errors():
    assert {"smoke", "cpu", "gpu"} == set(MixedPrecision.presets)
    assert MixedPrecision.presets["cpu"].arms == MixedPrecision.arms
    for change, message in (
        ({"arms": ("float17",)}, "arms must be one of"),
        ({"fault_rate": 2.0}, "fault_rate must be"),
        ({"steps": 0}, "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)
