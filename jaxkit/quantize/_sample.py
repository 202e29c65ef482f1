"""Random rows of a batch that may be masked, hold NaN, and be spread over devices."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxkit._typing import Array, Bool, Float, Key
from jaxkit.quantize._common import check_mask, check_vectors


def usable_rows(z: Array, mask: Array | None) -> Array:
    """Rows [tokens] that are finite and not masked."""
    check_mask(mask, z.shape[:-1])
    finite = jnp.all(jnp.isfinite(z), axis=-1)
    return (finite if mask is None else finite & mask).reshape(-1)


def _gather(x: Array, axis_name) -> Array:
    """`x` of every device, [devices, ...]; by a sum, which is known to be equal on all devices."""
    here = lax.axis_index(axis_name)
    return lax.psum(
        jnp.zeros((lax.axis_size(axis_name), *x.shape), x.dtype).at[here].set(x), axis_name
    )


def sample_rows(
    key: Key,
    z: Float[Array, "*batch dim"],
    num: int,
    *,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, "num dim"], Bool[Array, ""]]:
    """`num` random rows without repetition (if there are that many), and whether there is any.

    Every usable row draws a number, and the `num` largest are taken: on each device, then of all.
    That is a draw over the whole batch, and the same rows on every device.
    """
    dim = check_vectors(z)
    usable, rows = usable_rows(z, mask), z.reshape(-1, dim)
    if not rows.shape[0]:  # one row that does not count, since an empty array has none to take
        usable, rows = jnp.zeros(1, bool), jnp.zeros((1, dim), z.dtype)
    if axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
    # Above 0 for rows that count, -1 for the others: these come last.
    score = jnp.where(usable, jax.random.uniform(key, usable.shape, jnp.float32), -1.0)
    score, chosen = lax.top_k(score, min(num, rows.shape[0]))
    drawn = jnp.take(rows, chosen, axis=0)
    if axis_name is not None:
        score = _gather(score, axis_name).reshape(-1)
        drawn = _gather(drawn, axis_name).reshape(-1, dim)
        score, chosen = lax.top_k(score, min(num, score.shape[0]))
        drawn = jnp.take(drawn, chosen, axis=0)
    found = jnp.sum(score >= 0)
    return jnp.take(drawn, jnp.arange(num) % jnp.maximum(found, 1), axis=0), found > 0
