"""In-context Markov chains: the generator, the Bayes predictor, the arms and their claims."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxkit_experiments.experiment import Results
from jaxkit_experiments.runner import run_experiment
from jaxkit_experiments.vq import markov
from jaxkit_experiments.vq.chains import Chains, bayes_bits, chains, first_visible
from jaxkit_experiments.vq.markov import ChainModel, MarkovConfig


def brute_force_bits(tokens, first, symbols, concentration):
    """Pólya's urn by counting, one position at a time."""
    bits = np.empty((len(tokens), tokens.shape[1] - 1))
    for row, chain in enumerate(tokens):
        for i in range(bits.shape[1]):
            counts = np.full(symbols, concentration)
            for j in range(max(first[i], 1), i + 1):
                counts[chain[j]] += chain[j - 1] == chain[i]
            bits[row, i] = -np.log2(counts[chain[i + 1]] / counts.sum())
    return bits


@pytest.mark.parametrize(
    "restriction", [{}, {"last": 1}, {"last": 7}, {"block_length": 1}, {"block_length": 5}]
)
def test_bayes_counts_only_what_is_visible(restriction):
    tokens = chains(np.random.default_rng(3), 4, 33, symbols=3, concentration=0.7)
    first = first_visible(33, **restriction)
    bits = bayes_bits(tokens, first, symbols=3, concentration=0.7)
    np.testing.assert_allclose(bits, brute_force_bits(tokens, first, 3, 0.7), rtol=1e-12)


def test_bayes_predictions_are_probabilities():
    tokens = chains(np.random.default_rng(0), 5, 40)
    total = np.zeros((5, 40))
    for symbol in range(8):
        # Whatever comes next: only the last symbol of each prefix changes.
        for i in range(40):
            ends = tokens[:, : i + 2].copy()
            ends[:, -1] = symbol
            total[:, i] += 2.0 ** -bayes_bits(ends, first_visible(i + 1))[:, -1]
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)


def test_the_blocks_of_local_attention_are_visible():
    length, block = 32, 4
    first = first_visible(length, block_length=block)
    for i in range(length):
        visible = [j for j in range(i + 1) if i // block - j // block <= 1]
        assert first[i] == visible[0]


def test_bayes_bits_of_the_card():
    """Card: 1.967, 2.417 and 2.346 bits over the second half, from 128 sequences."""
    tokens = chains(np.random.default_rng(0), 2048, 256)
    per_chain = {
        name: bayes_bits(tokens, first_visible(256, **restriction))[:, 128:].mean(1)
        for name, restriction in (("all", {}), ("24", {"last": 24}), ("31", {"last": 31}))
    }
    for name, wanted in (("all", 1.967), ("24", 2.417), ("31", 2.346)):
        error = per_chain[name].std() / np.sqrt(128)  # of the card's own mean
        assert abs(per_chain[name].mean() - wanted) < 3 * error, (name, per_chain[name].mean())
    # What a window costs varies less from chain to chain than the chains' entropy.
    for name, wanted in (("24", 2.417 - 1.967), ("31", 2.346 - 1.967)):
        cost = per_chain[name] - per_chain["all"]
        assert abs(cost.mean() - wanted) < 3 * cost.std() / np.sqrt(128), (name, cost.mean())


def test_chains_follow_their_own_matrix():
    # Rows of a Dirichlet(α) over S symbols repeat a symbol with probability (α + 1) / (S α + 1).
    tokens = chains(np.random.default_rng(1), 4000, 2, symbols=2, concentration=0.5)
    returned = tokens[:, 0] == tokens[:, 2]
    same_row = returned & (tokens[:, 1] == tokens[:, 0])
    # Both transitions leave the same row: it is drawn twice from one Dirichlet.
    stays = tokens[:, 1] == tokens[:, 0]
    assert same_row.sum() / stays.sum() == pytest.approx((0.5 + 1) / (1 + 1), abs=0.04)
    assert stays.mean() == pytest.approx(0.5, abs=0.03)
    # A huge concentration is the uniform chain.
    uniform = chains(np.random.default_rng(1), 2000, 8, symbols=4, concentration=1e6)
    np.testing.assert_allclose(
        np.bincount(uniform.ravel(), minlength=4) / uniform.size, 0.25, atol=0.02
    )


def test_batches_are_found_again_and_differ():
    source = Chains(seed=2, batch_size=3, length=10)
    batch = source[5]["tokens"]
    assert batch.shape == (3, 11)
    assert batch.dtype == np.int32
    assert np.array_equal(batch, Chains(seed=2, batch_size=3, length=10)[5]["tokens"])
    assert not np.array_equal(batch, source[6]["tokens"])
    assert not np.array_equal(batch, Chains(seed=3, batch_size=3, length=10)[5]["tokens"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chains(np.random.default_rng(0), 0, 4), "count must be at least 1"),
        (lambda: chains(np.random.default_rng(0), 1, 4, symbols=1), "symbols must be at least 2"),
        (
            lambda: chains(np.random.default_rng(0), 1, 4, concentration=0.0),
            "concentration must be greater than 0",
        ),
        (lambda: first_visible(4, last=0), "last must be at least 1"),
        (lambda: first_visible(4, last=1, block_length=1), "must not both be given"),
        (
            lambda: bayes_bits(np.zeros((1, 4), int), np.zeros(4, int)),
            r"first must have shape \(3,\)",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TINY = MarkovConfig(seeds=(0,), length=24, block_length=4, model_dim=8, key_dim=4, test=8)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(chains(np.random.default_rng(0), 2, 24)[:, :-1])


@pytest.mark.x32
@pytest.mark.parametrize("arm", ["full", "vq-1", "no-cache"])
def test_every_arm_sees_the_past_alone_and_no_more_than_it_should(arm, tokens):
    model = ChainModel(TINY, arm, rngs=nnx.Rngs(1))
    graph, values = nnx.split(model)
    call = jax.jit(lambda tokens: nnx.merge(graph, values)(tokens))
    # Row t has another symbol at position t; the last row is as it was.
    rows = jnp.where(jnp.eye(25, 24, dtype=bool), (tokens[:1] + 1) % 8, tokens[:1])
    logits = np.asarray(call(rows))
    changed = np.abs(logits[:-1] - logits[-1:]).max(-1)
    assert changed[np.tril_indices(24, -1)].max() < 2e-6  # nothing before t
    # Blocks of 4: the last position sees the keys 16 ... 23; the key of 16 also holds symbol 15.
    seen = changed[:, -1] > 1e-5
    assert seen.all() if arm != "no-cache" else seen.tolist() == [False] * 15 + [True] * 9


@pytest.mark.x32
def test_codes_move_in_training_alone_and_by_the_keys(tokens):
    model = ChainModel(TINY, "vq-4", rngs=nnx.Rngs(0))
    batch = {"tokens": tokens}
    before = jax.tree.map(np.asarray, model.layer.codebook_state())
    assert np.linalg.norm(model.layer.codebook(), axis=-1) == pytest.approx(4**0.25, rel=1e-4)
    graph, values = nnx.split(model)
    metrics = jax.jit(lambda values: markov.evaluate(nnx.merge(graph, values), batch))(values)
    assert 1 <= float(metrics["codes"]) <= 4
    assert float(metrics["commitment"]) > 0

    @jax.jit
    def step(values):
        model = nnx.merge(graph, values, copy=True)
        value, _ = markov.loss(TINY, model, batch, jax.random.key(0))
        return value, model.layer.codebook_state()

    value, after = step(values)
    assert np.isfinite(value)
    np.testing.assert_array_equal(before.sums, model.layer.codebook_state().sums)
    # 2 x 23 inputs, each counted once; counts were 1.
    grown = (np.asarray(after.counts) - 0.99 * before.counts) / 0.01
    np.testing.assert_allclose(grown, np.round(grown), atol=1e-3)
    assert grown.sum() == pytest.approx(2 * 23, rel=1e-4)
    assert np.abs(np.asarray(after.sums) - before.sums).max() > 1e-3
    # No gradient: the statistics are no parameters.
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert not any({"code_sums", "code_counts"} & set(path) for path in paths)


@pytest.mark.x32
def test_the_score_is_over_the_second_half():
    class Knows(nnx.Module):
        """Sure of the right symbol from the middle on, and of nothing before."""

        quantized = False

        def __call__(self, inputs):
            right = jax.nn.one_hot((inputs + 1) % 4, 4) * 50.0
            late = jnp.arange(inputs.shape[1]) >= inputs.shape[1] // 2
            return jnp.where(late[None, :, None], right, 0.0)

    counting = jnp.arange(9)[None] % 4
    assert float(markov.evaluate(Knows(), {"tokens": counting})["bits"]) < 1e-6
    total, metrics = markov.loss(
        dataclasses.replace(TINY, commitment=1.0), Knows(), {"tokens": counting}, jax.random.key(0)
    )
    assert float(metrics["bits"]) == pytest.approx(1.0)  # two bits over half of the positions
    assert float(total) == pytest.approx(np.log(2))


def test_reference_arms_see_less_and_need_more_bits():
    config = MarkovConfig(test=64)
    drawn = markov.held_out_chains(config)
    bits = {arm: markov.reference_bits(config, arm, drawn).mean() for arm in markov.BAYES}
    assert bits["bayes"] < bits["bayes-31"] < bits["bayes-24"]
    assert bits["bayes"] < bits["bayes-window"]
    assert np.array_equal(drawn, markov.held_out_chains(config))


def results_of(bits, **more):
    arms = {arm: {"bits": [value]} for arm, value in bits.items()}
    for arm, slope in more.items():
        arms[arm.replace("_", "-")]["slope"] = [slope]
    return Results(MarkovConfig(), arms)


PILOT = {arm: of["bits"] for arm, of in markov.Markov.paper.items()} | {"bayes-window": 2.417}


def test_the_pilot_of_the_card_satisfies_every_claim():
    results = results_of(PILOT, full=1.9, vq_32=1.05)
    for claim in markov.Markov.claims:
        assert claim.judge(results).status == "held", claim.text
        assert claim.judge(Results(MarkovConfig(), {})).status == "not testable"


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"no-cache": 2.30, "vq-1": 2.2}, 0),
        ({"vq-32": 2.06}, 1),
        ({"vq-4": 2.04}, 2),
        ({"vq-1": 2.43}, 2),
        ({"vq-8": 1.99}, 2),
        ({"vq-8": 2.08}, 3),
        ({"no-cache": 2.39}, 4),
        ({"no-cache": 2.53}, 4),
        ({"full": 1.94}, 5),
    ],
)
def test_claims_fail_where_they_should(changes, claim):
    results = results_of(PILOT | changes, full=1.9, vq_32=1.05)
    assert markov.Markov.claims[claim].judge(results).status == "not held"


@pytest.mark.parametrize(
    ("full", "vq", "status"), [(1.9, 1.1, "held"), (1.2, 1.1, "not held"), (1.9, 1.4, "not held")]
)
def test_slopes_are_judged_both_ways(full, vq, status):
    results = results_of(PILOT, full=full, vq_32=vq)
    assert markov.Markov.claims[-1].judge(results).status == status
    short = Results(
        MarkovConfig(lengths=(64, 128)), {"full": {"slope": [2]}, "vq-32": {"slope": [1]}}
    )
    assert markov.Markov.claims[-1].judge(short).status == "not testable"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("vq-16",)}, "arms must be one of .*vq-32"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"lengths": (0,)}, "lengths must be at least 1"),
        ({"concentration": 0.0}, "concentration must be greater than 0"),
        ({"decay": 1.5}, "decay must be at least 0.0 and at most 1.0"),
    ],
)
def test_wrong_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MarkovConfig(), **changes)


@pytest.mark.slow
@pytest.mark.x32
def test_smoke_run_writes_what_it_measured(tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        outcome = run_experiment(
            markov.Markov(), markov.Markov.presets["smoke"], tmp_path / "run", preset="smoke"
        )
    del outcome
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["arms"]) == {"bayes", "bayes-window", "full", "vq-4"}
    assert all(0 < arm["bits"][0] < 4 for arm in summary["arms"].values())
    assert 1 <= summary["arms"]["vq-4"]["codes"][0] <= 4
    names = {Path(name).name for name in summary["plots"]}
    assert {"positions.png", "codes.png"} <= names
