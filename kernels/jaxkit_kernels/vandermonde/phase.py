r"""Phases $\beta l$ modulo $2 \pi$ with more digits than the dtype has.

$l$ reaches 1e5 and $\beta$ several turns, so the product in float32 would leave four digits of
phase. Turns $\beta / 2 \pi$ are kept as an unevaluated sum of short numbers instead, whose products
with (the two halves of) $l$ are exact; whole turns are dropped before anything is rounded.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["TURN", "Turns", "fraction", "fraction_of", "split_turns"]

Turns: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]

TURN = 2 * np.pi
_LOW_BITS = 12


def _short(x: jax.Array) -> jax.Array:
    """x with its last 12 bits cleared: products of two such numbers are exact in float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFF000), jnp.float32)


def split_turns(beta: jax.Array) -> Turns:
    r"""$\beta / 2 \pi$ as high + middle + low: two numbers of 12 bits and a remainder.

    Args:
        beta: radians, float32. In float64 the first number carries everything.

    Returns:
        Three arrays like `beta`.

    Example:
        >>> import jax.numpy as jnp
        >>> high, middle, low = split_turns(jnp.float32([1.0]))
        >>> abs(float(high[0]) + float(middle[0]) + float(low[0]) - 1 / TURN) < 1e-13
        True
    """
    if beta.dtype != jnp.float32:
        return beta / TURN, jnp.zeros_like(beta), jnp.zeros_like(beta)
    inverse = 1 / TURN
    inv_1 = np.float32(inverse)
    inv_1 = (inv_1.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    inv_2 = np.float32(inverse - float(inv_1))
    inv_2 = (inv_2.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    inv_3 = np.float32(inverse - float(inv_1) - float(inv_2))
    beta_1 = _short(beta)
    beta_2 = beta - beta_1
    lead = beta_1 * inv_1
    # In order of size; everything but the last line is exact or far below the sum's last bit.
    rest = beta_1 * inv_2 + beta_2 * inv_1
    rest_error = (beta_1 * inv_2 - (rest - beta_2 * inv_1)) + beta_2 * inv_2 + beta * inv_3
    total = lead + rest
    error = (rest - (total - lead)) + rest_error
    high = _short(total)
    return high, total - high, error


def fraction(position: jax.Array, turns: Turns) -> jax.Array:
    """Fractional part, in [-1/2, 1/2], of position times turns.

    Args:
        position: int32, at least 0 and below 2^24, broadcasting against the turns.
        turns: from `split_turns`.

    Returns:
        Turns without the whole ones.
    """
    if turns[0].dtype != jnp.float32:
        product = position.astype(turns[0].dtype) * turns[0]
        return _drop_turns(product)
    lower = position & ((1 << _LOW_BITS) - 1)
    return fraction_of(((position - lower).astype(jnp.float32), lower.astype(jnp.float32)), turns)


def _drop_turns(x: jax.Array) -> jax.Array:
    """x minus the nearest whole number, exactly.

    `round`, because every backend has it: Mosaic GPU has no `floor`, and XLA folds the constants
    of (x + M) - M away.
    """
    return x - jax.lax.round(x, jax.lax.RoundingMethod.TO_NEAREST_EVEN)


def fraction_of(pieces: Sequence[jax.Array], turns: Turns) -> jax.Array:
    """As `fraction`, for a position given as a sum of float32 integers of 12 bits each."""
    high, middle, low = turns
    total = sum(pieces[1:], start=pieces[0]) * low
    for piece in pieces:
        for part in (middle, high):
            product = piece * part  # exact: 12 bits times 12 bits
            total = total + _drop_turns(product)
    return _drop_turns(total)
