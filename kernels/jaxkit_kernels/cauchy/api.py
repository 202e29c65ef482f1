"""Generating function of diagonal-plus-low-rank state-space kernels: the public function."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkit_kernels import _blocks, _dispatch, _sharding
from jaxkit_kernels.cauchy import reference, xla

__all__ = ["dplr_generating_function"]

Pair = tuple[Array, Array]
_BLOCKS = (_blocks.CauchyXlaBlocks, _blocks.CauchyTpuBlocks, _blocks.CauchyGpuBlocks)
_PACKAGE = "jaxkit_kernels.cauchy"


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

    def by_definition(alpha, beta, re, im, ct_re, ct_im):
        _, pull = jax.vjp(partial(reference.forward, length=length), alpha, beta, re, im)
        return pull((ct_re, ct_im))

    return {
        "xla": partial(xla.backward, **options),
        "pallas_tpu": _dispatch.lazy(f"{_PACKAGE}.pallas_tpu", "backward", **kernel),
        "pallas_gpu": _dispatch.lazy(f"{_PACKAGE}.pallas_gpu", "backward", **kernel),
        "reference": by_definition,
    }


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _generating_function(static, alpha, beta, re, im):
    table = _forward_table(static)
    return _dispatch.dispatch("dplr_generating_function", static[1], table, alpha, beta, re, im)


def _fwd(static, *operands):
    return _generating_function(static, *operands), operands


def _bwd(static, operands, cotangents):
    table = _backward_table(static)
    return _dispatch.dispatch(
        "the gradient of dplr_generating_function", static[1], table, *operands, *cotangents
    )


_generating_function.defvjp(_fwd, _bwd)


def _check_pair(name: str, pair: Any, shape: tuple[int, ...], dtype: Any) -> Pair:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (re, im); got {type(pair).__name__}.")
    for part, value in zip(("re", "im"), pair, strict=True):
        _check_array(f"{name} ({part})", value, shape, dtype)
    return pair[0], pair[1]


def _check_array(name: str, value: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, as alpha has; got {value.shape}.")
    if value.dtype != dtype:
        raise TypeError(f"{name} must have alpha's dtype {dtype}; got {value.dtype}.")


def dplr_generating_function(
    alpha: Float[Array, "heads modes"],
    beta: Float[Array, "heads modes"],
    cb: Pair,
    cp: Pair,
    pb: Pair,
    pp: Pair | Float[Array, "heads 1 1 modes"],
    *,
    length: int,
    implementation: _dispatch.Implementation = "auto",
    block_sizes: _blocks.BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "heads nodes"], Float[Array, "heads nodes"]]:
    r"""Truncated generating function of a bilinear DPLR kernel, at the roots of unity.

    With $s = \sin(\theta_l / 2)$, $c = \cos(\theta_l / 2)$, $\theta_l = 2 \pi l / L$ and the
    conjugate-symmetric Cauchy sum of $v_n = a_n + i b_n$

    $$ S[v] = \sum_n \frac{v_n}{x_n + i y_n^-} + \frac{\bar v_n}{x_n + i y_n^+}, \quad
       x_n = c \alpha_n, \quad y_n^\mp = s \mp c \beta_n, $$

    it is, at the node $z_l = e^{-i \theta_l}$,

    $$ G_l = \tfrac12 (c + i s) \bigl[ S[cb] - \tfrac c2 S[cp]
       (I + \tfrac c2 S[pp])^{-1} S[pb] \bigr], $$

    and the convolution kernel is `irfft(re + i im, n=length)`. No factor
    $1 / (1 + z)$ appears, so the node $z = -1$ needs no special care.

    Time is O(heads modes length); memory is O(heads (modes + length)) with the Pallas kernels and
    O(heads (modes chunk + length)) with `xla`, forward and backward. All but `reference` have
    their own reverse-mode rule (no forward mode).

    Args:
        alpha: $-\mathrm{Re}(\varepsilon \Lambda) / 2 > 0$, [heads, modes].
        beta: $\mathrm{Im}(\varepsilon \Lambda) / 2$, [heads, modes].
        cb: (re, im) of $\tilde C_n \varepsilon B_n$, [heads, modes].
        cp: (re, im) of $\tilde C_n \varepsilon P_{n,r}$, [heads, rank, modes].
        pb: (re, im) of $\bar Q_{n,r} \varepsilon B_n$, [heads, rank, modes].
        pp: (re, im) of $\bar Q_{n,r} \varepsilon P_{n,s}$, [heads, rank, rank, modes], or the real
            part alone in the tied case Q = P of rank one, where it is real.
        length: L, static.
        implementation: see `jaxkit_kernels`. The Pallas kernels take rank one and float32,
            bfloat16 or float16.
        block_sizes: a `CauchyXlaBlocks`, `CauchyTpuBlocks` or `CauchyGpuBlocks`.
        interpret: run the Pallas kernels in interpret mode, on any platform.

    Returns:
        (Re G, Im G), each [heads, length // 2 + 1], in the dtype of `alpha`. Half-precision input
        is computed in float32.

    Raises:
        ValueError: for a wrong shape, `length` < 1, or an unknown `implementation`.
        TypeError: for a wrong dtype or type.
        NotImplementedError: if the implementation named does not take these arguments.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
        >>> low = jnp.zeros((1, 1, 1))
        >>> re, im = dplr_generating_function(
        ...     0.5 * one, zero, (one, zero), (low, low), (low, low), low[None], length=4
        ... )
        >>> [f"{k:.3f}" for k in jnp.fft.irfft(jax.lax.complex(re, im), n=4)[0]]
        ['1.350', '0.450', '0.150', '0.050']

    Source: Gu, Goel, Ré, "Efficiently Modeling Long Sequences with Structured State Spaces" (2021),
    arXiv 2111.00396; kexue.fm post 10162.
    """
    _dispatch.check_implementation(implementation)
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"length must be an int; got {length!r}.")
    if length < 1:
        raise ValueError(f"length must be at least 1; got {length}.")
    if block_sizes is not None and not isinstance(block_sizes, _BLOCKS):
        names = ", ".join(kind.__name__ for kind in _BLOCKS)
        raise TypeError(f"block_sizes must be one of {names}; got {type(block_sizes).__name__}.")
    if not jnp.issubdtype(alpha.dtype, jnp.floating):
        raise TypeError(f"alpha must be a real floating-point array; got {alpha.dtype}.")
    if alpha.ndim != 2:
        raise ValueError(f"alpha must be [heads, modes]; got shape {alpha.shape}.")
    heads, modes = alpha.shape
    dtype = alpha.dtype
    if not isinstance(cp, (tuple, list)) or len(cp) != 2:
        raise TypeError(f"cp must be a pair (re, im); got {type(cp).__name__}.")
    if cp[0].ndim != 3:
        raise ValueError(f"cp must be [heads, rank, modes]; got shape {cp[0].shape}.")
    rank = cp[0].shape[1]
    _check_array("beta", beta, (heads, modes), dtype)
    cb = _check_pair("cb", cb, (heads, modes), dtype)
    cp = _check_pair("cp", cp, (heads, rank, modes), dtype)
    pb = _check_pair("pb", pb, (heads, rank, modes), dtype)
    if not isinstance(pp, (tuple, list)):
        if rank != 1:
            raise ValueError(f"pp as one real array takes rank 1; got rank {rank}.")
        _check_array("pp", pp, (heads, 1, 1, modes), dtype)
        pp = (pp, jnp.zeros_like(pp))
    else:
        pp = _check_pair("pp", pp, (heads, rank, rank, modes), dtype)

    compute = _dispatch.compute_dtype(dtype)
    planes = [
        jnp.concatenate(
            [
                cb[part][:, None],
                cp[part],
                pb[part],
                pp[part].reshape(heads, rank * rank, modes),
            ],
            axis=1,
        ).astype(compute)
        for part in (0, 1)
    ]
    operands = _sharding.together(alpha.astype(compute), beta.astype(compute), *planes)
    if implementation == "reference":
        re, im = reference.forward(*operands, length=length)
    else:
        static = (length, implementation, block_sizes, interpret)
        re, im = _generating_function(static, *operands)
    return re.astype(dtype), im.astype(dtype)
