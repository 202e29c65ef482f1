"""The quantizers of the ablation behind one call: the layers of `jaxkit.quantize`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxkit.quantize import FSQ, LFQ, VectorQuantizer

__all__ = ["Bottleneck", "Quantized", "width"]


class Quantized(NamedTuple):
    """What a bottleneck makes of vectors.

    Attributes:
      output: what the decoder gets, with a gradient to the encoder.
      index: codes, int32.
      losses: of the bottleneck, by name and without their weights: of "commitment", "codebook" and
        "entropy" those that it has.
    """

    output: jax.Array
    index: jax.Array  # type: ignore[assignment]
    losses: dict[str, jax.Array]


def width(config: Any, arm: Mapping[str, Any]) -> int:
    """Features of a vector: d, for fsq one a level, for lfq one a bit."""
    kind = arm.get("quantizer", "codebook")
    if kind == "codebook":
        return config.code_dim
    return len(config.levels) if kind == "fsq" else int(math.log2(config.codes))


class Bottleneck(nnx.Module):
    """The quantizer of one arm.

    Args:
      config: of the experiment.
      arm: {"quantizer": "fsq"} or "lfq", or `estimator`, `codebook` and `init` ("uniform",
        "normal", or from `z`: "data", "kmeans") of a `VectorQuantizer`.
      z: encoded images, `[batch, tokens, d]`.
      key: of the initial codes.
    """

    def __init__(self, config: Any, arm: Mapping[str, Any], z: jax.Array, key: jax.Array):
        self.kind = arm.get("quantizer", "codebook")
        self.layer: Any
        if self.kind == "fsq":
            self.layer = FSQ(config.levels)
        elif self.kind == "lfq":
            self.layer = LFQ(config.codes, entropy_weight=1.0, commitment_weight=1.0)
        else:
            drawn, fitted = jax.random.split(key)
            from_data = arm["init"] in ("data", "kmeans")
            weights: dict[str, Any] = {}
            if arm["estimator"] != "gumbel":  # whose codes learn from the decoder, without losses
                weights = {"commitment_weight": 1.0, "codebook_weight": 1.0}
            self.layer = VectorQuantizer(
                config.code_dim,
                config.codes,
                codebook=arm["codebook"],
                estimator=arm["estimator"],
                init="uniform" if from_data else arm["init"],
                rngs=nnx.Rngs(drawn),
                decay=config.decay,
                gumbel_temperature=config.temperature,
                **weights,
            )
            if from_data:
                self.layer.initialize(fitted, z, method=arm["init"], steps=config.kmeans_steps)
        self.num_codes: int = self.layer.num_codes

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Quantized:
        """Quantize `[batch, tokens, d]`; with a key, as a step of training that moves codes."""
        if self.kind == "fsq":
            out = self.layer(z)
            return Quantized(out.z_q, out.index, {})
        if self.kind == "lfq":
            out, losses = self.layer(z)
            return Quantized(out.z_q, out.index, losses)
        out = self.layer(z, train=key is not None, key=key)
        return Quantized(out.z_q, out.index, out.losses)
