"""Encoders and decoders around a quantizer: an MLP for the digits, convolutions for photographs."""

from __future__ import annotations

import itertools
from typing import Any

import jax
from flax import nnx

from jaxkit._checks import check_choice

__all__ = ["MODELS", "Conv", "Mlp", "build"]

MODELS = ("mlp", "conv")
_HIDDEN = 128
_TOKENS = 4


class Mlp(nnx.Module):
    """64-128-128-(4 × d) and its mirror: every image is four codes.

    Args:
      shape: height, width and channels of an image.
      code_dim: d of a code.
      rngs: source of the initial parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> model = Mlp((8, 8, 1), 8, rngs=nnx.Rngs(0))
      >>> z = model.encode(jnp.zeros((2, 8, 8, 1)))
      >>> z.shape, model.decode(z).shape
      ((2, 4, 8), (2, 8, 8, 1))
    """

    def __init__(self, shape: tuple[int, int, int], code_dim: int, *, rngs: nnx.Rngs):
        self.shape, self.code_dim = shape, code_dim
        pixels, latent = shape[0] * shape[1] * shape[2], _TOKENS * code_dim
        sizes = (pixels, _HIDDEN, _HIDDEN, latent)
        self.encoder = _layers(sizes, rngs)
        self.decoder = _layers(sizes[::-1], rngs)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images `[batch, height, width, channels]` to vectors `[batch, 4, d]`."""
        hidden = _through(self.encoder, images.reshape(images.shape[0], -1))
        return hidden.reshape(-1, _TOKENS, self.code_dim)

    def decode(self, z: jax.Array) -> jax.Array:
        """Vectors to images; nothing keeps pixels in [0, 1]."""
        return _through(self.decoder, z.reshape(z.shape[0], -1)).reshape(-1, *self.shape)


class Conv(nnx.Module):
    """Two strided convolutions, two residual blocks and the mirror: a code for 4 × 4 pixels.

    The network of van den Oord et al. 2017 (1711.00937), section 4.1.

    Args:
      shape: height, width and channels of an image; the sides are multiples of 4.
      code_dim: d of a code.
      rngs: source of the initial parameters.

    Raises:
      ValueError: a side is no multiple of 4.

    Example:
      >>> import jax.numpy as jnp
      >>> model = Conv((8, 8, 1), 8, rngs=nnx.Rngs(0))
      >>> z = model.encode(jnp.zeros((2, 8, 8, 1)))
      >>> z.shape, model.decode(z).shape
      ((2, 4, 8), (2, 8, 8, 1))
    """

    def __init__(self, shape: tuple[int, int, int], code_dim: int, *, rngs: nnx.Rngs):
        height, width, channels = shape
        if height % 4 or width % 4:
            raise ValueError(f"shape must have sides that are multiples of 4; got {shape}.")
        self.grid = (height // 4, width // 4)
        self.code_dim = code_dim
        h = _HIDDEN

        def down(features: int) -> Any:
            return nnx.Conv(features, h, (4, 4), strides=2, rngs=rngs)

        def up(features: int) -> Any:
            return nnx.ConvTranspose(h, features, (4, 4), strides=2, rngs=rngs)

        self.down = nnx.List([down(channels), down(h)])
        self.encoder = nnx.List([_Residual(h, rngs=rngs) for _ in range(2)])
        self.to_code = nnx.Conv(h, code_dim, (1, 1), rngs=rngs)
        self.from_code = nnx.Conv(code_dim, h, (3, 3), rngs=rngs)
        self.decoder = nnx.List([_Residual(h, rngs=rngs) for _ in range(2)])
        self.up = nnx.List([up(h), up(channels)])

    def encode(self, images: jax.Array) -> jax.Array:
        """Images `[batch, height, width, channels]` to vectors `[batch, height·width/16, d]`."""
        x = images
        for layer in self.down:
            x = jax.nn.relu(layer(x))
        for layer in self.encoder:
            x = layer(x)
        return self.to_code(jax.nn.relu(x)).reshape(x.shape[0], -1, self.code_dim)

    def decode(self, z: jax.Array) -> jax.Array:
        """Vectors to images; nothing keeps pixels in [0, 1]."""
        x = self.from_code(z.reshape(z.shape[0], *self.grid, self.code_dim))
        for layer in self.decoder:
            x = layer(x)
        return self.up[1](jax.nn.relu(self.up[0](jax.nn.relu(x))))


class _Residual(nnx.Module):
    """x + conv1(relu(conv3(relu(x))))."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.second = nnx.Conv(features, features, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.second(jax.nn.relu(self.first(jax.nn.relu(x))))


def build(model: str, shape: tuple[int, int, int], code_dim: int, *, rngs: nnx.Rngs) -> Any:
    """The encoder and decoder named `model`, "mlp" or "conv"."""
    check_choice("model", model, MODELS)
    return (Mlp if model == "mlp" else Conv)(shape, code_dim, rngs=rngs)


def _layers(sizes: tuple[int, ...], rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(sizes)])


def _through(layers: Any, x: jax.Array) -> jax.Array:
    """Layers with a rectifier between them."""
    for layer in layers[:-1]:
        x = jax.nn.relu(layer(x))
    return layers[-1](x)
