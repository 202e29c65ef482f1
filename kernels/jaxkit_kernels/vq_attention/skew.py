"""From lags to keys and back: a row shifted by its own index, as padding and a reshape.

Within a block, query i sees the 2 L keys of the block before and its own; key j has the lag
L + i - j. Reversed, the biases b(i, W), ..., b(i, 0) of query i belong to the keys
L - W + i, ..., L + i, so row i is to be shifted by i. In rows of n + 1 numbers, entry c of row i
stands at i (n + 1) + c = i n + (i + c): read in rows of n numbers, at column i + c.

Of the first r queries of a block, the first L + r keys are enough.
"""

import jax
import jax.numpy as jnp

__all__ = ["to_keys", "to_lags"]


def to_keys(bias: jax.Array, length: int, extra: int = 0) -> jax.Array:
    """[..., r, W + 1] by lag -> [..., r, L + r + extra] by key, zero beyond the lags 0..W.

    Example:
        >>> import jax.numpy as jnp
        >>> to_keys(jnp.array([[1, 2], [3, 4]]), 2).tolist()
        [[0, 2, 1, 0], [0, 0, 4, 3]]
    """
    *lead, rows, lags = bias.shape
    width = length + rows + extra
    pad = [(0, 0)] * (bias.ndim - 1)
    padded = jnp.pad(bias[..., ::-1], [*pad, (length + 1 - lags, rows + extra)])
    flat = padded.reshape(*lead, rows * (width + 1))
    return flat[..., : rows * width].reshape(*lead, rows, width)


def to_lags(by_key: jax.Array, window: int) -> jax.Array:
    """The transpose of `to_keys`: [..., r, L + r] by key -> [..., r, W + 1] by lag.

    Example:
        >>> import jax.numpy as jnp
        >>> to_lags(jnp.array([[5, 2, 1, 6], [7, 8, 4, 3]]), 1).tolist()
        [[1, 2], [3, 4]]
    """
    *lead, rows, width = by_key.shape
    length = width - rows
    flat = by_key.reshape(*lead, rows * width)
    flat = jnp.pad(flat, [*[(0, 0)] * len(lead), (0, rows)])
    padded = flat.reshape(*lead, rows, width + 1)
    return padded[..., length - window : length + 1][..., ::-1]
