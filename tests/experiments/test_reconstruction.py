"""The reconstruction experiment: the card's tables, its memories, and claims that can fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from jaxkit_experiments.experiment import Context, Results
from jaxkit_experiments.ssm import reconstruction as rec
from jaxkit_experiments.ssm.reconstruction import Reconstruction, ReconstructionConfig
from jaxkit_experiments.ssm.tasks import blwn, continuous_signal

from jaxkit.ssm.hippo.legs import legs_scan

CPU = Reconstruction.presets["cpu"]


def errors(arm, frequency, state, samples=2048, seeds=(0, 1, 2)):
    u = np.stack([blwn(samples, frequency, seed) for seed in seeds])
    if arm in rec.LEGS_ARMS:
        x, seen = rec.legs_last_state(arm, u, state), u
    else:
        x = rec.window_state(arm, u, state, samples // 2)
        seen = u[:, samples // 2 :]
    s = (np.arange(seen.shape[1]) + 0.5) / seen.shape[1]
    return rec.relative_error(rec.rebuild(arm, x, s), seen)


def entries(table, slow):
    return [
        pytest.param(
            key, arm, card, marks=[pytest.mark.slow] if slow(key) else [], id=f"{arm}-{key}"
        )
        for key, row in table.items()
        for arm, card in row.items()
    ]


@pytest.mark.parametrize(("key", "arm", "card"), entries(rec.CARD, lambda key: key[1] > 16))
def test_error_table_of_the_card(key, arm, card):
    value = errors(arm, *key).mean()
    assert abs(value - card) <= max(0.05 * card, 1e-4)


@pytest.mark.parametrize(
    ("samples", "arm", "card"), entries(rec.CARD_TIMESCALE, lambda samples: samples > 512)
)
def test_timescale_table_of_the_card(samples, arm, card):
    u = continuous_signal(samples, 4, 0)[None]
    (value,) = rec.timescale_error(arm, u, state=32, window=1024)
    assert abs(value - card) <= max(0.05 * card, 1e-4)


def test_forward_euler_overflows_float32_at_64_states():
    assert np.isinf(errors("legs-forward", 4, 64, samples=256, seeds=(0,))).all()
    assert np.isfinite(errors("legs-forward", 4, 8, samples=256, seeds=(0,))).all()


def test_exact_projection_is_the_integral_of_the_held_signal():
    u = np.random.default_rng(1).standard_normal((1, 5))
    for n, value in enumerate(rec.exact_projection(u, 4)[0]):
        polynomial = np.polynomial.legendre.Legendre.basis(n)
        pieces = [
            u[0, j]
            * scipy.integrate.quad(
                lambda s, polynomial=polynomial: polynomial(2 * s - 1), j / 5, (j + 1) / 5
            )[0]
            for j in range(5)
        ]
        assert value == pytest.approx(np.sqrt(2 * n + 1) * sum(pieces), abs=1e-12)
    # Blocks do not show.
    u = np.random.default_rng(2).standard_normal((2, 100))
    whole = rec.exact_projection(u, 6)
    np.testing.assert_allclose(rec.exact_projection(u, 6, block=7), whole, atol=1e-13)


@pytest.mark.parametrize("arm", ["legs", "fout"])
def test_rebuild_uses_an_orthonormal_basis(arm):
    nodes, weights = np.polynomial.legendre.leggauss(60)
    basis = rec.rebuild(arm, np.eye(9), (nodes + 1) / 2)
    np.testing.assert_allclose(basis @ (basis * weights / 2).T, np.eye(9), atol=1e-12)


def test_memory_does_not_grow_with_states_times_length():
    state, samples = 64, 4096
    u = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    scan = jax.jit(lambda u: legs_scan(u, state, last_only=True))
    plan = scan.lower(u).compile().memory_analysis()
    # Inputs and three step weights per sample, never the states.
    assert plan.temp_size_in_bytes < 8 * samples * 4 < state * samples * 4


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    experiment, config = Reconstruction(), Reconstruction.presets["smoke"]
    ctx = Context(tmp_path_factory.mktemp("run"))
    arms = {arm: experiment.run_arm(config, arm, ctx.for_arm(arm)) for arm in config.arms}
    return ctx, config, arms


@pytest.mark.slow
def test_smoke_preset_end_to_end(smoke):
    ctx, config, arms = smoke
    results = Results(config, arms)
    for arm in config.arms:
        for values in arms[arm].values():
            assert len(values) == len(config.seeds)
            assert not np.isnan(values).any()
    assert results.mean("legs", "error_F4_N16") < results.mean("legs", "error_F4_N8")
    # The only difference between exact and exact is float32.
    assert results.mean("legs-exact", "gap_F4_N16") < 1e-5
    paths = Reconstruction().plot(results, ctx)
    assert [path.name for path in paths] == ["error.png", "signals.png", "timescale.png"]
    assert all(path.stat().st_size > 5000 for path in paths)
    text = Reconstruction().epilogue(results, ctx)
    assert "F=4 N=16" in text
    assert "timescale T=128" in text


@pytest.mark.slow
def test_small_runs_do_not_judge_what_they_cannot_show(smoke):
    _, config, arms = smoke
    statuses = {c.text: c.judge(Results(config, arms)).status for c in Reconstruction.claims}
    assert statuses["the errors are those of the card's table"] == "not testable"
    assert all(status in ("held", "not testable") for status in statuses.values())


def card_results():
    """Results as the card has them, with what it does not give filled in by its rules."""
    arms = {arm: {} for arm in rec.ARMS}
    for F in CPU.frequencies:
        for N in CPU.states:
            legs = 0.6 if np.pi * F > N else 1e-3
            row = {"legs-exact": legs, "legt": legs / 2, "fout": 1 / (2 * N), "fout_post": 0.4}
            row |= rec.CARD.get((F, N), {})
            row["legs"] = row["legs-reciprocal"] = row["legs-exact"]
            row["legs-forward"] = np.inf if N >= 64 else row["legs-exact"]
            for arm, value in row.items():
                arms[arm][f"error_F{F}_N{N}"] = [value] * 3
            arms["legs"][f"gap_F{F}_N{N}"] = [1e-4] * 3
            arms["legs-reciprocal"][f"gap_F{F}_N{N}"] = [6e-3] * 3
    for T, row in rec.CARD_TIMESCALE.items():
        for arm, value in row.items():
            arms[arm][f"timescale_T{T}"] = [value] * 3
    return arms


def judge(arms, config=CPU):
    return [claim.judge(Results(config, arms)).status for claim in Reconstruction.claims]


def test_claims_hold_on_the_cards_numbers():
    assert judge(card_results()) == ["held"] * 8


@pytest.mark.parametrize(
    ("index", "arm", "metric", "value"),
    [
        (0, "legs-exact", "error_F16_N64", 0.1),
        (0, "legs-exact", "error_F16_N16", 0.2),
        (1, "legt", "error_F16_N32", 0.6),
        (2, "fout", "error_F4_N64", 0.17),
        (2, "fout_post", "error_F4_N64", 0.03),
        (3, "legs-forward", "error_F4_N64", 0.5),
        (4, "legs-reciprocal", "gap_F16_N64", 2e-4),
        (5, "legs", "timescale_T4096", 0.005),
        (5, "legs", "timescale_T256", 0.1),
        (6, "fout", "error_F16_N32", 0.14),
        (7, "legs-lti", "timescale_T2048", 0.14),
    ],
)
def test_each_claim_fails_on_another_number(index, arm, metric, value):
    arms = card_results()
    arms[arm][metric] = [value] * 3
    assert judge(arms)[index] == "not held"


def test_missing_arms_are_not_testable():
    arms = {"fout": card_results()["fout"]}
    statuses = judge(arms)
    assert statuses[6] == "held"  # what was run of the table is compared
    assert set(statuses[:6] + statuses[7:]) == {"not testable"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 16}, r"samples must be at least 2 F = 32; got 16"),
        ({"samples": 2047}, "samples must be even"),
        ({"states": (16, 8)}, "states"),
        ({"frequencies": ()}, "frequencies"),
        ({"timescale_samples": (4,)}, "timescale_samples"),
        ({"timescale_state": 0}, "timescale_state"),
        ({"seeds": ()}, "seeds"),
        ({"arms": ("legz",)}, "'legs'"),
    ],
)
def test_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CPU, **change)


def test_presets_are_the_cards():
    assert (CPU.samples, CPU.frequencies, CPU.seeds) == (2048, (4, 16), (0, 1, 2))
    gpu = Reconstruction.presets["gpu"]
    assert isinstance(gpu, ReconstructionConfig)
    assert (gpu.samples, max(gpu.states)) == (1_000_000, 256)
