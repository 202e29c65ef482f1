"""The constant-space experiment: its parts against other forms, and claims that can fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxkit_experiments.experiment import Results
from jaxkit_experiments.vq import constant_space as space
from jaxkit_experiments.vq.constant_space import ConstantSpace

from jaxkit.attention import streaming
from jaxkit.attention.streaming import costs
from tests.experiments.smoke import smoke_run

CPU = ConstantSpace.presets["cpu"]


def test_dense_outputs_are_those_of_the_layerwise_form():
    model, params, tokens = space.random_problem(2, 9, 0, dim=4, dtype=jnp.float64)
    dense = jax.jit(space.dense_outputs, static_argnums=0)(model, params, tokens)
    tiled = jax.jit(lambda p, t: streaming.layerwise(model, p, t))(params, tokens)
    np.testing.assert_allclose(dense, tiled, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ["kv_cache", "recompute"])
def test_the_program_whose_memory_is_measured_gives_the_last_output(mode):
    model, params, tokens = space.random_problem(2, 6, 0, dim=4, dtype=jnp.float64)
    got = jax.jit(space.program(mode, model, 6))(params, tokens)
    want = jax.jit(space.dense_outputs, static_argnums=0)(model, params, tokens)[-1]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    # And so does the call that is timed, however often it decodes the last token.
    if mode == "recompute":
        timed = space.newest_token(mode, model, params, tokens, count=2)
        np.testing.assert_allclose(timed(), want, rtol=0, atol=1e-13)


def test_the_timed_call_decodes_the_last_token_alone():
    model, params, tokens = space.random_problem(1, 6, 0, dim=4, dtype=jnp.float64)
    got = space.newest_token("kv_cache", model, params, tokens, count=3)()
    # Its buffers are zero elsewhere: five keys of score 0 and value 0 beside its own.
    layer = jax.tree.map(lambda w: w[0], params.layers)
    x, at = params.embed[tokens[-1]], jnp.int32(5)
    q = model.query(layer, x, at)
    k, v = model.key_value(layer, x, at)
    weight = jnp.exp(q @ k[0] * q.shape[-1] ** -0.5)[:, None]
    want = model.block(layer, x, weight / (5 + weight) * v)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", ["newest-first", "oldest-first"])
@pytest.mark.parametrize("tile", [1, 4])
def test_accumulate_in_float64_is_exact(order, tile):
    rng = np.random.default_rng(0)
    scores, values = rng.standard_normal(32), rng.standard_normal((32, 3))
    m, l, o = space.accumulate(
        jnp.asarray(scores), jnp.asarray(values), order=order, tile=tile, dtype="float64"
    )
    out, lse = space.exact(scores, values)
    np.testing.assert_allclose(o / l, out, rtol=0, atol=1e-13)
    np.testing.assert_allclose(m + jnp.log(l), lse, rtol=0, atol=1e-13)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return smoke_run(ConstantSpace(), tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_smoke_preset_end_to_end(smoke):
    ctx, config, arms = smoke
    results = Results(config, arms)
    assert set(results.arms) == set(space.ARMS)
    for arm in config.arms:
        assert all(len(values) == len(config.seeds) for values in arms[arm].values())
    assert results.mean("recompute", "visits_N2_L8") == 44
    assert results.mean("grouped", "visits_N2_L8") == 44
    assert results.mean("kv_cache", "visits_N2_L8") == 16
    # The modes share one training: the loss is that of the same weights.
    losses = {round(results.mean(mode, "loss"), 5) for mode in space.MODES}
    assert len(losses) == 1
    verdicts = [claim.judge(results).status for claim in ConstantSpace.claims]
    # What needs long runs is not judged by short ones.
    not_testable = (2, 3, 6, 7)
    assert all(
        status == ("not testable" if place in not_testable else "held")
        for place, status in enumerate(verdicts)
    )
    paths = ConstantSpace().plot(results, ctx)
    assert [p.name for p in paths] == [
        "seconds-N2.png",
        "memory.png",
        "error-t1.png",
        "error-t64.png",
    ]
    assert all(path.stat().st_size > 5000 for path in paths)
    text = ConstantSpace().epilogue(results, ctx)
    assert "1,310,720" in text


def ideal():
    """Results as the closed forms and the card have them."""
    arms = {arm: {} for arm in space.ARMS}
    for mode in space.MODES:
        row = arms[mode]
        for N, lengths in zip(CPU.layers, CPU.timed, strict=True):
            if not space.fits(mode, N):
                continue
            for p in CPU.lengths:
                row[f"visits_N{N}_L{p}"] = costs.mode_visits(mode, N, p, group=space.group_of(mode))
            row[f"slope_N{N}"] = N if mode == "recompute" else 0.9
            row |= {f"seconds_N{N}_L{p}": 1e-3 for p in lengths}
        for p in CPU.memory_lengths:
            row[f"temp_L{p}"] = 1000 if mode == "recompute" else 1000 + 128 * p
        row |= {"deviation64": 1e-14, "deviation32": 1e-6, "loss": 2.4, "loss_gap": 1e-8}
    card = {"state-float32": 1e-7, "inputs-bfloat16": 1.4e-4, "state-bfloat16": 0.24}
    for arm, error in card.items():
        arms[arm]["error_newest-first_t1_S4096"] = error
        arms[arm]["short_newest-first_t1_S4096"] = 0.56 if arm == "state-bfloat16" else 0.0
    for arm in space.PIECES:
        arms[arm]["gap"] = 1e-7
    return {arm: {name: [value] * 3 for name, value in row.items()} for arm, row in arms.items()}


def judge(arms, config=CPU):
    return [claim.judge(Results(config, arms)).status for claim in ConstantSpace.claims]


def test_claims_hold_on_the_cards_numbers():
    assert judge(ideal()) == ["held"] * 9


@pytest.mark.parametrize(
    ("index", "arm", "metric", "value"),
    [
        (0, "recompute", "visits_N4_L64", 814_385),
        (0, "grouped", "visits_N4_L64", 4_287),
        (1, "recompute", "temp_L1024", 1008),
        (1, "kv_cache", "temp_L1024", 4_000),
        (2, "recompute", "slope_N3", 2.5),
        (3, "kv_cache", "slope_N2", 1.3),
        (4, "layerwise", "deviation64", 1e-11),
        (4, "kv_cache", "deviation32", 1e-4),
        (5, "input_cache", "loss_gap", 2e-6),
        (6, "state-bfloat16", "short_newest-first_t1_S4096", 0.1),
        (7, "state-float32", "error_newest-first_t1_S4096", 1e-5),
        (7, "inputs-bfloat16", "error_newest-first_t1_S4096", 1e-2),
        (7, "state-bfloat16", "error_newest-first_t1_S4096", 1e-3),
        (8, "decode-split", "gap", 1e-3),
    ],
)
def test_each_claim_fails_on_another_number(index, arm, metric, value):
    arms = ideal()
    assert metric in arms[arm]
    arms[arm][metric] = [value] * 3
    statuses = judge(arms)
    assert statuses.pop(index) == "not held"
    assert set(statuses) == {"held"}


def test_missing_arms_are_not_testable():
    statuses = judge({"kv_cache": ideal()["kv_cache"]})
    # Counts, the cached slope, outputs and losses are judged on the modes there are.
    assert [i for i, status in enumerate(statuses) if status == "held"] == [0, 3, 4, 5]
    assert set(judge({})) == {"not testable"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (2, 1, 3, 4)}, "layers must be growing positive integers"),
        ({"lengths": ()}, "lengths must be growing"),
        ({"timed": ((1, 2),)}, "timed must have lengths for each of the 4 layers"),
        ({"tiles": (3,)}, "tiles must divide all keys"),
        ({"dim": 3}, "dim must be even"),
        ({"train_steps": -1}, "train_steps must be at least 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"splits": 10_000}, "splits must be at most 4096"),
        ({"decode_dtype": "int8"}, "decode_dtype must be one of"),
        ({"seeds": ()}, "seeds must hold"),
        ({"arms": ("kvcache",)}, "Did you mean 'kv_cache'"),
    ],
)
def test_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CPU, **change)


def test_presets_are_the_cards():
    assert CPU.layers == (1, 2, 3, 4)
    assert 4096 in CPU.keys
    # Slopes are measured where a token costs 1e4 visits at least.
    assert all(
        costs.key_visits(N, lengths[0]) >= 10_000
        for N, lengths in zip(CPU.layers, CPU.timed, strict=True)
    )
    gpu = ConstantSpace.presets["gpu"]
    assert (gpu.decode_dtype, gpu.decode_keys[-1]) == ("bfloat16", 131_072)
    assert (gpu.prefill, gpu.prefill_chunk) == (32_768, 2_048)
