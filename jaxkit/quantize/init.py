"""Codebooks from data: vectors of a batch, or Lloyd's k-means of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxkit._checks import check_choice, check_int
from jaxkit._typing import Array, Bool, Float, Int, Key
from jaxkit.quantize._common import check_vectors, psum, wide_dtype
from jaxkit.quantize._sample import sample_rows, usable_rows
from jaxkit.quantize._sharding import BATCH, EVERYWHERE, automatic
from jaxkit.quantize.ema import EMAState, batch_statistics, ema_codebook
from jaxkit.quantize.search import nearest_code, normalize

__all__ = ["KMeans", "data_init", "kmeans", "uniform_init"]


def uniform_init(
    key: Key, num_codes: int, dim: int, *, scale: float | None = None, dtype=jnp.float32
) -> Float[Array, "codes dim"]:
    """Codes uniform in ±scale; by default in ±1/K, as in the first VQ-VAE code.

    Args:
      key: Random key.
      num_codes: K.
      dim: d.
      scale: Half the width of the cube. Default: 1/K.
      dtype: Of the codebook.

    Returns:
      The codebook.

    Raises:
      ValueError: If a size is below 1.

    Example:
      >>> import jax
      >>> print(bool(abs(uniform_init(jax.random.key(0), 8, 2)).max() <= 1 / 8))
      True
    """
    num_codes = check_int("num_codes", num_codes, least=1)
    dim = check_int("dim", dim, least=1)
    scale = 1 / num_codes if scale is None else scale
    return jax.random.uniform(key, (num_codes, dim), dtype, -scale, scale)


@automatic(EVERYWHERE)
def data_init(
    key: Key,
    z: Float[Array, "*batch dim"],
    num_codes: int,
    *,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "codes dim"]:
    """Codes drawn from the data: different rows, repeated only if there are fewer than K.

    Args:
      key: Random key; the same on all devices.
      z: Vectors.
      num_codes: K.
      mask: False for vectors to leave out. Vectors that are not finite are left out by themselves.
      axis_name: Mesh axes over which `z` is spread, inside `shard_map`.

    Returns:
      The codebook, in float32 at least; NaN if there is no vector to draw.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or `num_codes` is wrong.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> z = jnp.arange(6.0)[:, None]
      >>> codebook = data_init(jax.random.key(0), z, 6)
      >>> sorted(codebook[:, 0].tolist())
      [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    num_codes = check_int("num_codes", num_codes, least=1)
    rows, any_row = sample_rows(key, z, num_codes, mask=mask, axis_name=axis_name)
    return jnp.where(any_row, lax.stop_gradient(rows).astype(wide_dtype(z)), jnp.nan)


class KMeans(NamedTuple):
    """What `kmeans` found.

    Attributes:
      codebook: Centres.
      index: The nearest centre of every vector, K for vectors left out.
      inertia: Σ‖z - e_i‖², the sum of squares to it.
      steps: Updates of the centres that were made.
    """

    codebook: Float[Array, "codes dim"]
    index: Int[Array, "..."]  # type: ignore[assignment]
    inertia: Float[Array, ""]
    steps: Int[Array, ""]


def _squares(z: Array, codebook: Array, index: Array, axis_name) -> Array:
    """‖z - e_i‖² summed over the vectors that have a code."""
    found = (index < codebook.shape[0])[:, None]
    gap = z - jnp.take(codebook, index, axis=0, mode="fill", fill_value=0)
    return psum(jnp.sum(jnp.where(found, gap, 0) ** 2), axis_name)


def _plus_plus(key: Key, z: Array, num_codes: int, usable: Array) -> Array:
    """k-means++: every next centre is drawn with probability ∝ squared distance to the others."""
    first_key, key = jax.random.split(key)

    def draw(key, weight):
        # Where all distances are 0 (fewer points than centres) any usable row will do.
        weight = jnp.where(jnp.any(weight > 0), weight, usable.astype(weight.dtype))
        return z[jax.random.categorical(key, jnp.log(weight))]

    def distance(centre):
        return jnp.where(usable, jnp.sum((z - centre[None]) ** 2, axis=1), 0)

    first = draw(first_key, usable.astype(z.dtype))

    def step(carry, key):
        nearest, centre = carry
        nearest = jnp.minimum(nearest, distance(centre))
        chosen = draw(key, nearest)
        return (nearest, chosen), chosen

    start = jnp.where(usable, jnp.asarray(jnp.inf, z.dtype), 0)
    _, rest = lax.scan(step, (start, first), jax.random.split(key, num_codes - 1))
    return jnp.concatenate([first[None], rest])


@automatic(KMeans._make((EVERYWHERE, BATCH, EVERYWHERE, EVERYWHERE)))
def kmeans(
    key: Key | None,
    z: Float[Array, "*batch dim"],
    num_codes: int,
    *,
    init: str | Float[Array, "codes dim"] = "data",
    steps: int = 100,
    metric: str = "euclidean",
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str = "auto",
) -> KMeans:
    """Lloyd's algorithm: assign to the nearest centre, move centres to their means, repeat.

    Stops when no assignment changes, or after `steps` updates. A centre without vectors stays
    where it is. With `metric="cosine"` vectors and centres are normalised (spherical k-means).

    Args:
      key: Random key; the same on all devices. Unused (may be None) if `init` is an array.
      z: Vectors.
      num_codes: K.
      init: `data` (random vectors), `kmeans++`, or the first centres.
      steps: Most updates; 0 only assigns.
      metric: `euclidean` or `cosine`.
      mask: False for vectors to leave out. Vectors that are not finite are left out by themselves.
      axis_name: Mesh axes over which `z` is spread, inside `shard_map`. Not with `kmeans++`.
      implementation: Of the search, see `jaxkit_kernels`.

    Returns:
      A `KMeans`; centres and inertia in float32 at least. Centres are NaN if there is no vector.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape, a name or a number is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0.0], [1.0], [10.0], [12.0]])
      >>> found = kmeans(None, z, 2, init=z[:2])
      >>> print(found.codebook[:, 0], found.index, found.inertia, found.steps)
      [ 0.5 11. ] [0 0 1 1] 2.5 2

    Source: Lloyd 1982; Arthur, Vassilvitskii 2007 (k-means++).
    """
    num_codes = check_int("num_codes", num_codes, least=1)
    steps = check_int("steps", steps, least=0)
    check_choice("metric", metric, ("euclidean", "cosine"))
    dim = check_vectors(z)
    wide = wide_dtype(z)
    usable = usable_rows(z, mask)
    batch = z.shape[:-1]
    z = lax.stop_gradient(z).reshape(-1, dim).astype(wide)
    z = jnp.where(usable[:, None], z, 0)
    z = normalize(z) if metric == "cosine" else z
    if isinstance(init, str):
        check_choice("init", init, ("data", "kmeans++"))
        if key is None:
            raise ValueError(f"key must be a random key for init {init!r}; got None.")
        if init == "data":
            codebook = data_init(key, z, num_codes, mask=usable, axis_name=axis_name)
        elif axis_name is not None:
            raise ValueError(f"axis_name must be None for init 'kmeans++'; got {axis_name!r}.")
        else:
            codebook = _plus_plus(key, z, num_codes, usable)
            codebook = jnp.where(jnp.any(usable), codebook, jnp.nan)
    else:
        if tuple(init.shape) != (num_codes, dim):
            raise ValueError(f"init must have shape {(num_codes, dim)}; got {tuple(init.shape)}.")
        codebook = lax.stop_gradient(init).astype(wide)
        codebook = normalize(codebook) if metric == "cosine" else codebook

    def assign(codebook):
        # Unit vectors order alike by both metrics.
        return nearest_code(z, codebook, mask=usable, implementation=implementation)

    def update(codebook, index):
        sums, counts = batch_statistics(z, index, num_codes, axis_name=axis_name)
        state = EMAState(sums, counts.astype(wide))
        codebook = ema_codebook(state, smoothing="none", previous=codebook)
        return normalize(codebook) if metric == "cosine" else codebook

    def unfinished(carry):
        _, _, step, changed = carry
        return changed & (step < steps)

    def body(carry):
        codebook, index, step, _ = carry
        codebook = update(codebook, index)
        new = assign(codebook)
        changed = psum(jnp.sum(new != index), axis_name) > 0
        return codebook, new, step + 1, changed

    start = (codebook, assign(codebook), jnp.int32(0), jnp.bool_(True))
    codebook, index, taken, _ = lax.while_loop(unfinished, body, start)
    return KMeans(codebook, index.reshape(batch), _squares(z, codebook, index, axis_name), taken)
