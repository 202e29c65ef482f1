"""From lags to keys and back: a row shifted by its own index, as padding and a reshape.

Within a block, query i sees the 2 L keys of the block before and its own; key j has the lag
L + i - j. Reversed, the biases b(i, W), ..., b(i, 0) of query i belong to the keys
L - W + i, ..., L + i, so row i is to be shifted by i. In rows of 2 L + 1 numbers, entry c of row i
stands at i (2 L + 1) + c = 2 L i + (i + c): read in rows of 2 L numbers, at column i + c.
"""

import jax
import jax.numpy as jnp

__all__ = ["to_keys", "to_lags"]


def to_keys(bias: jax.Array, length: int, extra: int = 0) -> jax.Array:
    """[..., L, W + 1] by lag -> [..., L, 2 L + extra] by key, zero beyond the lags 0..W.

    Example:
        >>> import jax.numpy as jnp
        >>> to_keys(jnp.array([[1, 2], [3, 4]]), 2).tolist()
        [[0, 2, 1, 0], [0, 0, 4, 3]]
    """
    window = bias.shape[-1] - 1
    lead = [(0, 0)] * (bias.ndim - 1)
    width = 2 * length + extra
    rows = jnp.pad(bias[..., ::-1], [*lead, (length - window, length + extra)])
    flat = rows.reshape(*bias.shape[:-2], length * (width + 1))
    return flat[..., : length * width].reshape(*bias.shape[:-2], length, width)


def to_lags(by_key: jax.Array, window: int) -> jax.Array:
    """The transpose of `to_keys`: [..., L, 2 L] by key -> [..., L, W + 1] by lag.

    Example:
        >>> import jax.numpy as jnp
        >>> to_lags(jnp.array([[5, 2, 1, 6], [7, 8, 4, 3]]), 1).tolist()
        [[1, 2], [3, 4]]
    """
    length = by_key.shape[-2]
    lead = [(0, 0)] * (by_key.ndim - 2)
    flat = by_key.reshape(*by_key.shape[:-2], 2 * length * length)
    flat = jnp.pad(flat, [*lead, (0, length)])
    rows = flat.reshape(*by_key.shape[:-2], length, 2 * length + 1)
    return rows[..., length - window : length + 1][..., ::-1]
