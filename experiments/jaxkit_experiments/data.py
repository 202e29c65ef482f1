"""Data that every machine already has, and batches that a resumed run finds again.

Nothing here downloads: the digits come with scikit-learn, and the byte corpus is the source of the
Python standard library. Experiments that name a public data set also read it from a path.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from jaxkit._checks import check_choice, check_int

__all__ = [
    "Arrays",
    "LabelledImages",
    "Split",
    "batches",
    "byte_corpus",
    "byte_windows",
    "cifar",
    "digit_images",
    "split_digits",
    "take",
]

Arrays = Mapping[str, np.ndarray]

# Folders whose contents are no library source, or differ between builds of one Python version.
_SKIPPED = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests", "turtledemo"}
)


class Split(NamedTuple):
    """Training and test examples: named arrays whose first axis is the example."""

    train: Arrays
    test: Arrays


class LabelledImages(NamedTuple):
    """Images `[n, height, width]` or `[n, height, width, channels]`, float32 in [0, 1], and labels.

    Labels are `[n]` int32.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


@cache
def digit_images() -> LabelledImages:
    """scikit-learn's 1797 digits, 8×8 pixels in [0, 1], 1257 for training and 540 for the test.

    Pixels are divided by 16 and examples shuffled by `default_rng(0).permutation`. The arrays are
    read-only, since every caller gets the same ones.

    Returns:
      Images `[n, 8, 8]` float32 and labels `[n]` int32, of training set and test set.

    Example:
      >>> images = digit_images()
      >>> images.train_images.shape, images.test_labels.shape
      ((1257, 8, 8), (540,))
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = (bunch.images[order] / 16).astype(np.float32)
    labels = bunch.target[order].astype(np.int32)
    parts = LabelledImages(images[:1257], labels[:1257], images[1257:], labels[1257:])
    for part in parts:
        part.flags.writeable = False
    return parts


def split_digits(train: int) -> LabelledImages:
    """The digits in the shared order, the first `train` for training, with an axis for channels.

    Example:
      >>> split_digits(1437).train_images.shape, split_digits(1437).test_images.shape
      ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    parts = digit_images()
    images = np.concatenate([parts.train_images, parts.test_images])[..., None]
    labels = np.concatenate([parts.train_labels, parts.test_labels])
    return LabelledImages(images[:train], labels[:train], images[train:], labels[train:])


def cifar(path: str | Path) -> LabelledImages:
    """CIFAR-10 or CIFAR-100 in its binary version, told by the names of the files.

    A record is the label (CIFAR-100: the coarse one and the fine one, which is taken) and
    3 × 32 × 32 bytes of pixels, channel by channel.

    Args:
      path: the folder with `data_batch_*.bin` and `test_batch.bin`, or `train.bin` and `test.bin`;
        or the folder that holds it (`cifar-10-batches-bin`, `cifar-100-binary`).

    Raises:
      FileNotFoundError: the files are not there.
      ValueError: a file is not made of whole records.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> for name in ("train.bin", "test.bin"):
      ...     _ = (folder / name).write_bytes(bytes([3, 57]) + bytes([255]) * 3072)
      >>> data = cifar(folder)
      >>> data.train_images.shape, data.test_labels.tolist(), data.classes
      ((1, 32, 32, 3), [57], 58)
    """
    folder = Path(path).expanduser()
    inner = [folder / name for name in ("cifar-10-batches-bin", "cifar-100-binary")]
    folder = next((each for each in inner if each.is_dir()), folder)
    ten = sorted(folder.glob("data_batch_*.bin")), folder / "test_batch.bin", 1
    hundred = sorted(folder.glob("train.bin")), folder / "test.bin", 2
    for train, test, labels in (ten, hundred):
        if train and test.exists():
            parts = [_records(file, labels) for file in train]
            images, of = (np.concatenate(part) for part in zip(*parts, strict=True))
            return LabelledImages(images, of, *_records(test, labels))
    raise FileNotFoundError(
        "data must be a folder with the binary version of CIFAR-10 (data_batch_*.bin, "
        f"test_batch.bin) or CIFAR-100 (train.bin, test.bin); got {folder}."
    )


def _records(file: Path, labels: int) -> tuple[np.ndarray, np.ndarray]:
    stored, size = np.frombuffer(file.read_bytes(), np.uint8), labels + 3 * 32 * 32
    if not stored.size or stored.size % size:
        raise ValueError(f"data must hold whole records of {size} bytes; {file} has {stored.size}.")
    records = stored.reshape(-1, size)
    pixels = records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return pixels.astype(np.float32) / 255, records[:, labels - 1].astype(np.int32)


def byte_corpus(path: str | Path | None = None, *, limit: int | None = None) -> np.ndarray:
    """The bytes of a file, of a folder's `.py` files, or of the Python standard library's source.

    Files are joined in the order of their names, each closed by a zero byte, so that one Python
    version gives one corpus wherever it is installed. Tests, installed packages and files written
    at build time are left out.

    Args:
      path: a file of any kind, or a folder; by default the running Python's standard library.
      limit: stop after this many bytes.

    Returns:
      `[n]` uint8.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: `path` holds no byte to read, or `limit` is below 1.

    Example:
      >>> byte_corpus(limit=1000).shape
      (1000,)
    """
    if limit is not None:
        limit = check_int("limit", limit, least=1)
    root = Path(sysconfig.get_path("stdlib") if path is None else path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"path must be a file or a folder; there is nothing at {root}.")
    if root.is_file():
        chunks: list[bytes] = [root.read_bytes()[:limit]]
    else:
        names = sorted(
            name.relative_to(root).as_posix()
            for name in root.rglob("*.py")
            if not _SKIPPED.intersection(name.relative_to(root).parts)
            and not name.name.startswith("_sysconfigdata")
        )
        chunks, size = [], 0
        for name in names:
            chunks.append((root / name).read_bytes() + b"\0")
            size += len(chunks[-1])
            if limit is not None and size >= limit:
                break
    corpus = np.frombuffer(b"".join(chunks)[:limit], np.uint8)
    if corpus.size == 0:
        raise ValueError(f"path must hold at least one byte of text; {root} holds none.")
    return corpus


def byte_windows(corpus: np.ndarray, length: int, *, stride: int | None = None) -> np.ndarray:
    """Windows of `length + 1` bytes: inputs are all but the last byte, targets all but the first.

    Args:
      corpus: `[n]` uint8.
      length: predicted bytes in a window.
      stride: distance of window starts; by default `length`, so that every byte but the first is
        predicted once (a last window that would be incomplete is not made).

    Returns:
      `[windows, length + 1]` uint8.

    Raises:
      ValueError: the corpus is shorter than one window.

    Example:
      >>> byte_windows(np.arange(7, dtype=np.uint8), 3).tolist()
      [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    length = check_int("length", length, least=1)
    stride = length if stride is None else check_int("stride", stride, least=1)
    if len(corpus) < length + 1:
        raise ValueError(
            f"corpus must have at least length + 1 = {length + 1} bytes; got {len(corpus)}."
        )
    return np.lib.stride_tricks.sliding_window_view(corpus, length + 1)[::stride]


def take(arrays: Arrays, index: np.ndarray | Sequence[int]) -> dict[str, np.ndarray]:
    """The examples at `index`, of every array."""
    return {name: values[index] for name, values in arrays.items()}


def batches(
    arrays: Arrays, batch_size: int, seed: int = 0, *, repeat: str = "forever"
) -> grain.MapDataset:
    """Shuffled batches with random access: `batches(...)[step]` is the batch of that step.

    Every epoch is a fresh permutation drawn from `seed` and the epoch's number; batches are always
    full and may straddle two epochs. Nothing is remembered between accesses, so a run that resumes
    at step k sees what it would have seen.

    Args:
      arrays: examples, by name; the first axes agree.
      batch_size: examples in a batch.
      seed: of the shuffling.
      repeat: "forever", or "once": one epoch in the given order, its last batch possibly smaller
        (for evaluation).

    Returns:
      A `grain.MapDataset` of dictionaries of arrays.

    Raises:
      ValueError: `arrays` is empty, first axes differ, or `batch_size` is not positive or, when
        repeating, larger than the data set.

    Example:
      >>> data = batches({"x": np.arange(10)}, 4, seed=1)
      >>> sorted(np.concatenate([data[0]["x"], data[1]["x"], data[2]["x"][:2]]).tolist())
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    check_choice("repeat", repeat, ("forever", "once"))
    batch_size = check_int("batch_size", batch_size, least=1)
    sizes = {name: np.shape(values)[:1] for name, values in arrays.items()}
    if not sizes or len(set(sizes.values())) != 1 or min(sizes.values()) in ((), (0,)):
        raise ValueError(f"arrays must share a first axis of at least 1; got lengths {sizes}.")
    (count,) = next(iter(sizes.values()))
    held = {name: np.asarray(values) for name, values in arrays.items()}
    gather = lambda index: take(held, index)
    source = grain.MapDataset.range(count)
    if repeat == "once":
        return source.batch(batch_size, drop_remainder=False, batch_fn=np.asarray).map(gather)
    if batch_size > count:
        raise ValueError(f"batch_size must be at most the {count} examples; got {batch_size}.")
    # Indices are shuffled and batched, and the rows gathered once for a batch: several times
    # cheaper than stacking examples one by one.
    return source.shuffle(seed=seed).repeat().batch(batch_size, batch_fn=np.asarray).map(gather)
