"""In-context Markov chains, and the best that can be predicted from what a model may see of them.

Every sequence has a transition matrix of its own, P[a, ·] ~ Dirichlet(α, ..., α), so that nothing
can be learnt but to count. With n_ab transitions a → b seen, the posterior mean is Pólya's urn,

    p(x_{t+1} = b | x_t = a, seen) = (α + n_ab) / (S α + Σ_b n_ab),

which no predictor beats on average.

Source: card of Transformer-VQ (its ablation); Pólya 1930 for the urn.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxkit._checks import check_int, check_real

__all__ = ["Chains", "bayes_bits", "chains", "first_visible"]


def chains(
    rng: np.random.Generator,
    count: int,
    length: int,
    *,
    symbols: int = 8,
    concentration: float = 0.3,
) -> np.ndarray:
    """Draw chains, each from a fresh transition matrix; the first symbol is uniform.

    Args:
      rng: source of randomness.
      count: number of chains.
      length: T, transitions of a chain.
      symbols: S.
      concentration: α of each row's Dirichlet distribution.

    Returns:
      `[count, length + 1]` int32.

    Raises:
      ValueError: a number is out of range.

    Example:
      >>> chains(np.random.default_rng(0), 2, 5, symbols=3).shape
      (2, 6)
    """
    count, length = check_int("count", count, least=1), check_int("length", length, least=1)
    symbols = check_int("symbols", symbols, least=2)
    check_real("concentration", concentration, above=0.0)
    rows = rng.dirichlet(np.full(symbols, concentration), (count, symbols))
    # The inverse distribution function; a rounding of the last sum below 1 must not end the table.
    steps = np.cumsum(rows, axis=-1)[..., :-1]
    uniform = rng.random((length, count))
    everyone = np.arange(count)
    tokens = np.empty((count, length + 1), np.int32)
    tokens[:, 0] = rng.integers(symbols, size=count)
    for t in range(length):
        tokens[:, t + 1] = (uniform[t, :, None] >= steps[everyone, tokens[:, t]]).sum(-1)
    return tokens


@dataclasses.dataclass(frozen=True)
class Chains:
    """Batches of fresh chains, looked up by step: `source[step]["tokens"]` is `[batch, T + 1]`.

    Example:
      >>> source = Chains(seed=1, batch_size=2, length=4)
      >>> np.array_equal(source[7]["tokens"], source[7]["tokens"])
      True
    """

    seed: int
    batch_size: int
    length: int
    symbols: int = 8
    concentration: float = 0.3

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, step))
        drawn = chains(
            rng,
            self.batch_size,
            self.length,
            symbols=self.symbols,
            concentration=self.concentration,
        )
        return {"tokens": drawn}


def first_visible(
    length: int, *, last: int | None = None, block_length: int | None = None
) -> np.ndarray:
    """The first position whose transition may be seen, for every position.

    Args:
      length: T.
      last: only so many last transitions.
      block_length: L; only the transitions into the own block of L positions and the one before,
        which is what block-local attention sees.

    Returns:
      `[length]` int; zeros without a restriction.

    Raises:
      ValueError: both restrictions are given, or one is below 1.

    Example:
      >>> first_visible(6, last=2).tolist(), first_visible(6, block_length=2).tolist()
      ([0, 0, 1, 2, 3, 4], [0, 0, 0, 0, 2, 2])
    """
    at = np.arange(check_int("length", length, least=1))
    if last is not None and block_length is not None:
        raise ValueError("last and block_length must not both be given.")
    if last is not None:
        return np.maximum(at - check_int("last", last, least=1) + 1, 0)
    if block_length is not None:
        block = check_int("block_length", block_length, least=1)
        return np.maximum(at // block - 1, 0) * block
    return np.zeros_like(at)


def bayes_bits(
    tokens: np.ndarray, first: np.ndarray, *, symbols: int = 8, concentration: float = 0.3
) -> np.ndarray:
    """Bits that the Bayes predictor needs for each next symbol, given the transitions it may see.

    Position i predicts x_{i+1} from x_i and the transitions into positions first[i], ..., i.

    Args:
      tokens: chains `[count, T + 1]`.
      first: first visible position of each position, `[T]`; see `first_visible`.
      symbols: S.
      concentration: α.

    Returns:
      −log₂ p(x_{i+1}), `[count, T]` float64.

    Raises:
      ValueError: `first` has another length than the chains have transitions.

    Example:
      >>> bits = bayes_bits(np.array([[0, 1, 0, 1]]), np.zeros(3, int), symbols=2)
      >>> (2.0**-bits).round(4).tolist()  # 1/2, 1/2, then (0.3 + 1) / (0.6 + 1)
      [[0.5, 0.5, 0.8125]]
    """
    tokens, first = np.asarray(tokens), np.asarray(first)
    count, length = tokens.shape[0], tokens.shape[1] - 1
    if first.shape != (length,):
        raise ValueError(f"first must have shape ({length},); got {first.shape}.")
    # seen[:, j] counts the transitions into positions 1, ..., j.
    pair = np.zeros((count, length + 1, symbols * symbols), np.int32)
    into = tokens[:, :-1] * symbols + tokens[:, 1:]
    pair[np.arange(count)[:, None], np.arange(1, length + 1)[None], into] = 1
    seen = np.cumsum(pair, axis=1)
    visible = seen[:, :-1] - seen[:, np.maximum(first - 1, 0)]
    visible = visible.reshape(count, length, symbols, symbols)
    row = np.take_along_axis(visible, tokens[:, :-1, None, None], axis=2)[:, :, 0]
    hits = np.take_along_axis(row, tokens[:, 1:, None], axis=2)[..., 0]
    likelihood = (concentration + hits) / (symbols * concentration + row.sum(-1))
    return -np.log2(likelihood)
