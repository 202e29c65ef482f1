"""Losses that keep encoder and codebook together, and the codes apart.

Naming: here `commitment` is the term that moves the encoder, ‖z - sg(q)‖² (weight 0.25 in VQ-VAE),
and `codebook` the one that moves the codes, ‖q - sg(z)‖². Post 10489 calls the weight of the
second β and of the first γ; the papers call the weight of the first β.
"""

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_real
from jaxkit._typing import Array, Bool, Float
from jaxkit.quantize._common import (
    check_codebook,
    check_mask,
    check_vectors,
    psum,
    select_rows,
    wide_dtype,
)
from jaxkit.quantize._sharding import EVERYWHERE, automatic
from jaxkit.quantize.search import normalize, squared_distances

__all__ = [
    "code_entropies",
    "codebook_loss",
    "commitment_loss",
    "entropy_loss",
    "orthogonality_loss",
]


def _mean_square(z: Array, q: Array, mask: Array | None, reduction: str, axis_name) -> Array:
    dim = check_vectors(z)
    if tuple(q.shape) != tuple(z.shape):
        raise ValueError(f"q must have the shape {z.shape} of z; got {tuple(q.shape)}.")
    check_mask(mask, z.shape[:-1])
    check_choice("reduction", reduction, ("mean", "sum"))
    wide = wide_dtype(z, q)
    gap = z.astype(wide) - q.astype(wide)
    # Selected before squaring: what a masked row holds, NaN included, reaches no gradient.
    squares = jnp.sum(select_rows(mask, gap) ** 2, axis=-1).reshape(-1)
    total = weighted_mean_rows(squares, None if mask is None else mask.reshape(-1), axis_name)
    return total / dim if reduction == "mean" else total


@automatic(EVERYWHERE)
def commitment_loss(
    z: Float[Array, "*batch dim"],
    q: Float[Array, "*batch dim"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
    reduction: str = "mean",
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """`‖z - sg(q)‖²`: moves vectors towards their codes.

    Args:
      z: Vectors.
      q: Their codes.
      mask: False for vectors to leave out.
      reduction: Over features: `mean` (all elements are averaged) or `sum` (Transformer-VQ).
        Vectors are always averaged.
      axis_name: Mesh axes over which `z` is spread, inside `shard_map`: the mean is then over the
        vectors of all devices.

    Returns:
      A scalar in float32 (float64 if an argument has it); 0 without vectors.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If shapes differ or `reduction` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> print(commitment_loss(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))))
      5.0

    Source: van den Oord et al. 2017 (arXiv 1711.00937).
    """
    return _mean_square(z, jax.lax.stop_gradient(q), mask, reduction, axis_name)


@automatic(EVERYWHERE)
def codebook_loss(
    z: Float[Array, "*batch dim"],
    q: Float[Array, "*batch dim"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
    reduction: str = "mean",
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """`‖q - sg(z)‖²`: moves codes towards their vectors.

    A gradient step on the sum of squares with rate 1/(2n) for a code of n vectors lands on their
    mean.

    Args:
      z: Vectors.
      q: Their codes, from `lookup`.
      mask: False for vectors to leave out.
      reduction: As in `commitment_loss`.
      axis_name: As in `commitment_loss`.

    Returns:
      A scalar in float32 (float64 if an argument has it); 0 without vectors.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If shapes differ or `reduction` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> print(codebook_loss(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2)), reduction="sum"))
      10.0

    Source: van den Oord et al. 2017 (arXiv 1711.00937).
    """
    return _mean_square(jax.lax.stop_gradient(z), q, mask, reduction, axis_name)


def orthogonality_loss(codebook: Float[Array, "codes dim"]) -> Float[Array, ""]:
    """Mean squared cosine between different codes, `(Σ_{k,l} cos²(e_k, e_l) - K)/K²`.

    0 for orthogonal codes. Computed as ‖ÊᵀÊ‖² from the d x d matrix if that is smaller than K x K:
    O(K d min(K, d)).

    Args:
      codebook: Codes.

    Returns:
      A scalar in float32 (float64 for a float64 codebook).

    Raises:
      TypeError: If the dtype is wrong.
      ValueError: If the shape is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> equal = orthogonality_loss(jnp.ones((2, 2)))
      >>> print(orthogonality_loss(jnp.eye(2)), f"{equal:.4f}")
      0.0 0.5000

    Source: Shin et al. 2021 (arXiv 2112.00384).
    """
    num_codes, dim = check_codebook(codebook)
    unit = normalize(codebook.astype(wide_dtype(codebook)))
    unit = unit if num_codes <= dim else unit.T  # ‖ÊÊᵀ‖ = ‖ÊᵀÊ‖
    gram = jnp.dot(unit, unit.T, precision="highest")
    # Σ_k cos²(e_k, e_k) is K, less the codes without a direction.
    diagonal = jnp.sum(jnp.sum(unit**2, axis=0 if num_codes > dim else 1) ** 2)
    return (jnp.sum(gram**2) - diagonal) / num_codes**2


def weighted_mean_rows(x: Array, mask: Array | None, axis_name=None) -> Array:
    """Mean of `x` [tokens, ...] over its (unmasked) rows, on all devices; 0 without rows."""
    if mask is None:
        rows = jnp.int32(x.shape[0])
    else:
        x = jnp.where(jnp.expand_dims(mask, range(1, x.ndim)), x, 0)
        rows = jnp.sum(mask, dtype=jnp.int32)
    rows = jnp.maximum(psum(rows, axis_name), 1)
    return psum(jnp.sum(x, axis=0), axis_name) / rows.astype(x.dtype)


def entropy(p: Array, axis: int = -1) -> Array:
    """`-Σ p ln p` in nats, with a finite gradient where p = 0."""
    safe = jnp.where(p > 0, p, 1)
    return -jnp.sum(p * jnp.log(safe), axis=axis)


@automatic(EVERYWHERE)
def code_entropies(
    z: Float[Array, "*batch dim"],
    codebook: Float[Array, "codes dim"],
    *,
    temperature: float = 1.0,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(E H(p(·|z)), H(E p(·|z)))` in nats, p(k|z) ∝ exp(-‖z - e_k‖²/temperature).

    The first is small where vectors are close to one code, the second is large (at most ln K)
    where all codes are used. O(T K) memory.

    Args:
      z: Vectors.
      codebook: Codes.
      temperature: Above 0.
      mask: False for vectors to leave out.
      axis_name: Mesh axes over which `z` is spread, inside `shard_map`.

    Returns:
      Two scalars in float32 (float64 if an argument has it).

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or the temperature is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> e = jnp.array([[0.0], [9.0]])
      >>> own, mean = code_entropies(e, e)
      >>> print(f"{own:.4f} {mean:.4f}")
      0.0000 0.6931
    """
    check_real("temperature", temperature, above=0)
    check_mask(mask, z.shape[:-1])
    rows = None if mask is None else mask.reshape(-1)
    distances = squared_distances(select_rows(mask, z), codebook)
    logits = -distances.reshape(-1, codebook.shape[0]) / temperature
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    own = -jnp.sum(p * log_p, axis=-1)
    return (
        weighted_mean_rows(own, rows, axis_name),
        entropy(weighted_mean_rows(p, rows, axis_name)),
    )


@automatic(EVERYWHERE)
def entropy_loss(
    z: Float[Array, "*batch dim"],
    codebook: Float[Array, "codes dim"],
    *,
    temperature: float = 1.0,
    diversity_weight: float = 1.0,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """`E H(p(·|z)) - ζ H(E p(·|z))`: every vector sure of its code, all codes in use.

    Args:
      z: Vectors.
      codebook: Codes.
      temperature: Of p, see `code_entropies`.
      diversity_weight: ζ.
      mask: False for vectors to leave out.
      axis_name: Mesh axes over which `z` is spread, inside `shard_map`.

    Returns:
      A scalar in float32 (float64 if an argument has it).

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or a number is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> e = jnp.array([[0.0], [9.0]])
      >>> print(f"{entropy_loss(e, e):.4f}")
      -0.6931

    Source: Yu et al. 2023 (arXiv 2310.05737, equation 4).
    """
    check_real("diversity_weight", diversity_weight, least=0)
    own, mean = code_entropies(z, codebook, temperature=temperature, mask=mask, axis_name=axis_name)
    return own - diversity_weight * mean
