"""Half angles of the roots of unity, on the host in float64."""

import numpy as np

__all__ = ["half_angles"]


def half_angles(length: int, *, padded: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    r"""$\sin(\theta_l / 2)$ and $\cos(\theta_l / 2)$, $\theta_l = 2 \pi l / L$, $l \le L / 2$.

    The cosine is computed as the sine of the complement, so that it is exactly zero at
    $l = L / 2$ and has full relative precision beside it.

    Args:
        length: L.
        padded: number of entries to give; those past $L/2$ are the node $z = -1$, where every
            sum is finite.

    Returns:
        Two float64 arrays.

    Example:
        >>> half_angles(2)[1].tolist()
        [1.0, 0.0]
    """
    count = length // 2 + 1
    index = np.arange(count)
    sine = np.sin(np.pi * index / length)
    cosine = np.sin(np.pi * (length - 2 * index) / (2 * length))
    extra = (0, (count if padded is None else padded) - count)
    return np.pad(sine, extra, constant_values=1.0), np.pad(cosine, extra)
