"""Search of a codebook: the public function."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxkit_kernels import _blocks, _dispatch
from jaxkit_kernels.nearest_code import reference, xla
from jaxkit_kernels.nearest_code.histogram import histogram

__all__ = ["NearestCode", "nearest_code"]

_BLOCKS = (
    _blocks.NearestCodeXlaBlocks,
    _blocks.NearestCodeTpuBlocks,
    _blocks.NearestCodeGpuBlocks,
)
_PACKAGE = "jaxkit_kernels.nearest_code"


class NearestCode(NamedTuple):
    """What `nearest_code` found. K, one past the last code, stands for "none".

    Attributes:
        index: of the nearest code, int32 [tokens], in [0, K].
        distance: squared, to that code, [tokens]; or None.
        second: index of the second nearest, int32 [tokens], in [0, K]; or None.
        counts: how many tokens each code is nearest to, int32 [codes]; or None.
    """

    index: Int[Array, " tokens"]  # type: ignore[assignment]
    distance: Float[Array, " tokens"] | None
    second: Int[Array, " tokens"] | None
    counts: Int[Array, " codes"] | None


def _check(x, codebook, mask, implementation, block_sizes) -> None:
    _dispatch.check_implementation(implementation)
    if block_sizes is not None and not isinstance(block_sizes, _BLOCKS):
        names = ", ".join(kind.__name__ for kind in _BLOCKS)
        raise TypeError(f"block_sizes must be one of {names}; got {type(block_sizes).__name__}.")
    for name, value, axes in (
        ("x", x, "tokens, features"),
        ("codebook", codebook, "codes, features"),
    ):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} must be a real floating-point array; got {value.dtype}.")
        if value.ndim != 2:
            raise ValueError(f"{name} must be [{axes}]; got shape {value.shape}.")
    if codebook.shape[0] < 1 or codebook.shape[1] < 1:
        raise ValueError(
            f"codebook must hold at least one code of one feature; got shape {codebook.shape}."
        )
    if x.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"x must have the codebook's {codebook.shape[1]} features; got shape {x.shape}."
        )
    if mask is None:
        return
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean; got {mask.dtype}.")
    if mask.shape != x.shape[:1]:
        raise ValueError(f"mask must have shape {x.shape[:1]}, one a token; got {mask.shape}.")


def nearest_code(
    x: Float[Array, "tokens features"],
    codebook: Float[Array, "codes features"],
    *,
    mask: Bool[Array, " tokens"] | None = None,
    distance: bool = False,
    second: bool = False,
    counts: bool = False,
    implementation: _dispatch.Implementation = "auto",
    block_sizes: _blocks.BlockSizes | None = None,
    interpret: bool = False,
) -> NearestCode:
    r"""The code nearest to each vector, by squared Euclidean distance.

    $$ i_t = \arg\min_k \|x_t - c_k\|^2, $$

    the lowest index on ties. The search takes O(T K d) time. All forms but `reference` keep a
    running minimum, never the T x K distances, and minimise
    $\tfrac12 \|c_k\|^2 - x_t \cdot c_k$ in full float32 about the codebook's centre; the distance
    reported is summed afresh from $x_t - c_{i_t}$.

    A token that has no nearest code gets the index K (and the distance NaN): one with a NaN or an
    infinity, and every token where the codebook has one. So a look-up of row K, out of range, must
    show it (`jnp.take` fills with NaN). A token that the mask excludes also gets K, the distance 0,
    and is not counted.

    The result is constant to differentiation: all gradients are zero. Gradients of quantization
    come from an estimator (straight-through, rotation).

    Args:
        x: vectors, [tokens, features].
        codebook: [codes, features].
        mask: False for tokens to leave out, [tokens].
        distance: also return the squared distance.
        second: also return the second nearest code; K where there is but one code.
        counts: also return how many tokens fall to each code.
        implementation: see `jaxkit_kernels`. The Pallas kernels compute in float32.
        block_sizes: a `NearestCodeXlaBlocks`, `NearestCodeTpuBlocks` or `NearestCodeGpuBlocks`.
        interpret: run the Pallas kernels in interpret mode, on any platform.

    Returns:
        A `NearestCode`; what was not asked for is None. The distance has the dtype of `x`; it is
        computed in float32, or float64 if either input has it.

    Raises:
        ValueError: for a wrong shape or an unknown `implementation`.
        TypeError: for a wrong dtype or type.
        NotImplementedError: if the implementation named does not take these arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> codebook = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> x = jnp.array([[0.9, 0.2], [0.5, 0.0], [jnp.nan, 0.0]])
        >>> found = nearest_code(x, codebook, distance=True, counts=True)
        >>> found.index.tolist(), found.counts.tolist()
        ([1, 0, 3], [1, 1, 0])
        >>> [f"{value:.2f}" for value in found.distance]
        ['0.05', '0.25', 'nan']

    Source: van den Oord, Vinyals, Kavukcuoglu (2017), arXiv 1711.00937; kexue.fm post 10489.
    """
    _check(x, codebook, mask, implementation, block_sizes)
    out_dtype, num_codes = x.dtype, codebook.shape[0]
    compute = np.promote_types(
        _dispatch.compute_dtype(x.dtype), _dispatch.compute_dtype(codebook.dtype)
    )
    x, codebook = (
        jax.lax.stop_gradient(jnp.asarray(value)).astype(compute) for value in (x, codebook)
    )

    options: dict[str, Any] = {"second": second, "block_sizes": block_sizes}
    kernel = {**options, "interpret": interpret}
    table: dict[str, Any] = {
        "xla": partial(xla.forward, **options),
        "pallas_tpu": _dispatch.lazy(f"{_PACKAGE}.pallas_tpu", "forward", **kernel),
        "pallas_gpu": _dispatch.lazy(f"{_PACKAGE}.pallas_gpu", "forward", **kernel),
        "reference": partial(reference.forward, second=second),
    }
    first, runner_up = _dispatch.dispatch("nearest_code", implementation, table, x, codebook)

    found = jnp.all(jnp.isfinite(x), axis=1) & jnp.all(jnp.isfinite(codebook))
    if mask is not None:
        found = found & mask
    index = jnp.where(found, first, num_codes)
    if runner_up is not None:
        runner_up = jnp.where(found, runner_up, num_codes)

    squared = None
    if distance:
        known = jax.typeof(x).sharding
        # Where it is explicit, the look-up has to be told what it results in.
        sharding = known if any(known.spec) else None
        nearest = codebook.at[index].get(mode="fill", fill_value=jnp.nan, out_sharding=sharding)
        squared = jnp.sum((x - nearest) ** 2, axis=1)
        if mask is not None:
            squared = jnp.where(mask, squared, 0)
        squared = squared.astype(out_dtype)
    occurrences = None
    if counts:
        occurrences = histogram(index, num_codes)
    return NearestCode(index, squared, runner_up, occurrences)
