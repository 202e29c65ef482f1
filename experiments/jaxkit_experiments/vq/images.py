"""Images for the autoencoders: the digits, or CIFAR from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkit_experiments import data

__all__ = ["Constant", "Images", "Shuffled", "cifar", "digits"]


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
    """The digits in the shared order, 1437 to train and 360 to test.

    Example:
      >>> digits().train.shape, digits().test.shape
      ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    return _without_labels(data.split_digits(1437))


def cifar(path: str | Path) -> Images:
    """CIFAR-10 or CIFAR-100 in its binary version; see `jaxkit_experiments.data.cifar`."""
    return _without_labels(data.cifar(path))


def _without_labels(labelled: data.LabelledImages) -> Images:
    return Images(labelled.train_images, labelled.test_images)
