"""The mixed-precision experiment: its arms differ in what they are said to differ in."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from jaxkit_experiments.experiment import Results
from jaxkit_experiments.optim.precision import (
    CARD,
    LANGUAGE,
    MixedPrecision,
    MixedPrecisionConfig,
    data,
    faulty,
    task,
    transformer,
)

from tests.experiments.smoke import smoke_run
from tests.settings import users_settings

CONFIG = MixedPrecisionConfig(
    arms=(
        "float32",
        "float16",
        "float16-dynamic",
        "fault-none",
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
    # As a user runs it, with 32-bit types and the usual promotion.
    ctx, _, arms = smoke_run(MixedPrecision(), tmp_path_factory.mktemp("run"), CONFIG)
    return Results(CONFIG, arms), ctx


def test_float16_gradients_are_zeros_unless_scaled(results):
    results, _ = results
    assert results.mean("float16", "zeros") > 0.9
    assert results.mean("float16-dynamic", "zeros") < 0.3
    full, scaled = (results.metric(arm, "train_loss") for arm in ("float32", "float16-dynamic"))
    np.testing.assert_allclose(scaled, full, rtol=0.02)
    assert results.mean("float16", "train_loss") > 1.3 * full.mean()


def test_faults_end_in_nan_and_count_as_wrong(results):
    results, _ = results
    assert results.mean("fault-none", "accuracy") == 0.0
    assert not results.has("fault-none", "train_loss")


@pytest.mark.parametrize("traps", [(), ("mask",), ("epsilon",)])
def test_each_trap_alone_gives_nan_in_float16(traps):
    made = task(CONFIG, "traps-none")
    with users_settings():
        params, _ = jax.jit(made.init)(jax.random.key(0))
        weights, images = made.policy.cast_to_compute((params, data("traps-none")[2][:64]))
        logits = jax.jit(partial(transformer, traps=traps))(weights, images)
    assert logits.dtype == np.float16
    assert bool(np.isfinite(logits).all()) == (not traps)


def test_the_language_model_computes_in_the_types_of_its_arm():
    assert "vq-float16" in MixedPrecision.presets["smoke"].arms  # which the CI runs
    tokens = data("vq-float16")[0][:2]
    assert (tokens.min(), tokens.max()) == (0, 16)
    assert MixedPrecision.presets["cpu"].arms[-3:] == LANGUAGE
    for arm, kind in (("vq-bfloat16", "bf16"), ("vq-float16", "f16")):
        made = task(CONFIG, arm)
        with users_settings():
            params, rest = jax.eval_shape(made.init, jax.random.key(0))
            assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
            compute = made.policy.cast_to_compute(params)
            text = str(jax.make_jaxpr(made.logits)(compute, rest, tokens))
        attention = [line for line in text.splitlines() if "dot_general" in line]
        assert sum(f" {kind}[" in line or f":{kind}[" in line for line in attention) > 5


def test_faults_come_as_often_as_the_config_says():
    steps = range(400)
    config = dataclasses.replace(CONFIG, steps=400, fault_rate=0.1)
    bad = np.asarray([[faulty(config, seed, step) for step in steps] for seed in range(5)])
    assert bad[:, 200:203].all()
    np.testing.assert_allclose(bad.mean(), 0.1 + 0.9 * 3 / 400, atol=4 * np.sqrt(0.09 / 2000))
    assert not np.array_equal(bad[0], bad[1])


def test_claims_and_plot(results):
    results, ctx = results
    claims = {claim.text: claim.judge(results) for claim in MixedPrecision.claims}
    assert sum(v.status == "not testable" for v in claims.values()) == 6, claims
    claim = MixedPrecision.claims[-1]
    for loss, status in ((1.01, "held"), (0.97, "not held"), (1.03, "not held")):
        losses = dict(zip(LANGUAGE, (1.0, 1.0, loss), strict=True))
        made = Results(CONFIG, {arm: {"train_loss": [x]} for arm, x in losses.items()})
        assert claim.judge(made).status == status
    plots = MixedPrecision().plot(results, ctx)
    assert all(path.stat().st_size > 10_000 for path in plots)


def test_presets_and_errors():
    assert {"smoke", "cpu", "gpu"} == set(MixedPrecision.presets)
    assert MixedPrecision.presets["cpu"].arms == MixedPrecision.arms
    assert set(MixedPrecision.paper) == set(CARD) < set(MixedPrecision.arms)
    for change, message in (
        ({"arms": ("float17",)}, "arms must be one of"),
        ({"fault_rate": 2.0}, "fault_rate must be"),
        ({"steps": 0}, "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)
