"""In-context Markov chains: the generator, the Bayes predictor, the arms and their claims."""

import numpy as np
import pytest
from jaxkit_experiments.vq.chains import Chains, bayes_bits, chains, first_visible


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
    tokens = chains(np.random.default_rng(0), 4096, 256)
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
