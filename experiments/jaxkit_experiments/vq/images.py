"""Images for the autoencoders: the digits, or CIFAR-10 from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkit_experiments.data import digit_images

__all__ = ["Constant", "Images", "Shuffled", "cifar10", "digits"]

_CIFAR_RECORD = 1 + 3 * 32 * 32


class Images(NamedTuple):
    """Training and test images `[n, height, width, channels]`, float32 in [0, 1]."""

    train: np.ndarray
    test: np.ndarray


class Shuffled:
    """Batches of shuffled images with random access: `Shuffled(...)[step]["images"]`.

    What `jaxkit_experiments.data.batches` does, with every epoch permuted at once rather than index
    by index: a step of these small models takes a millisecond, which leaves no time for more.

    Args:
      images: `[n, ...]`.
      batch_size: images in a batch; at most n. Batches may straddle two epochs.
      seed: of the permutations, with the epoch's number.

    Raises:
      ValueError: the batch is larger than the data set.

    Example:
      >>> batches = Shuffled(np.arange(6), 4, seed=1)
      >>> seen = np.concatenate([batches[0]["images"], batches[1]["images"]])
      >>> sorted(seen[:6].tolist()), (batches[1]["images"] == seen[4:]).all().item()
      ([0, 1, 2, 3, 4, 5], True)
    """

    def __init__(self, images: np.ndarray, batch_size: int, seed: int):
        if not 1 <= batch_size <= len(images):
            raise ValueError(
                f"batch_size must be in [1, {len(images)}], the number of images; got {batch_size}."
            )
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.images))

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        epoch, start = divmod(step * self.batch_size, len(self.images))
        chosen = self._order(epoch)[start : start + self.batch_size]
        if len(chosen) < self.batch_size:
            chosen = np.concatenate(
                [chosen, self._order(epoch + 1)[: self.batch_size - len(chosen)]]
            )
        return {"images": self.images[chosen]}


class Constant:
    """Batches with constants beside: entries of one number an image, all equal.

    Example:
      >>> Constant(Shuffled(np.arange(6), 2, seed=0), {"decay": 0.5})[0]["decay"].tolist()
      [0.5, 0.5]
    """

    def __init__(self, source: Shuffled, constants: Mapping[str, float]):
        self.source = source
        self.constants = {
            name: np.full(source.batch_size, value, np.float32) for name, value in constants.items()
        }

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.source[step] | self.constants


def digits() -> Images:
    """scikit-learn's 1797 digits, 8×8×1: 1437 to train and 360 to test, in the shared order.

    Example:
      >>> digits().train.shape, digits().test.shape
      ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    parts = digit_images()
    images = np.concatenate([parts.train_images, parts.test_images])[..., None]
    return Images(images[:1437], images[1437:])


def cifar10(path: str | Path) -> Images:
    """CIFAR-10 in its binary version: `data_batch_*.bin` to train, `test_batch.bin` to test.

    A record is one byte of label and 3 × 32 × 32 bytes of pixels, channel by channel.

    Args:
      path: the folder with these files, or the folder that holds it (`cifar-10-batches-bin`).

    Returns:
      Images `[n, 32, 32, 3]`.

    Raises:
      FileNotFoundError: the files are not there.
      ValueError: a file is not made of whole records.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> for name in ("data_batch_1.bin", "test_batch.bin"):
      ...     _ = (folder / name).write_bytes(bytes([3]) + bytes([255]) * 3072)
      >>> images = cifar10(folder)
      >>> images.train.shape, float(images.test.min())
      ((1, 32, 32, 3), 1.0)
    """
    folder = Path(path).expanduser()
    inner = folder / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else folder
    train, test = sorted(folder.glob("data_batch_*.bin")), folder / "test_batch.bin"
    if not train or not test.exists():
        raise FileNotFoundError(
            f"data must be a folder with CIFAR-10's binary version, data_batch_*.bin and "
            f"test_batch.bin; got {folder}."
        )
    return Images(np.concatenate([_records(file) for file in train]), _records(test))


def _records(file: Path) -> np.ndarray:
    stored = np.frombuffer(file.read_bytes(), np.uint8)
    if not stored.size or stored.size % _CIFAR_RECORD:
        raise ValueError(
            f"data must hold whole records of {_CIFAR_RECORD} bytes; {file} has {stored.size}."
        )
    pixels = stored.reshape(-1, _CIFAR_RECORD)[:, 1:].reshape(-1, 3, 32, 32)
    return pixels.transpose(0, 2, 3, 1).astype(np.float32) / 255
