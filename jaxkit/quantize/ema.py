"""Codebooks that follow the mean of their vectors: exponential moving averages, and revival.

Of every code a running sum m and a running count N of the vectors it is nearest to are kept,

    N ← γN + (1-γ)n,    m ← γm + (1-γ) Σ_{i=k} z,    e = m / N,

with n and the sum over the whole batch, on all devices. Under `jit` with sharded arrays this is
so by itself; inside `shard_map` (or `pmap`) pass `axis_name`. Counts of a batch are int32: the same
number on 8 devices as on one, whatever the order of summation. All functions take one codebook;
`jax.vmap` them over heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkit._checks import check_choice, check_int, check_real, is_traced
from jaxkit._typing import Array, Bool, Float, Int, Key
from jaxkit.quantize._common import (
    check_codebook,
    check_index,
    check_mask,
    check_vectors,
    psum,
    wide_dtype,
)
from jaxkit.quantize._sample import sample_rows
from jaxkit.quantize._sharding import EVERYWHERE, automatic

__all__ = [
    "SMOOTHINGS",
    "EMAState",
    "batch_statistics",
    "ema_codebook",
    "ema_init",
    "ema_update",
    "revive",
]

SMOOTHINGS = ("laplace", "none", "clip")


class EMAState(NamedTuple):
    """Running statistics of a codebook, float32 (float64 for a float64 codebook).

    Attributes:
      sums: m, of the vectors of every code.
      counts: N, how many there are.
    """

    sums: Float[Array, "codes dim"]
    counts: Float[Array, "codes"]


def ema_init(codebook: Float[Array, "codes dim"], *, count: float = 1.0) -> EMAState:
    """The state of a codebook as if every code had been the mean of `count` vectors.

    Args:
      codebook: Codes.
      count: N, above 0.

    Returns:
      `EMAState(sums=count · codebook, counts=count)`.

    Raises:
      TypeError: If the codebook is not real floating-point.
      ValueError: If its shape or `count` is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> print(ema_codebook(ema_init(jnp.array([[1.0, 2.0]])), smoothing="none"))
      [[1. 2.]]
    """
    num_codes, _ = check_codebook(codebook)
    check_real("count", count, above=0)
    wide = wide_dtype(codebook)
    return EMAState(codebook.astype(wide) * count, jnp.full((num_codes,), count, wide))


@automatic(EVERYWHERE)
def batch_statistics(
    z: Float[Array, "*batch dim"],
    index: Int[Array, "*batch"],
    num_codes: int,
    *,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "codes dim"], Int[Array, "codes"]]:
    """Sum and number of the vectors of every code, `(Σ_{i=k} z, #{i=k})`.

    Vectors with an index outside [0, K) (the sentinel K: masked, or not finite) belong to no code
    and do not enter, whatever they contain.

    Args:
      z: Vectors.
      index: Their codes.
      num_codes: K.
      mask: False for vectors to leave out.
      axis_name: Mesh axes to sum over, inside `shard_map`.
      implementation: `scatter` (segment sum), `one_hot` (a matrix product, O(T K) memory), or
        `auto`: the product on TPU, where scattering is slow.

    Returns:
      `(sums, counts)`: sums in float32 (float64 for float64 `z`), counts int32. Not
      differentiable.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape, a name or `num_codes` is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> sums, counts = batch_statistics(jnp.array([[1.0], [2.0], [9.0]]), jnp.array([0, 0, 3]), 3)
      >>> print(sums[:, 0], counts)
      [3. 0. 0.] [2 0 0]
    """
    num_codes = check_int("num_codes", num_codes, least=1)
    dim = check_vectors(z)
    index = check_index(index)
    if tuple(index.shape) != tuple(z.shape[:-1]):
        raise ValueError(
            f"index must have shape {tuple(z.shape[:-1])}, one entry a vector; got "
            f"{tuple(index.shape)}."
        )
    check_mask(mask, z.shape[:-1])
    check_choice("implementation", implementation, ("auto", "scatter", "one_hot"))
    wide = wide_dtype(z)
    inside = (index >= 0) & (index < num_codes)
    inside = inside if mask is None else inside & mask
    rows = jnp.where(inside, index, num_codes).astype(jnp.int32).reshape(-1)
    vectors = jax.lax.stop_gradient(z).reshape(-1, dim).astype(wide)

    def scatter(vectors, rows):
        return jnp.zeros((num_codes, dim), wide).at[rows].add(vectors, mode="drop")

    def one_hot(vectors, rows):
        # 0 · NaN is NaN: vectors of no code must be zeros here.
        vectors = jnp.where((rows < num_codes)[:, None], vectors, 0)
        hot = jax.nn.one_hot(rows, num_codes, dtype=wide, axis=0)
        return jnp.dot(hot, vectors, precision="highest")

    if implementation == "auto":
        sums = jax.lax.platform_dependent(vectors, rows, tpu=one_hot, default=scatter)
    else:
        sums = {"scatter": scatter, "one_hot": one_hot}[implementation](vectors, rows)
    counts = jnp.zeros(num_codes, jnp.int32).at[rows].add(1, mode="drop")
    return psum(sums, axis_name), psum(counts, axis_name)


def ema_update(
    state: EMAState,
    sums: Float[Array, "codes dim"],
    counts: Int[Array, "codes"] | Float[Array, "codes"],
    *,
    decay: float = 0.99,
) -> EMAState:
    """`N ← γN + (1-γ)n`, `m ← γm + (1-γ) Σz`.

    γ = 0 with `smoothing="none"` is one step of Lloyd's k-means.

    Args:
      state: Running statistics.
      sums: Of the batch, from `batch_statistics`.
      counts: Of the batch.
      decay: γ in [0, 1).

    Returns:
      The new state, in the dtype of the old.

    Raises:
      ValueError: If `decay` is out of range or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> state = ema_init(jnp.zeros((1, 1)))
      >>> state = ema_update(state, jnp.array([[8.0]]), jnp.array([4]), decay=0.5)
      >>> print(state.sums[0, 0], state.counts[0])
      4.0 2.5
    """
    check_real("decay", decay, least=0)
    if not is_traced(decay) and decay >= 1:
        raise ValueError(f"decay must be in [0, 1); got {decay!r}.")
    for name, value, running in (("sums", sums, state.sums), ("counts", counts, state.counts)):
        if value.shape != running.shape:
            raise ValueError(
                f"{name} must have the state's shape {running.shape}; got {value.shape}."
            )

    def mix(old, new):
        return decay * old + (1 - decay) * new.astype(old.dtype)

    return EMAState(mix(state.sums, sums), mix(state.counts, counts))


def ema_codebook(
    state: EMAState,
    *,
    smoothing: str = "laplace",
    epsilon: float = 1e-5,
    floor: float = 0.01,
    previous: Float[Array, "codes dim"] | None = None,
) -> Float[Array, "codes dim"]:
    """The codes `m / Ñ` of a state.

    | smoothing | Ñ                               | codes that are not used                 |
    |-----------|---------------------------------|-----------------------------------------|
    | `laplace` | (N + ε) ΣN / (ΣN + Kε)          | drift towards 0 as N falls to ε         |
    | `none`    | N                               | stay                                    |
    | `clip`    | max(N, floor)                   | stay, then shrink once N is below floor |

    Args:
      state: Running statistics.
      smoothing: `laplace` (van den Oord et al.), `none`, or `clip` (Transformer-VQ).
      epsilon: ε of `laplace`, at least 0.
      floor: Of `clip`, above 0.
      previous: What a code with Ñ = 0 is (γ = 0, or a count that has underflowed): its last value.
        Default: zeros.

    Returns:
      Codes, in the dtype of the state (of `previous` if given).

    Raises:
      ValueError: If a name, a number or a shape is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> state = EMAState(jnp.array([[2.0], [4.0]]), jnp.array([1.0, 1.0]))
      >>> print(ema_codebook(state)[:, 0], ema_codebook(state, smoothing="none")[:, 0])
      [2. 4.] [2. 4.]

    Source: van den Oord et al. 2017 (arXiv 1711.00937, app. A.1); Lingle 2023 (arXiv 2309.16354).
    """
    check_choice("smoothing", smoothing, SMOOTHINGS)
    check_real("epsilon", epsilon, least=0)
    check_real("floor", floor, above=0)
    sums, counts = state
    if smoothing == "laplace":
        total = jnp.sum(counts)
        counts = (counts + epsilon) * (total / (total + counts.shape[0] * epsilon))
    elif smoothing == "clip":
        counts = jnp.maximum(counts, floor)
    known = (counts >= jnp.finfo(counts.dtype).tiny)[:, None]
    if previous is None:
        previous = jnp.zeros_like(sums)
    elif previous.shape != sums.shape:
        raise ValueError(
            f"previous must have the state's shape {sums.shape}; got {previous.shape}."
        )
    means = sums / jnp.where(known, counts[:, None], 1)
    return jnp.where(known, means, previous.astype(sums.dtype)).astype(previous.dtype)


@automatic(EVERYWHERE)
def revive(
    key: Key,
    state: EMAState,
    z: Float[Array, "*batch dim"],
    *,
    threshold: float,
    reset_size: float | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> EMAState:
    """Replace codes with `N < threshold` by vectors of the batch, statistics included.

    A dead code gets `N = reset_size` and `m = reset_size · z` with z drawn from the batch:
    different rows, or with repetition if there are fewer rows than codes. Rows that are masked or
    not finite are not drawn; with no row at all the state stays.

    Args:
      key: Random key; the same on all devices.
      state: Running statistics.
      z: Vectors of the batch (normalised for a cosine codebook).
      threshold: Smallest count of a living code, above 0.
      reset_size: The new count. Default: `threshold`.
      mask: False for vectors to leave out.
      axis_name: Mesh axes over which the batch is spread, inside `shard_map`.

    Returns:
      The new state. `state.counts < threshold` says which codes were replaced.

    Raises:
      TypeError: If a dtype is wrong.
      ValueError: If a shape or a number is wrong.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> state = EMAState(jnp.array([[3.0], [0.01]]), jnp.array([1.5, 0.01]))
      >>> state = revive(jax.random.key(0), state, jnp.array([[7.0]]), threshold=1.0)
      >>> print(ema_codebook(state, smoothing="none")[:, 0], state.counts)
      [2. 7.] [1.5 1. ]
    """
    return revive_rows(
        key, state, z, threshold=threshold, reset_size=reset_size, mask=mask, axis_name=axis_name
    )[0]


def revive_rows(
    key: Key,
    state: EMAState,
    z: Array,
    *,
    threshold: float,
    reset_size: float | None,
    mask: Array | None,
    axis_name: str | tuple[str, ...] | None,
) -> tuple[EMAState, Array, Array]:
    """`revive`, and which codes were replaced by which rows."""
    check_real("threshold", threshold, above=0)
    reset_size = threshold if reset_size is None else reset_size
    check_real("reset_size", reset_size, above=0)
    check_vectors(z, state.sums.shape[1])
    rows, any_row = sample_rows(key, z, state.sums.shape[0], mask=mask, axis_name=axis_name)
    rows = jax.lax.stop_gradient(rows).astype(state.sums.dtype)
    replaced = (state.counts < threshold) & any_row
    sums = jnp.where(replaced[:, None], rows * reset_size, state.sums)
    counts = jnp.where(replaced, jnp.asarray(reset_size, state.counts.dtype), state.counts)
    return EMAState(sums, counts), replaced, rows
