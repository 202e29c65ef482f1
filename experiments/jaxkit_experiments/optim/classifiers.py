"""Small image classification: the digits or CIFAR from a folder, an MLP and a ResNet-18."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkit._checks import check_choice
from jaxkit_experiments.data import LabelledImages, split_digits
from jaxkit_experiments.vq.images import Shuffled

__all__ = ["MODELS", "Batches", "build", "digits"]

MODELS = ("mlp", "resnet18")


def digits() -> LabelledImages:
    """The digits in the shared order, 1400 to train and 397 to test.

    Example:
      >>> data = digits()
      >>> data.train_images.shape, data.test_labels.shape, data.classes
      ((1400, 8, 8, 1), (397,), 10)
    """
    return split_digits(1400)


class Batches:
    """Shuffled batches `{"images", "labels"}` with random access, as long as there are steps.

    Args:
      images: `[n, ...]`.
      labels: `[n]`.
      batch_size: examples in a batch.
      seed: of the shuffling.
      relabel: `[classes]`, what becomes of each label from step `relabel_at` on; None for nothing.
      relabel_at: the step.

    Example:
      >>> batches = Batches(np.zeros((4, 1)), np.arange(4), 4, 0, np.array([1, 0, 3, 2]), 1)
      >>> [sorted(batches[step]["labels"].tolist()) for step in (0, 1)]
      [[0, 1, 2, 3], [0, 1, 2, 3]]
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        relabel: np.ndarray | None = None,
        relabel_at: int = 0,
    ):
        self.images, self.labels = images, labels
        self.order = Shuffled(np.arange(len(images)), batch_size, seed)
        self.relabel, self.relabel_at = relabel, relabel_at

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        chosen = self.order[step]["images"]
        labels = self.labels[chosen]
        if self.relabel is not None and step >= self.relabel_at:
            labels = self.relabel[labels].astype(labels.dtype)
        return {"images": self.images[chosen], "labels": labels}


def build(name: str, shape: tuple[int, ...], classes: int, *, rngs: nnx.Rngs) -> Any:
    """A classifier from images `[batch, height, width, channels]` to logits `[batch, classes]`.

    "mlp" has one hidden layer of 64 tanh units; "resnet18" is ResNet-18 as for 32×32 images (a
    3×3 stem, no pooling in front) with group normalization, which has no statistics to keep.

    Args:
      name: "mlp" or "resnet18".
      shape: of one image.
      classes: number of logits.
      rngs: of the parameters.

    Example:
      >>> model = build("mlp", (8, 8, 1), 10, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 1))).shape
      (2, 10)
    """
    check_choice("model", name, MODELS)
    if name == "resnet18":
        return ResNet(shape[-1], classes, (64, 128, 256, 512), rngs=rngs)
    flatten = lambda x: x.reshape(x.shape[0], -1)
    hidden = nnx.Linear(int(np.prod(shape)), 64, rngs=rngs)
    return nnx.Sequential(flatten, hidden, jnp.tanh, nnx.Linear(64, classes, rngs=rngs))


def _conv(features_in: int, features: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(features_in, features, (size, size), strides=stride, use_bias=False, rngs=rngs)


class Block(nnx.Module):
    """Two normalized 3×3 convolutions beside a shortcut."""

    def __init__(self, features_in: int, features: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = _conv(features_in, features, 3, stride, rngs)
        self.norm1 = nnx.GroupNorm(features, num_groups=min(32, features), rngs=rngs)
        self.conv2 = _conv(features, features, 3, 1, rngs)
        self.norm2 = nnx.GroupNorm(features, num_groups=min(32, features), rngs=rngs)
        same = features_in == features and stride == 1
        self.shortcut = None if same else _conv(features_in, features, 1, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """Two blocks at each width, at half the resolution of the width before."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        self.stem = _conv(channels, widths[0], 3, 1, rngs)
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            blocks.append(Block(before, width, 1 if stage == 0 else 2, rngs=rngs))
            blocks.append(Block(width, width, 1, rngs=rngs))
            before = width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(before, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
