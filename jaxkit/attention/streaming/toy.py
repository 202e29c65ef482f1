"""A small decoder to run in all modes: what the examples, the tests and the experiment use.

Pre-norm residual layers with grouped-query attention and a GELU MLP, one position at a time.
"""

import math

import jax
import jax.numpy as jnp

from jaxkit._checks import check_int
from jaxkit._typing import Array, DType, Float, Key, Params
from jaxkit.attention.streaming.recompute import AttentionModel, ModelParams

__all__ = ["init_toy", "toy_logits", "toy_model"]


def _norm(x: Array) -> Array:
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    root = jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide / root).astype(x.dtype)


def _embed(table: Array, token: Array, position: Array) -> Array:
    # A token that there is not shows as NaN; -1 would be the last one.
    index = jnp.where(token < 0, len(table), token)
    return table.at[index].get(mode="fill", fill_value=jnp.nan)


def _query(layer: Params, x: Array, position: Array) -> Array:
    return jnp.einsum("d,dhk->hk", _norm(x), layer["query"])


def _key_value(layer: Params, x: Array, position: Array) -> tuple[Array, Array]:
    x = _norm(x)
    return jnp.einsum("d,dgk->gk", x, layer["key"]), jnp.einsum("d,dgk->gk", x, layer["value"])


def _block(layer: Params, x: Array, out: Array) -> Array:
    x = x + jnp.einsum("hk,hkd->d", out, layer["out"])
    return x + jax.nn.gelu(_norm(x) @ layer["up"]) @ layer["down"]


def toy_model(num_layers: int, *, window: int | None = None) -> AttentionModel:
    """The model of this module; `init_toy` makes its parameters.

    Args:
      num_layers: N.
      window: every query reads its last so many positions.

    Returns:
      The model.

    Raises:
      ValueError: `num_layers` is below 1.

    Example:
      >>> toy_model(3).num_layers
      3
    """
    num_layers = check_int("num_layers", num_layers, least=1)
    return AttentionModel(_embed, _query, _key_value, _block, num_layers, window=window)


def init_toy(
    key: Key,
    model: AttentionModel,
    *,
    vocab: int,
    dim: int,
    heads: int = 2,
    groups: int = 1,
    head_dim: int | None = None,
    hidden: int | None = None,
    dtype: DType = jnp.float32,
) -> ModelParams:
    """Random parameters: normal, with the variance of the reciprocal of what is summed.

    Args:
      key: random key.
      model: as of `toy_model`.
      vocab: number of tokens.
      dim: width of the model.
      heads: query heads.
      groups: key heads; they divide `heads`.
      head_dim: size of queries, keys and values. Default: `dim / heads`, rounded up.
      hidden: width of the MLP. Default: `2 dim`.
      dtype: of all parameters.

    Returns:
      Parameters; `embed` is the table `[vocab, dim]`.

    Raises:
      ValueError: a size is below 1, or `heads` is no multiple of `groups`.

    Example:
      >>> import jax
      >>> params = init_toy(jax.random.key(0), toy_model(3), vocab=5, dim=8)
      >>> params.layers["query"].shape
      (3, 8, 2, 4)
    """
    sizes = {"vocab": vocab, "dim": dim, "heads": heads, "groups": groups}
    vocab, dim, heads, groups = (check_int(n, s, least=1) for n, s in sizes.items())
    if heads % groups:
        raise ValueError(f"heads must be a multiple of groups = {groups}; got {heads}.")
    size = -(-dim // heads) if head_dim is None else check_int("head_dim", head_dim, least=1)
    hidden = 2 * dim if hidden is None else check_int("hidden", hidden, least=1)
    shapes = {
        "query": ((dim, heads, size), dim),
        "key": ((dim, groups, size), dim),
        "value": ((dim, groups, size), dim),
        "out": ((heads, size, dim), heads * size),
        "up": ((dim, hidden), dim),
        "down": ((hidden, dim), hidden),
    }
    table, *keys = jax.random.split(key, 1 + len(shapes))
    layers = {
        name: jax.random.normal(k, (model.num_layers, *shape), dtype) / math.sqrt(fan)
        for k, (name, (shape, fan)) in zip(keys, shapes.items(), strict=True)
    }
    return ModelParams(jax.random.normal(table, (vocab, dim), dtype), layers)


def toy_logits(params: ModelParams, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
    """Logits of the next token, by the embedding table itself.

    Args:
      params: parameters.
      x: outputs of the top layer.

    Returns:
      Logits over the vocabulary.

    Example:
      >>> import jax
      >>> params = init_toy(jax.random.key(0), toy_model(1), vocab=5, dim=8)
      >>> toy_logits(params, jax.numpy.ones((3, 8))).shape
      (3, 5)
    """
    return _norm(x) @ params.embed.T / math.sqrt(params.embed.shape[1])
