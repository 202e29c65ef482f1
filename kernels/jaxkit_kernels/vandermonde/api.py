"""Kernels of diagonal state-space models: the public function."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkit_kernels import _blocks, _dispatch, _sharding
from jaxkit_kernels.vandermonde import reference, xla

__all__ = ["vandermonde"]

_BLOCKS = (
    _blocks.VandermondeXlaBlocks,
    _blocks.VandermondeTpuBlocks,
    _blocks.VandermondeGpuBlocks,
)
# Positions are split into two halves of 12 bits (`phase.fraction`).
_LONGEST = 1 << 24
_PACKAGE = "jaxkit_kernels.vandermonde"


def _forward_table(static: tuple[Any, ...]) -> dict[str, Any]:
    length, _, block_sizes, interpret = static
    options = {"length": length, "block_sizes": block_sizes}
    kernel = {**options, "interpret": interpret}
    return {
        "xla": partial(xla.forward, **options),
        "pallas_tpu": _dispatch.lazy(f"{_PACKAGE}.pallas_tpu", "forward", **kernel),
        "pallas_gpu": _dispatch.lazy(f"{_PACKAGE}.pallas_gpu", "forward", **kernel),
        "reference": partial(reference.forward, length=length),
    }


def _backward_table(static: tuple[Any, ...]) -> dict[str, Any]:
    length, _, block_sizes, interpret = static
    options = {"length": length, "block_sizes": block_sizes}
    kernel = {**options, "interpret": interpret}

    def by_definition(alpha, beta, v_re, v_im, cotangent):
        _, pull = jax.vjp(partial(reference.forward, length=length), alpha, beta, v_re, v_im)
        return pull(cotangent)

    return {
        "xla": partial(xla.backward, **options),
        "pallas_tpu": _dispatch.lazy(f"{_PACKAGE}.pallas_tpu", "backward", **kernel),
        "pallas_gpu": _dispatch.lazy(f"{_PACKAGE}.pallas_gpu", "backward", **kernel),
        "reference": by_definition,
    }


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vandermonde(static, *operands):
    return _dispatch.dispatch("vandermonde", static[1], _forward_table(static), *operands)


def _fwd(static, *operands):
    return _vandermonde(static, *operands), operands


def _bwd(static, operands, cotangent):
    table = _backward_table(static)
    name = "the gradient of vandermonde"
    return _dispatch.dispatch(name, static[1], table, *operands, cotangent)


_vandermonde.defvjp(_fwd, _bwd)


def vandermonde(
    alpha: Float[Array, "heads modes"],
    beta: Float[Array, "heads modes"],
    v_re: Float[Array, "heads modes"],
    v_im: Float[Array, "heads modes"],
    *,
    length: int,
    implementation: _dispatch.Implementation = "auto",
    block_sizes: _blocks.BlockSizes | None = None,
    interpret: bool = False,
) -> Float[Array, "heads length"]:
    r"""Kernel of a diagonal state-space model, one member of each conjugate pair given.

    $$ K_l = 2 \sum_n e^{-\alpha_n l} (a_n \cos \beta_n l - b_n \sin \beta_n l)
           = 2 \,\mathrm{Re} \sum_n v_n e^{l \varepsilon \Lambda_n}. $$

    The two-level forms split $l = q T + j$, so that only (L/T + T) M exponentials are taken, and
    reduce the phases modulo $2 \pi$ in more than float32 (`jaxkit_kernels.vandermonde.phase`):
    their error does not grow with the length as that of `reference` in float32 does. A real
    spectrum is `beta` = 0 with half its weights in `v_re`. All but `reference` have their own
    reverse-mode rule (no forward mode).

    Args:
        alpha: $-\mathrm{Re}(\varepsilon \Lambda)$, [heads, modes].
        beta: $\mathrm{Im}(\varepsilon \Lambda)$, radians per position, [heads, modes].
        v_re: real part of $v = C \bar B$, [heads, modes].
        v_im: imaginary part, [heads, modes].
        length: L, static, below 2^24.
        implementation: see `jaxkit_kernels`. The Pallas kernels take float32, bfloat16 or float16.
        block_sizes: a `VandermondeXlaBlocks`, `VandermondeTpuBlocks` or `VandermondeGpuBlocks`.
        interpret: run the Pallas kernels in interpret mode, on any platform.

    Returns:
        K, [heads, length], in the dtype of `alpha`. Half-precision input is computed in float32.

    Raises:
        ValueError: for a wrong shape or length, or an unknown `implementation`.
        TypeError: for a wrong dtype or type.
        NotImplementedError: if the implementation named does not take these arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> alpha, zero = jnp.full((1, 1), jnp.log(2.0)), jnp.zeros((1, 1))
        >>> [f"{k:.3f}" for k in vandermonde(alpha, zero, zero + 0.5, zero, length=4)[0]]
        ['1.000', '0.500', '0.250', '0.125']

    Source: Gupta, Gu, Berant (2022), arXiv 2203.14343; Gu, Gupta, Goel, Ré (2022), arXiv
    2206.11893; kexue.fm post 10162.
    """
    _dispatch.check_implementation(implementation)
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"length must be an int; got {length!r}.")
    if not 1 <= length < _LONGEST:
        raise ValueError(f"length must lie in [1, 2^24); got {length}.")
    if block_sizes is not None and not isinstance(block_sizes, _BLOCKS):
        names = ", ".join(kind.__name__ for kind in _BLOCKS)
        raise TypeError(f"block_sizes must be one of {names}; got {type(block_sizes).__name__}.")
    if not jnp.issubdtype(alpha.dtype, jnp.floating):
        raise TypeError(f"alpha must be a real floating-point array; got {alpha.dtype}.")
    if alpha.ndim != 2:
        raise ValueError(f"alpha must be [heads, modes]; got shape {alpha.shape}.")
    for name, value in (("beta", beta), ("v_re", v_re), ("v_im", v_im)):
        if value.shape != alpha.shape:
            raise ValueError(f"{name} must have alpha's shape {alpha.shape}; got {value.shape}.")
        if value.dtype != alpha.dtype:
            raise TypeError(f"{name} must have alpha's dtype {alpha.dtype}; got {value.dtype}.")
    compute = _dispatch.compute_dtype(alpha.dtype)
    operands = _sharding.together(*(x.astype(compute) for x in (alpha, beta, v_re, v_im)))
    if implementation == "reference":
        out = reference.forward(*operands, length=length)
    else:
        out = _vandermonde((length, implementation, block_sizes, interpret), *operands)
    return out.astype(alpha.dtype)
