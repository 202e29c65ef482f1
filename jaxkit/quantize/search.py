"""Which code a vector gets: the nearest one, or one drawn by its distance; and the look-up.

Codes are int32 in [0, K). The index K, one past the last, is the sentinel for "no code": vectors
that a mask excludes, and vectors that are not finite, which thus never become code 0.
"""

import jax
import jax.numpy as jnp
import jaxkit_kernels
from jax import lax

from jaxkit._checks import check_choice, check_real
from jaxkit._typing import Array, Bool, Float, Int, Key
from jaxkit.quantize._common import (
    METRICS,
    check_codebook,
    check_index,
    check_mask,
    check_vectors,
    select_rows,
    wide_dtype,
)
from jaxkit.quantize._sharding import BATCH, VECTORS, automatic

__all__ = ["lookup", "nearest_code", "normalize", "sample_code", "squared_distances"]


def normalize(x: Float[Array, "*batch dim"], *, eps: float = 1e-6) -> Float[Array, "*batch dim"]:
    """Vectors of length 1: `x / ‖x‖`.

    A vector with ‖x‖ ≤ eps has no direction: it gives zeros, and a zero gradient (not one of size
    1/eps).

    Args:
      x: Vectors.
      eps: Smallest norm with a direction.

    Returns:
      Unit vectors (or zeros) in the dtype of `x`.

    Raises:
      TypeError: If `x` is not real floating-point.
      ValueError: If `x` has no features or `eps` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> print(normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
      [[0.6 0.8]
       [0.  0. ]]
    """
    check_vectors(x, name="x")
    check_real("eps", eps, least=0)
    work = x.astype(wide_dtype(x))
    # Of order 1 before squaring, or large vectors would overflow and lose their direction. The
    # result does not depend on the scale, so that neither does its derivative.
    largest = lax.stop_gradient(jnp.max(jnp.abs(work), axis=-1, keepdims=True))
    # Within what has a reciprocal that is not flushed to zero.
    limits = jnp.finfo(work.dtype)
    scale = jnp.clip(largest, float(limits.tiny) ** 0.75, float(limits.max) ** 0.75)
    work = work / scale
    # The two `where`s keep the square root away from 0, where its derivative is infinite.
    squares = jnp.sum(work**2, axis=-1, keepdims=True)
    usable = ~(scale * jnp.sqrt(lax.stop_gradient(squares)) <= eps)
    norm = jnp.sqrt(jnp.where(usable, squares, 1))
    return jnp.where(usable, work / norm, 0).astype(x.dtype)


def _unit_codes(codebook: Array) -> Array:
    """Codes on the unit sphere; those without a direction so far off that none is nearest."""
    unit = normalize(codebook)
    # |4|² - 2·4·cos > |1|² - 2·cos' for all angles.
    nowhere = jnp.zeros_like(unit).at[:, 0].set(4)
    return jnp.where(jnp.all(unit == 0, axis=1, keepdims=True), nowhere, unit)


def _for_metric(z: Array, codebook: Array, metric: str) -> tuple[Array, Array]:
    """Vectors and codes whose Euclidean distances order as `metric` does."""
    if metric == "euclidean":
        return z, codebook
    wide = wide_dtype(z, codebook)
    return normalize(z.astype(wide)), _unit_codes(codebook.astype(wide))


def _check(z: Array, codebook: Array, metric: str, mask: Array | None) -> None:
    check_choice("metric", metric, METRICS)
    check_vectors(z, check_codebook(codebook)[1])
    check_mask(mask, z.shape[:-1])


@automatic(BATCH)
def nearest_code(
    z: Float[Array, "*batch dim"],
    codebook: Float[Array, "codes dim"],
    *,
    metric: str = "euclidean",
    mask: Bool[Array, "*batch"] | None = None,
    implementation: str = "auto",
) -> Int[Array, "*batch"]:
    """The index of the nearest code, `argmin_k ‖z - e_k‖²` or `argmax_k ⟨z, e_k⟩/(‖z‖‖e_k‖)`.

    The lowest index on ties. O(T K d) time, without the T x K matrix of distances (see
    `jaxkit_kernels.nearest_code`). Not differentiable: gradients come from
    `jaxkit.quantize.estimate`.

    Args:
      z: Vectors.
      codebook: Codes.
      metric: `euclidean` or `cosine`. With the latter a vector of norm ≤ 1e-6 is as far from one
        code as from any other, and such a code is never the nearest.
      mask: False for vectors to leave out.
      implementation: See `jaxkit_kernels`.

    Returns:
      int32 in [0, K]; K for vectors left out by the mask or not finite (and for all if the
      codebook is not finite).

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or a name is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> codebook = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> z = jnp.array([[0.2, 0.3], [0.0, 9.0], [jnp.nan, 0.0]])
      >>> nearest_code(z, codebook).tolist(), nearest_code(z, codebook, metric="cosine").tolist()
      ([0, 1, 2], [1, 1, 2])

    Source: van den Oord et al. 2017 (arXiv 1711.00937); post 10489.
    """
    _check(z, codebook, metric, mask)
    batch = z.shape[:-1]
    vectors, codes = _for_metric(z, codebook, metric)
    found = jaxkit_kernels.nearest_code(
        vectors.reshape(-1, z.shape[-1]),
        codes,
        mask=None if mask is None else mask.reshape(-1),
        implementation=implementation,  # type: ignore[arg-type]
    )
    return found.index.reshape(batch)


def squared_distances(
    z: Float[Array, "*batch dim"], codebook: Float[Array, "codes dim"]
) -> Float[Array, "*batch codes"]:
    """All ‖z - e_k‖², for what needs more than the nearest code. O(T K) memory; differentiable.

    Expanded as ‖z‖² - 2 z·e + ‖e‖² about the mean of the codebook, since the terms cancel where
    vectors are far from the origin and close to each other.

    Args:
      z: Vectors.
      codebook: Codes.

    Returns:
      Squared distances in float32, or float64 if an argument has it. May round to slightly below 0.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> squared_distances(jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [4.0, 5.0]])).tolist()
      [1.0, 25.0]
    """
    check_vectors(z, check_codebook(codebook)[1])
    wide = wide_dtype(z, codebook)
    z, codebook = z.astype(wide), codebook.astype(wide)
    centre = jax.lax.stop_gradient(jnp.mean(codebook, axis=0))
    z = z - jnp.expand_dims(centre, range(z.ndim - 1))
    codebook = codebook - centre[None]
    cross = jnp.einsum("...d,kd->...k", z, codebook, precision="highest")
    codes = jnp.expand_dims(jnp.sum(codebook**2, axis=-1), range(z.ndim - 1))
    return jnp.sum(z**2, axis=-1, keepdims=True) - 2 * cross + codes


def code_logits(
    z: Array, codebook: Array, *, metric: str, mask: Array | None
) -> tuple[Array, Array]:
    """`-‖z - e_k‖²` by `metric`, and which rows have a code at all."""
    _check(z, codebook, metric, mask)
    usable = jnp.all(jnp.isfinite(z), axis=-1)
    usable = usable if mask is None else usable & mask
    # Selected here, so that the gradients of the other rows do not meet 0 · NaN.
    vectors, codes = _for_metric(select_rows(usable, z), codebook, metric)
    logits = -squared_distances(vectors, codes)
    return logits, usable & jnp.all(jnp.isfinite(codebook))


@automatic(BATCH)
def sample_code(
    key: Key,
    z: Float[Array, "*batch dim"],
    codebook: Float[Array, "codes dim"],
    *,
    temperature: float,
    metric: str = "euclidean",
    mask: Bool[Array, "*batch"] | None = None,
) -> Int[Array, "*batch"]:
    """A code drawn with probability ∝ exp(-‖z - e_k‖²/temperature). O(T K) memory.

    Args:
      key: Random key.
      z: Vectors.
      codebook: Codes.
      temperature: Above 0; towards 0 the nearest code.
      metric: `euclidean`, or `cosine` (the same on normalised vectors).
      mask: False for vectors to leave out.

    Returns:
      int32 in [0, K]; K as in `nearest_code`.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape, a name or the temperature is wrong.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> codebook = jnp.array([[0.0], [1.0]])
      >>> index = sample_code(jax.random.key(0), jnp.zeros((4000, 1)), codebook, temperature=1.0)
      >>> bool(abs(index.mean() - 1 / (1 + jnp.e)) < 0.02)
      True
    """
    check_real("temperature", temperature, above=0)
    logits, usable = code_logits(z, codebook, metric=metric, mask=mask)
    scaled = jax.lax.stop_gradient(logits) / temperature
    drawn = jax.random.categorical(key, jnp.where(usable[..., None], scaled, 0), axis=-1)
    return jnp.where(usable, drawn.astype(jnp.int32), codebook.shape[0])


@automatic(VECTORS, like="index")
def lookup(
    codebook: Float[Array, "codes dim"], index: Int[Array, "*batch"], *, pad: str = "nan"
) -> Float[Array, "*batch dim"]:
    """The codes at `index`; differentiable in the codebook.

    Args:
      codebook: Codes.
      index: Integers; those outside [0, K), the sentinel K among them, are no code.
      pad: What no code looks up as: `nan`, so that it shows, or `zeros`.

    Returns:
      Codes, in the dtype of the codebook.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If the codebook's shape or `pad` is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> lookup(jnp.array([[1.0], [2.0]]), jnp.array([1, 0, 2])).tolist()
      [[2.0], [1.0], [nan]]
    """
    num_codes, _ = check_codebook(codebook)
    index = check_index(index)
    check_choice("pad", pad, ("nan", "zeros"))
    inside = (index >= 0) & (index < num_codes)  # a negative index would count from the end
    return jnp.take(
        codebook,
        jnp.where(inside, index, num_codes),
        axis=0,
        mode="fill",
        fill_value=jnp.nan if pad == "nan" else 0,
    )
