"""What a layer costs: multiplications per token, and what decoding has to hold."""

from typing import NamedTuple

from jaxkit._checks import check_int

__all__ = ["Costs", "attention_costs"]


class Costs(NamedTuple):
    """Multiply-accumulate operations per token, and bytes.

    Attributes:
      projections: To q, k, v and the gate, and back.
      attention: Scores and values over the window and the codes, (S + 2 L)(dk + dv) a head.
      codes: Search of the codebook.
      bias: Content-dependent biases, 2 L dk a head.
      reduction: One-hot product for the means.
      dense_attention: Scores and values of dense attention to `length` tokens.
      dense_bias: Its biases.
      state_bytes: (S + W)(dv + 1) numbers a group: the state of decoding.
      kv_bytes: Keys and values of `length` tokens.
    """

    projections: int
    attention: int
    codes: int
    bias: int
    reduction: int
    dense_attention: int
    dense_bias: int
    state_bytes: int
    kv_bytes: int

    @property
    def layer(self) -> int:
        """All of a layer over quantised keys."""
        return self.projections + self.attention + self.codes + self.bias + self.reduction

    @property
    def dense_layer(self) -> int:
        """All of a layer of dense attention."""
        return self.projections + self.dense_attention + self.dense_bias


def attention_costs(
    *,
    dim: int,
    key_dim: int,
    value_dim: int,
    num_codes: int,
    block_length: int,
    length: int,
    heads: int = 1,
    groups: int = 1,
    gated: bool = True,
    biased: bool = True,
    itemsize: int = 4,
) -> Costs:
    """Costs of one layer, against dense attention of the same shape.

    Dense attention is counted as T keys a query, without the half that causality spares.

    Args:
      dim: Width of the model.
      key_dim: dk.
      value_dim: dv.
      num_codes: S.
      block_length: L, also the window.
      length: T, for dense attention.
      heads: H.
      groups: G.
      gated: With a gate of `value_dim` (shga).
      biased: With the biases of Transformer-XL.
      itemsize: Bytes of a number.

    Returns:
      The counts.

    Raises:
      ValueError: If a size is out of range.

    Example:
      >>> costs = attention_costs(
      ...     dim=768,
      ...     key_dim=128,
      ...     value_dim=1536,
      ...     num_codes=512,
      ...     block_length=512,
      ...     length=131072,
      ... )
      >>> round(costs.dense_layer / costs.layer, 1), costs.kv_bytes // costs.state_bytes
      (32.8, 138)

    Source: Lingle 2023 (arXiv 2309.16354).
    """
    for name, value in (
        ("dim", dim),
        ("key_dim", key_dim),
        ("value_dim", value_dim),
        ("num_codes", num_codes),
        ("block_length", block_length),
        ("length", length),
        ("heads", heads),
        ("groups", groups),
        ("itemsize", itemsize),
    ):
        check_int(name, value, least=1)
    if heads % groups:
        raise ValueError(f"heads must be a multiple of groups = {groups}; got {heads}.")
    seen, width = num_codes + 2 * block_length, key_dim + value_dim
    inputs = heads * key_dim + groups * width + (heads * value_dim if gated else 0)
    return Costs(
        projections=dim * (inputs + heads * value_dim),
        attention=heads * seen * width,
        codes=groups * num_codes * key_dim,
        bias=heads * 2 * block_length * key_dim if biased else 0,
        reduction=groups * num_codes * value_dim,
        dense_attention=heads * length * width,
        dense_bias=heads * length * key_dim if biased else 0,
        state_bytes=itemsize * groups * (num_codes + block_length) * (value_dim + 1),
        kv_bytes=itemsize * groups * length * width,
    )
