"""How often each code occurs."""

from functools import partial

import jax
import jax.numpy as jnp

__all__ = ["by_matmul", "by_scatter", "histogram"]

_LOW = 128
# Sums of ones in float32 are exact up to here.
_MOST = 1 << 24


def by_scatter(index: jax.Array, *, num_codes: int) -> jax.Array:
    """Counts [codes] of an int32 index [tokens] in [0, codes]; the last stands for no code."""
    known = jax.typeof(index).sharding
    sharding = None
    if any(known.spec):  # explicit: the scatter has to be told what it results in
        sharding = jax.sharding.NamedSharding(known.mesh, jax.sharding.PartitionSpec(None))
    empty = jnp.zeros(num_codes, jnp.int32)
    return empty.at[index].add(1, mode="drop", out_sharding=sharding)


def by_matmul(index: jax.Array, *, num_codes: int) -> jax.Array:
    """The same where scatters are slow: one-hot high digits times one-hot low digits."""
    high = jax.nn.one_hot(index // _LOW, num_codes // _LOW + 1, dtype=jnp.bfloat16)
    low = jax.nn.one_hot(index % _LOW, _LOW, dtype=jnp.bfloat16)
    table = jnp.einsum("th,tl->hl", high, low, preferred_element_type=jnp.float32)
    return table.reshape(-1)[:num_codes].astype(jnp.int32)


def histogram(index: jax.Array, num_codes: int) -> jax.Array:
    """Counts [codes] of an int32 index [tokens] in [0, codes]; the last stands for no code."""
    scatter = partial(by_scatter, num_codes=num_codes)
    if index.size >= _MOST or any(jax.typeof(index).sharding.spec):
        return scatter(index)
    matmul = partial(by_matmul, num_codes=num_codes)
    return jax.lax.platform_dependent(index, tpu=matmul, default=scatter)
