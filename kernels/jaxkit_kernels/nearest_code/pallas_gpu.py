"""GPU kernel (Mosaic): a tile of tokens against a part of the codes a program.

A thread owns a few tokens. Their dot products with a block of codes grow in registers, feature by
feature: the tokens' feature is one coalesced load, the codes' are uniform ones. Multiply-adds in
full float32, since the tensor cores' TF32 confuses codes. The codebook is split in parts where the
tokens alone make too few programs; the parts' winners are compared afterwards.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxkit_kernels import _blocks, _mosaic_gpu, _sharding
from jaxkit_kernels.nearest_code.scores import centre_and_bias, least

__all__ = ["forward"]

_THREADS = 128
_UNROLL = 4
# Codes are counted in float32.
_MOST_CODES = 1 << 24
_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.NearestCodeGpuBlocks] = {}


def _sizes(
    tokens: int, codes: int, features: int, given: _blocks.BlockSizes | None
) -> _blocks.NearestCodeGpuBlocks:
    def heuristic() -> _blocks.NearestCodeGpuBlocks:
        # Four tokens times sixteen codes are 64 sums a thread, for 20 loads a feature.
        return _blocks.NearestCodeGpuBlocks(
            tokens=4 * _THREADS if tokens > _THREADS else _THREADS, codes=16
        )

    return _blocks.choose(
        given, _blocks.NearestCodeGpuBlocks, _TABLE, "cuda", (tokens, codes, features), heuristic
    )


def _kernel(
    part, tile, x, weights, bias, out, *, tokens: int, codes: int, blocks: int, second: bool
):
    at = pl.ds(tile * tokens, tokens)
    features = weights.shape[1]
    # Not constants: Mosaic GPU lays out constants otherwise, and a loop must keep the layout.
    zero = 0.0 * x[0, at]
    start = [zero + jnp.inf, zero]

    def step(b, carry):
        block = part * blocks + b

        def multiply(f, sums):
            for u in range(_UNROLL):
                feature = x[f * _UNROLL + u, at]
                sums = [
                    total + weights[block, f * _UNROLL + u, j] * feature
                    for j, total in enumerate(sums)
                ]
            return sums

        scores = jax.lax.fori_loop(0, features // _UNROLL, multiply, [zero] * codes)
        best, code, *runner = carry
        for j, product in enumerate(scores):
            new = product + bias[block, j]
            index = (block * codes + j).astype(jnp.float32)
            closer = new < best  # strict, so that the lowest index stays
            if second:
                other, other_code = runner
                closer_second = new < other
                other_code = jnp.where(
                    closer, code, jnp.where(closer_second, zero + index, other_code)
                )
                other = jnp.where(closer, best, jnp.where(closer_second, new, other))
                runner = [other, other_code]
            code = jnp.where(closer, zero + index, code)
            best = jnp.where(closer, new, best)
        return [best, code, *runner]

    found = jax.lax.fori_loop(0, blocks, step, start * 2 if second else start)
    for plane, value in enumerate(found):
        out[plane, part, at] = value


def forward(
    x: jax.Array,
    codebook: jax.Array,
    *,
    second: bool,
    block_sizes: _blocks.BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """As `reference.forward`, in float32."""
    (total, features), num_codes = x.shape, codebook.shape[0]
    if x.dtype != jnp.float32:
        raise NotImplementedError(f"the kernel computes in float32; got {x.dtype}.")
    if total == 0 or num_codes > _MOST_CODES:
        raise NotImplementedError(
            f"the kernel takes at least one token and at most {_MOST_CODES} codes; "
            f"got {x.shape} and {codebook.shape}."
        )
    _sharding.check_not_explicit(x, codebook)
    _mosaic_gpu.check_device()
    sizes = _sizes(total, num_codes, features, block_sizes)
    tiles, blocks = -(-total // sizes.tokens), -(-num_codes // sizes.codes)
    parts = min(max(4 * 132 // tiles, 1), blocks)  # four programs for each of 132 cores
    blocks = -(-blocks // parts)

    centre, bias = centre_and_bias(codebook)
    more_codes = parts * blocks * sizes.codes - num_codes
    more_features = -features % _UNROLL
    weights = jnp.pad(centre[None] - codebook, ((0, more_codes), (0, more_features)))
    weights = jnp.swapaxes(weights.reshape(parts * blocks, sizes.codes, -1), 1, 2)
    bias = jnp.pad(bias, (0, more_codes), constant_values=jnp.inf).reshape(-1, sizes.codes)
    more_tokens = tiles * sizes.tokens - total
    columns = jnp.pad((x - centre[None]).T, ((0, more_features), (0, more_tokens)))
    planes = 4 if second else 2
    out = _mosaic_gpu.launch(
        partial(_kernel, tokens=sizes.tokens, codes=sizes.codes, blocks=blocks, second=second),
        _sharding.result((planes, parts, tiles * sizes.tokens), jnp.float32, x, codebook),
        (parts, tiles),
        name="nearest_code",
        interpret=interpret,
    )(columns, weights, bias)
    out = _sharding.vary(out, x, codebook)[:, :, :total]

    # [tokens, parts] or [tokens, 2 parts]: what each part found.
    score = jnp.concatenate(list(out[0::2]), axis=0).T
    code = jnp.concatenate(list(out[1::2]), axis=0).T.astype(jnp.int32)
    first = least(score, code, num_codes)
    if not second:
        return first, None
    return first, least(jnp.where(code == first[:, None], jnp.inf, score), code, num_codes)
