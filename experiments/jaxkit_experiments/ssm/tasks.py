"""Signals and sequence tasks of the state-space experiments, from NumPy generators and exact.

Signals (`blwn`, `white`, `continuous_signal`) are float64 vectors. Tasks are `Task`s: training and
test examples with the same names everywhere,

| name        | shape                    | what                                                |
|-------------|--------------------------|-----------------------------------------------------|
| `inputs`    | `[n, length]` int32 or `[n, length, dim]` float32 | tokens, or real signals    |
| `targets`   | `[n]`, `[n, length]` or `[n, length, dim]`        | classes or values          |
| `mask`      | `[n, length]` bool, where lengths differ          | positions that are not padding |
| `loss_mask` | `[n, length]` bool, where outputs are per position | positions that count      |

Sources: Gu et al. 2020 (arXiv 2008.07669), Gu et al. 2022 (2206.12037), Arjovsky, Shah, Bengio 2015
(1511.06464), Gu, Dao 2023 (2312.00752, selective copying), Hochreiter, Schmidhuber 1997 (adding),
Nangia, Bowman 2018 (1804.06028) and Tay et al. 2020 (2011.04006, ListOps).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxkit._checks import check_int, check_real
from jaxkit_experiments.data import Arrays, digit_images

__all__ = [
    "LISTOPS_MINI",
    "LISTOPS_VOCABULARY",
    "ListOpsConfig",
    "Task",
    "adding",
    "blwn",
    "continuous_signal",
    "copying",
    "delay_signals",
    "digits",
    "evaluate_listops",
    "generate_listops",
    "listops",
    "read_listops",
    "root_operator_accuracy",
    "selective_copying",
    "white",
]


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples of one task, and what a model must know to fit it.

    Attributes:
      train: training examples, named arrays with examples first.
      test: test examples, the same names.
      classes: number of classes, or None for regression.
      vocabulary: number of tokens, or None where the inputs are real.
      pooled: whether one output is wanted for a sequence, not one for every position.
      validation: examples for choosing among runs, where the task has them.
    """

    train: Arrays
    test: Arrays
    classes: int | None
    vocabulary: int | None
    pooled: bool
    validation: Arrays | None = None

    @property
    def length(self) -> int:
        """Positions of a (padded) sequence."""
        return self.train["inputs"].shape[1]


# --- signals ---------------------------------------------------------------------------------


def _check_band(samples: Any, frequency: Any) -> tuple[int, int]:
    samples = check_int("samples", samples, least=1)
    frequency = check_int("frequency", frequency, least=1)
    if samples < 2 * frequency:
        raise ValueError(
            f"samples must be at least twice the frequency (T ≥ 2F); got samples={samples}, "
            f"frequency={frequency}."
        )
    return samples, frequency


def blwn(samples: int, frequency: int, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Band-limited white noise, not periodic, of at most `frequency` cycles in all.

    `z = standard_normal((2, 2F))`, `c[1..2F] = z[0] + i z[1]`, `u = irfft(c, 2T)[:T]`, divided by
    its root mean square: half a period of a sum of 2F harmonics.

    Args:
      samples: T.
      frequency: F, the highest number of cycles in T samples.
      seed: of the generator, or a generator.

    Returns:
      `[T]` float64 with mean square 1.

    Raises:
      ValueError: T < 2F.

    Example:
      >>> float(np.mean(blwn(256, 4) ** 2).round(6))
      1.0
    """
    samples, frequency = _check_band(samples, frequency)
    z = np.random.default_rng(seed).standard_normal((2, 2 * frequency))
    spectrum = np.zeros(samples + 1, complex)
    spectrum[1 : 2 * frequency + 1] = z[0] + 1j * z[1]
    u = np.fft.irfft(spectrum, 2 * samples)[:samples]
    return u / np.sqrt(np.mean(u**2))


def continuous_signal(
    samples: int, frequency: int, seed: int | np.random.Generator = 0
) -> np.ndarray:
    """One continuous signal, seen through any number of samples.

    `u(s) = Σ_{k=1}^{2F} z0_k cos πks − z1_k sin πks` with the `z` of `blwn`, at the midpoints
    `s = (j+½)/T`: the same function whatever T, so that timescales can be compared.

    Args:
      samples: T.
      frequency: F, the highest number of cycles.
      seed: of the generator, or a generator.

    Returns:
      `[T]` float64, not scaled.

    Raises:
      ValueError: T < 2F.

    Example:
      >>> continuous_signal(256, 4).shape
      (256,)
    """
    samples, frequency = _check_band(samples, frequency)
    z = np.random.default_rng(seed).standard_normal((2, 2 * frequency))
    s = (np.arange(samples) + 0.5) / samples
    angle = np.pi * np.outer(s, np.arange(1, 2 * frequency + 1))
    return np.cos(angle) @ z[0] - np.sin(angle) @ z[1]


def white(samples: int, cutoff: float, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Periodic white noise below `cutoff` cycles a sample, with unit variance.

    `m = int(f_c T)`, `c[1..m]` complex normal from `standard_normal((2, m))`,
    `u = irfft(c, T) / std`.

    Args:
      samples: T.
      cutoff: f_c, in cycles a sample, at most ½.
      seed: of the generator, or a generator.

    Returns:
      `[T]` float64.

    Raises:
      ValueError: `cutoff` is not in (0, ½], or leaves no frequency: int(f_c T) < 1.

    Example:
      >>> float(np.std(white(512, 0.1)).round(6))
      1.0
    """
    samples = check_int("samples", samples, least=2)
    check_real("cutoff", cutoff, above=0.0, most=0.5)
    bins = int(cutoff * samples)
    if bins < 1:
        raise ValueError(f"cutoff must be at least 1 / samples = {1 / samples}; got {cutoff}.")
    z = np.random.default_rng(seed).standard_normal((2, bins))
    spectrum = np.zeros(samples // 2 + 1, complex)
    spectrum[1 : bins + 1] = z[0] + 1j * z[1]
    u = np.fft.irfft(spectrum, samples)
    return u / np.std(u)


# --- sequence tasks --------------------------------------------------------------------------


def digits(*, permuted: bool = False, upsample: int = 1, seed: int = 0) -> Task:
    """Sequential digits: scikit-learn's 8×8 images, one pixel after the other, raster order.

    Args:
      permuted: shuffle the positions, all images by the same permutation (after upsampling).
      upsample: repeat every pixel k×k times, for length 64k².
      seed: of the permutation (the split of the images is always the same).

    Returns:
      Inputs `[n, 64k², 1]` in [0, 1], classes `[n]`; 1257 for training, 540 for the test.

    Raises:
      ValueError: `upsample` is below 1.

    Example:
      >>> digits(upsample=2).train["inputs"].shape
      (1257, 256, 1)
    """
    upsample = check_int("upsample", upsample, least=1)
    images = digit_images()
    length = 64 * upsample**2
    order = np.random.default_rng(seed).permutation(length) if permuted else np.arange(length)

    def sequences(pixels: np.ndarray) -> np.ndarray:
        large = pixels.repeat(upsample, axis=1).repeat(upsample, axis=2)
        return large.reshape(len(pixels), length)[:, order, None]

    return Task(
        train={"inputs": sequences(images.train_images), "targets": images.train_labels},
        test={"inputs": sequences(images.test_images), "targets": images.test_labels},
        classes=10,
        vocabulary=None,
        pooled=True,
    )


def _check_counts(train: Any, test: Any) -> tuple[int, int]:
    return check_int("train", train, least=1), check_int("test", test, least=1)


def _recall(memorized: np.ndarray, before: np.ndarray, symbols: int) -> dict[str, np.ndarray]:
    """Examples whose inputs are `before`, a delimiter, and as many blanks as there are outputs."""
    count, tokens = memorized.shape
    delimiter = np.full((count, 1), symbols + 1)
    inputs = np.concatenate([before, delimiter, np.zeros((count, tokens), int)], axis=1)
    targets = np.zeros_like(inputs)
    targets[:, -tokens:] = memorized
    loss_mask = np.zeros(inputs.shape, bool)
    loss_mask[:, -tokens:] = True
    # Classes are symbol - 1, so that there are `symbols` of them and chance is 1 / symbols.
    targets = np.maximum(targets - 1, 0)
    return {
        "inputs": inputs.astype(np.int32),
        "targets": targets.astype(np.int32),
        "loss_mask": loss_mask,
    }


def _copying_task(train: dict, test: dict, symbols: int) -> Task:
    return Task(train=train, test=test, classes=symbols, vocabulary=symbols + 2, pooled=False)


def copying(
    *,
    train: int,
    test: int,
    symbols: int = 8,
    tokens: int = 8,
    lag: int = 100,
    seed: int = 0,
) -> Task:
    """Copying: M random symbols, a long blank, a delimiter, and then the symbols again.

    Symbols are 1..S, blanks 0, the delimiter S+1 at index M+T−1, the length T+2M. Only the last M
    outputs count; chance is 1/S.

    Args:
      train: training examples.
      test: test examples.
      symbols: S.
      tokens: M.
      lag: T, at least 1.
      seed: of the generator.

    Returns:
      Inputs `[n, T+2M]`, targets of the same shape (classes 0..S−1: symbol minus 1), `loss_mask`.

    Raises:
      ValueError: a count is below 1, or `symbols` below 2.

    Example:
      >>> copying(train=1, test=1, tokens=3, lag=4).train["inputs"][0, 3:].tolist()
      [0, 0, 0, 9, 0, 0, 0]
    """
    train, test = _check_counts(train, test)
    symbols = check_int("symbols", symbols, least=2)
    tokens = check_int("tokens", tokens, least=1)
    lag = check_int("lag", lag, least=1)
    rng = np.random.default_rng(seed)

    def examples(count: int) -> dict[str, np.ndarray]:
        memorized = rng.integers(1, symbols + 1, (count, tokens))
        blank = np.zeros((count, lag - 1), int)
        return _recall(memorized, np.concatenate([memorized, blank], axis=1), symbols)

    return _copying_task(examples(train), examples(test), symbols)


def selective_copying(
    *,
    train: int,
    test: int,
    symbols: int = 8,
    tokens: int = 8,
    lag: int = 100,
    seed: int = 0,
) -> Task:
    """Selective copying: the M symbols stand at random places among the blanks, in order.

    As `copying`, but where the symbols are before the delimiter is drawn for every example, so that
    no fixed (time-invariant) delay can bring them back.

    Args:
      train: training examples.
      test: test examples.
      symbols: S.
      tokens: M.
      lag: T, at least 1.
      seed: of the generator.

    Returns:
      Inputs `[n, T+2M]`, targets of the same shape (classes 0..S−1), `loss_mask`.

    Raises:
      ValueError: a count is below 1, or `symbols` below 2.

    Example:
      >>> selective_copying(train=2, test=1).length
      116
    """
    train, test = _check_counts(train, test)
    symbols = check_int("symbols", symbols, least=2)
    tokens = check_int("tokens", tokens, least=1)
    lag = check_int("lag", lag, least=1)
    rng = np.random.default_rng(seed)

    def examples(count: int) -> dict[str, np.ndarray]:
        memorized = rng.integers(1, symbols + 1, (count, tokens))
        places = rng.random((count, tokens + lag - 1)).argsort(axis=1)[:, :tokens]
        before = np.zeros((count, tokens + lag - 1), int)
        np.put_along_axis(before, np.sort(places, axis=1), memorized, axis=1)
        return _recall(memorized, before, symbols)

    return _copying_task(examples(train), examples(test), symbols)


def adding(*, train: int, test: int, length: int = 100, seed: int = 0) -> Task:
    """Adding: the sum of the two marked numbers among `length` uniform ones.

    Channel 0 is uniform in [0, 1), channel 1 is 1 at one place of each half and 0 elsewhere.
    Answering 1 always has mean squared error 1/6.

    Args:
      train: training examples.
      test: test examples.
      length: positions, at least 2.
      seed: of the generator.

    Returns:
      Inputs `[n, length, 2]`, targets `[n, 1]`.

    Raises:
      ValueError: a count is below 1, or `length` below 2.

    Example:
      >>> task = adding(train=3, test=1)
      >>> bool((task.train["inputs"][..., 1].sum(1) == 2).all())
      True
    """
    train, test = _check_counts(train, test)
    length = check_int("length", length, least=2)
    rng = np.random.default_rng(seed)

    def examples(count: int) -> dict[str, np.ndarray]:
        values = rng.random((count, length))
        marks = np.zeros((count, length))
        rows = np.arange(count)
        marks[rows, rng.integers(0, length // 2, count)] = 1
        marks[rows, rng.integers(length // 2, length, count)] = 1
        inputs = np.stack([values, marks], axis=-1).astype(np.float32)
        targets = (values * marks).sum(1, keepdims=True).astype(np.float32)
        return {"inputs": inputs, "targets": targets}

    return Task(examples(train), examples(test), classes=None, vocabulary=None, pooled=True)


def delay_signals(
    *, train: int, test: int, length: int = 512, lag: int = 64, cutoff: float = 0.1, seed: int = 0
) -> Task:
    """Delay: white noise in, the same noise `lag` steps later out (target `u_{k−τ}`).

    Args:
      train: training signals.
      test: test signals.
      length: positions T.
      lag: τ, below T.
      cutoff: of `white`, in cycles a sample.
      seed: of the generator.

    Returns:
      Inputs and targets `[n, T, 1]`; `loss_mask` leaves out the first τ positions, whose targets
      (set to 0) were never seen.

    Raises:
      ValueError: τ ≥ T, a count is below 1, or `cutoff` is out of range.

    Example:
      >>> task = delay_signals(train=1, test=1, length=64, lag=8)
      >>> bool((task.train["targets"][:, 8:] == task.train["inputs"][:, :-8]).all())
      True
    """
    train, test = _check_counts(train, test)
    length, lag = check_lag(length, lag)
    rng = np.random.default_rng(seed)

    def examples(count: int) -> dict[str, np.ndarray]:
        u = np.stack([white(length, cutoff, rng) for _ in range(count)]).astype(np.float32)
        targets = np.concatenate([np.zeros((count, lag), np.float32), u[:, : length - lag]], axis=1)
        loss_mask = np.broadcast_to(np.arange(length) >= lag, (count, length))
        return {"inputs": u[..., None], "targets": targets[..., None], "loss_mask": loss_mask}

    return Task(examples(train), examples(test), classes=None, vocabulary=None, pooled=False)


def check_lag(length: Any, lag: Any) -> tuple[int, int]:
    """The length and the lag of a delay task, or an error unless 0 ≤ lag < length."""
    length = check_int("length", length, least=1)
    lag = check_int("lag", lag, least=0)
    if lag >= length:
        raise ValueError(f"lag must be below the length (τ < T); got lag={lag}, length={length}.")
    return length, lag


# --- ListOps ---------------------------------------------------------------------------------

_OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
_CLOSE = "X"  # stands for "]"
LISTOPS_VOCABULARY: tuple[str, ...] = (
    "<pad>",
    "<unk>",
    "<eos>",
    *_OPERATORS,
    *map(str, range(10)),
    _CLOSE,
)
_PAD, _UNK, _EOS = 0, 1, 2
_FIRST_OPERATOR, _FIRST_DIGIT, _CLOSE_ID = 3, 7, 17
_IDS = {token: i for i, token in enumerate(LISTOPS_VOCABULARY)} | {"]": _CLOSE_ID}


@dataclasses.dataclass(frozen=True)
class ListOpsConfig:
    """Settings of the ListOps generator; the defaults are those of the Long Range Arena.

    Attributes:
      max_depth: depth at which every node is a digit; the root has depth 1.
      max_args: most arguments of an operator, at least 2.
      min_length: expressions are strictly longer than this.
      max_length: and strictly shorter than this (digits + 2 · operators).
      operator_probability: chance that a node below `max_depth` is an operator.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000
    operator_probability: float = 0.25

    def __post_init__(self) -> None:
        check_int("max_depth", self.max_depth, least=1)
        check_int("max_args", self.max_args, least=2)
        check_int("min_length", self.min_length, least=0)
        check_int("max_length", self.max_length, least=1)
        check_real("operator_probability", self.operator_probability, least=0.0, most=1.0)
        shortest = self.min_length + 1
        if self.max_length <= shortest:
            raise ValueError(
                "max_length must leave a length in min_length < length < max_length; got the empty "
                f"window ({self.min_length}, {self.max_length})."
            )
        # A digit has length 1, the shortest operator (two arguments) length 4.
        longest = 1
        if self.operator_probability > 0:
            for _ in range(self.max_depth - 1):
                longest = 2 + self.max_args * longest
        only_digits = longest == 1
        reachable = longest > self.min_length and (
            shortest == 1 or (not only_digits and self.max_length > 4)
        )
        if not reachable:
            raise ValueError(
                f"no expression of depth at most {self.max_depth} with at most {self.max_args} "
                f"arguments has a length in the window ({self.min_length}, {self.max_length}); "
                "take a larger max_depth or max_args, or another window."
            )


LISTOPS_MINI = ListOpsConfig(min_length=16, max_length=128)


class _TooLong(Exception):
    pass


def _apply(operator: int, values: Sequence[int]) -> int:
    if operator == 0:
        return min(values)
    if operator == 1:
        return max(values)
    if operator == 2:
        ordered, half = sorted(values), len(values) // 2
        if len(values) % 2:
            return ordered[half]
        return (ordered[half - 1] + ordered[half]) // 2
    return sum(values) % 10


def evaluate_listops(expression: str | Iterable[str]) -> int:
    """The value, 0 to 9, of a ListOps expression.

    MIN, MAX, MED (of an even number of arguments: the mean of the middle two, truncated) and SM
    (sum modulo 10). The binary brackets "(" and ")" of the published files are ignored, and "X" is
    read as "]".

    Args:
      expression: tokens, or a string of tokens separated by spaces.

    Returns:
      The value.

    Raises:
      ValueError: a token is unknown, or the brackets do not match.

    Example:
      >>> evaluate_listops("[MED 1 2 ]"), evaluate_listops("[SM 9 8 [MAX 3 7 ] ]")
      (1, 4)
    """
    tokens = expression.split() if isinstance(expression, str) else list(expression)
    frames: list[tuple[int, list[int]]] = [(-1, [])]
    for token in tokens:
        if token in ("(", ")"):
            continue
        identity = _IDS.get(token, _UNK)
        if identity < _FIRST_OPERATOR:
            raise ValueError(f"expression holds the unknown token {token!r}.")
        if identity < _FIRST_DIGIT:
            frames.append((identity - _FIRST_OPERATOR, []))
        elif identity < _CLOSE_ID:
            frames[-1][1].append(identity - _FIRST_DIGIT)
        else:
            operator, values = frames.pop()
            if not frames or not values:
                raise ValueError("expression has a ']' without an operator and its arguments.")
            frames[-1][1].append(_apply(operator, values))
    if len(frames) != 1 or len(frames[0][1]) != 1:
        raise ValueError("expression must be one digit or one operator, with every '[' closed.")
    return frames[0][1][0]


@dataclasses.dataclass
class _Generator:
    """Draws trees, all from one stream of uniform numbers (buffered: calls are the cost here)."""

    config: ListOpsConfig
    rng: np.random.Generator
    trees: int = 0
    buffer: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    count: int = 0

    def uniform(self) -> float:
        if not self.buffer:
            self.buffer = self.rng.random(65536).tolist()[::-1]
        return self.buffer.pop()

    def grow(self, add: int) -> None:
        self.count += add
        # The length only grows, so that a tree at the bound is rejected whatever follows; leaving
        # it unfinished keeps the distribution of accepted trees and nine tenths of the time.
        if self.count >= self.config.max_length:
            raise _TooLong

    def node(self, depth: int) -> int:
        config = self.config
        if depth < config.max_depth and self.uniform() <= config.operator_probability:
            arity = 2 + int(self.uniform() * (config.max_args - 1))
            self.grow(2)
            place = len(self.tokens)
            self.tokens.append(_UNK)
            values = [self.node(depth + 1) for _ in range(arity)]
            operator = int(self.uniform() * 4)
            self.tokens[place] = _FIRST_OPERATOR + operator
            self.tokens.append(_CLOSE_ID)
            return _apply(operator, values)
        digit = int(self.uniform() * 10)
        self.grow(1)
        self.tokens.append(_FIRST_DIGIT + digit)
        return digit

    def tree(self) -> tuple[list[int], int] | None:
        self.trees += 1
        self.tokens, self.count = [], 0
        try:
            value = self.node(1)
        except _TooLong:
            return None
        return (self.tokens, value) if self.count > self.config.min_length else None


def _distinct(generator: _Generator) -> Iterator[tuple[list[int], int]]:
    seen: set[bytes] = set()
    rejected = 0
    while True:
        tree = generator.tree()
        key = bytes(tree[0]) if tree is not None else None
        if tree is None or key is None or key in seen:
            rejected += 1
            if rejected == 1_000_000:
                raise ValueError(
                    f"no new expression in a million draws from {generator.config} after "
                    f"{len(seen)}; ask for fewer examples or a wider window of lengths."
                )
            continue
        rejected = 0
        seen.add(key)
        yield tree


def generate_listops(
    count: int, *, config: ListOpsConfig | None = None, seed: int = 0
) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Distinct random ListOps expressions, by the generator of the Long Range Arena.

    A node of depth d < max_depth is an operator with probability ¼ (a digit if `r > 0.25`), with
    an arity uniform in 2..max_args, children from left to right, then the operator, uniform among
    four; all other nodes are uniform digits. Kept are lengths strictly inside the window.

    Args:
      count: expressions to return.
      config: of the generator; by default that of the Long Range Arena.
      seed: of the generator.

    Returns:
      Token numbers of each expression (int8, see `LISTOPS_VOCABULARY`), values `[count]`, and how
      many trees were drawn (of which about one in twelve has an accepted length).

    Raises:
      ValueError: `count` is below 1, or so many distinct expressions are out of reach.

    Example:
      >>> expressions, values, trees = generate_listops(5, config=LISTOPS_MINI)
      >>> text = [LISTOPS_VOCABULARY[token] for token in expressions[0]]
      >>> evaluate_listops(text) == int(values[0])
      True
    """
    count = check_int("count", count, least=1)
    generator = _Generator(config or ListOpsConfig(), np.random.default_rng(seed))
    stream = _distinct(generator)
    pairs = [next(stream) for _ in range(count)]
    expressions = [np.asarray(tokens, np.int8) for tokens, _ in pairs]
    return expressions, np.asarray([value for _, value in pairs], np.int32), generator.trees


def _pad(expressions: Sequence[np.ndarray], values: np.ndarray, length: int) -> Arrays:
    longest = max(len(tokens) for tokens in expressions) + 1
    if longest > length:
        raise ValueError(
            f"length must hold the longest expression and the end token, {longest} positions; got "
            f"{length}."
        )
    inputs = np.full((len(expressions), length), _PAD, np.int8)
    for row, tokens in zip(inputs, expressions, strict=True):
        row[: len(tokens)] = tokens
        row[len(tokens)] = _EOS
    return {
        "inputs": inputs.astype(np.int32),
        "targets": np.asarray(values, np.int32),
        "mask": inputs != _PAD,
    }


def listops(
    *,
    train: int = 96_000,
    validation: int = 2_000,
    test: int = 2_000,
    config: ListOpsConfig | None = None,
    length: int | None = None,
    seed: int = 0,
) -> Task:
    """ListOps as a classification task: tokens, an end token, padding on the right, and a mask.

    The split is by order of generation, so that it depends on the seed alone. Pool with the mask:
    a mean over the padding all but stops learning.

    Args:
      train: training examples.
      validation: validation examples.
      test: test examples.
      config: of the generator; by default that of the Long Range Arena (`LISTOPS_MINI` for short
        expressions).
      length: padded length; by default `max_length` rounded up to a power of two (2048).
      seed: of the generator.

    Returns:
      Inputs `[n, length]` (18 symbols), values `[n]`, mask `[n, length]`.

    Raises:
      ValueError: `length` is too short, a count is below 1, or `config` allows no expression.

    Example:
      >>> task = listops(train=4, validation=1, test=2, config=LISTOPS_MINI)
      >>> task.train["inputs"].shape, task.vocabulary
      ((4, 128), 18)
    """
    config = config or ListOpsConfig()
    train, test = _check_counts(train, test)
    validation = check_int("validation", validation, least=1)
    if length is None:
        length = 1 << (config.max_length - 1).bit_length()
    length = check_int("length", length, least=1)
    expressions, values, _ = generate_listops(train + validation + test, config=config, seed=seed)
    cuts = [slice(0, train), slice(train, train + validation), slice(train + validation, None)]
    parts = [_pad(expressions[cut], values[cut], length) for cut in cuts]
    return _listops_task(*parts)


def _listops_task(train: Arrays, validation: Arrays, test: Arrays) -> Task:
    return Task(
        train=train,
        validation=validation,
        test=test,
        classes=10,
        vocabulary=len(LISTOPS_VOCABULARY),
        pooled=True,
    )


def _read_tsv(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    expressions, values = [], []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip("\r\n").split("\t")
            if number == 1 and fields[0] == "Source":
                continue
            if len(fields) != 2 or fields[1] not in _IDS or not fields[1].isdigit():
                raise ValueError(
                    f"{path.name}, line {number}: a line must be an expression, a tab, and a value "
                    f"from 0 to 9; got {line[:80]!r}."
                )
            words = fields[0].replace("(", " ").replace(")", " ").split()
            if not words:
                raise ValueError(f"{path.name}, line {number}: the expression is empty.")
            expressions.append(np.asarray([_IDS.get(word, _UNK) for word in words], np.int8))
            values.append(int(fields[1]))
    if not values:
        raise ValueError(f"{path.name} holds no expression.")
    return expressions, np.asarray(values, np.int32)


def read_listops(path: str | Path, *, length: int = 2048) -> Task:
    """The published ListOps files of the Long Range Arena.

    Columns are `Source` and `Target`; the binary brackets "(" and ")" are dropped.

    Args:
      path: the folder of `basic_train.tsv`, `basic_val.tsv` and `basic_test.tsv`, or one of them.
      length: padded length, the end token included.

    Returns:
      As `listops`.

    Raises:
      FileNotFoundError: one of the three files is missing.
      ValueError: a line is malformed, or an expression longer than `length` allows.

    Example:
      >>> read_listops("/nowhere")
      Traceback (most recent call last):
      FileNotFoundError: path must be a folder with basic_train.tsv, ...
    """
    folder = Path(path).expanduser()
    folder = folder.parent if folder.is_file() else folder
    names = ["basic_train.tsv", "basic_val.tsv", "basic_test.tsv"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"path must be a folder with {', '.join(names)}; {folder} has no {', '.join(missing)}."
        )
    length = check_int("length", length, least=1)
    return _listops_task(*(_pad(*_read_tsv(folder / name), length) for name in names))


def root_operator_accuracy(train: Arrays, test: Arrays | None = None) -> float:
    """Accuracy of predicting, for every root operator, the value most frequent under it.

    The shortcut that a model learns first: .371 at the settings of the Long Range Arena, where its
    Transformer has .3637.

    Args:
      train: ListOps examples on which the most frequent values are counted.
      test: examples that are predicted; by default the same.

    Returns:
      The accuracy.

    Example:
      >>> task = listops(train=500, validation=1, test=1, config=LISTOPS_MINI)
      >>> 0.25 < root_operator_accuracy(task.train) < 0.45
      True
    """
    test = train if test is None else test
    counts = np.zeros((len(LISTOPS_VOCABULARY), 10), int)
    np.add.at(counts, (train["inputs"][:, 0], train["targets"]), 1)
    guess = counts.argmax(axis=1)[test["inputs"][:, 0]]
    return float(np.mean(guess == test["targets"]))
