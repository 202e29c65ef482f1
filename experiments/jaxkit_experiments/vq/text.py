"""Bytes to train, to validate and to test on, and how well they are predicted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkit._checks import check_int
from jaxkit_experiments.data import byte_corpus, byte_windows

__all__ = ["Corpus", "Windows", "held_out", "read_corpus", "readable"]


class Corpus(NamedTuple):
    """Three consecutive parts of a corpus, uint8."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def read_corpus(path: str | Path | None = None) -> Corpus:
    """A byte corpus in order: the first 90 % to train, then 5 % to validate, then 5 % to test.

    For Enwik8 (10⁸ bytes) these are the 90, 5 and 5 MB that everybody reports.

    Args:
      path: a file, or a folder of `.py` files; by default the Python standard library's source.

    Returns:
      The three parts.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: there are fewer than 20 bytes.

    Example:
      >>> [len(part) for part in read_corpus(__file__)] != [0, 0, 0]
      True
    """
    corpus = byte_corpus(path)
    part = len(corpus) // 20
    if not part:
        raise ValueError(f"data must hold at least 20 bytes to be split; got {len(corpus)}.")
    train = len(corpus) - 2 * part
    return Corpus(corpus[:train], corpus[train : train + part], corpus[train + part :])


@dataclasses.dataclass(frozen=True)
class Windows:
    """Batches of random windows, looked up by step: `source[step]["bytes"]` is `[batch, T + 1]`.

    Example:
      >>> source = Windows(np.arange(100, dtype=np.uint8), seed=0, batch_size=2, length=4)
      >>> source[3]["bytes"].shape, bool(np.all(np.diff(source[3]["bytes"]) == 1))
      ((2, 5), True)
    """

    corpus: np.ndarray
    seed: int
    batch_size: int
    length: int

    def __post_init__(self) -> None:
        check_int("batch_size", self.batch_size, least=1)
        check_int("length", self.length, least=1)
        if len(self.corpus) < self.length + 1:
            raise ValueError(
                f"corpus must have at least length + 1 = {self.length + 1} bytes; "
                f"got {len(self.corpus)}."
            )

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, step))
        starts = rng.integers(len(self.corpus) - self.length, size=self.batch_size)
        at = starts[:, None] + np.arange(self.length + 1)[None]
        return {"bytes": self.corpus[at].astype(np.int32)}


def held_out(part: np.ndarray, length: int, *, count: int, batch_size: int) -> np.ndarray:
    """Windows spread evenly over a part of a corpus, in batches.

    Args:
      part: `[n]` uint8.
      length: T, predicted bytes of a window.
      count: how many windows; all (none overlapping) if the part has no more.
      batch_size: of one batch; windows that fill no batch are left out.

    Returns:
      `[batches, batch, T + 1]` int32.

    Raises:
      ValueError: the part is too short for one batch.

    Example:
      >>> held_out(np.arange(100, dtype=np.uint8), 4, count=4, batch_size=2)[:, :, 0].tolist()
      [[0, 24], [48, 72]]
    """
    windows = byte_windows(part, length)
    count = min(check_int("count", count, least=1), len(windows))
    count -= count % check_int("batch_size", batch_size, least=1)
    if not count:
        raise ValueError(
            f"batch_size must be at most the {len(windows)} held-out windows; got {batch_size}."
        )
    chosen = windows[np.arange(count) * (len(windows) // count)]
    return chosen.reshape(-1, batch_size, length + 1).astype(np.int32)


def readable(text: np.ndarray) -> str:
    r"""Bytes as text on a terminal: what is no printable character shows as \xNN.

    Example:
      >>> readable(np.frombuffer(b"a = 'b'\n\0\xff", np.uint8))
      "a = 'b'\n\\x00\\xff"
    """
    decoded = np.asarray(text, np.uint8).tobytes().decode("utf-8", errors="backslashreplace")
    return "".join(
        char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in decoded
    )
