"""TPU kernel: a tile of tokens against the codes, tile by tile, on the matrix unit in full float32.

The codes of a tile lie along lanes. A running (least score, slice) is kept in VMEM for each of the
128 lanes, so that a score costs compares and selects only; the lanes are reduced once a token.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxkit_kernels import _blocks, _sharding
from jaxkit_kernels.nearest_code.scores import centre_and_bias

__all__ = ["forward"]

_LANES = 128
# A tile of tokens, a tile of codes and their scores are in VMEM, the first two twice.
_MOST_FEATURES = 2048
_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.NearestCodeTpuBlocks] = {}


def _sizes(
    tokens: int, codes: int, features: int, given: _blocks.BlockSizes | None
) -> _blocks.NearestCodeTpuBlocks:
    def heuristic() -> _blocks.NearestCodeTpuBlocks:
        # Many tokens a tile, since each tile of them reads the whole codebook.
        most = 512 if features <= 512 else 256
        return _blocks.NearestCodeTpuBlocks(
            tokens=min(-(-tokens // _LANES) * _LANES, most),
            codes=min(-(-codes // _LANES) * _LANES, most),
        )

    return _blocks.choose(
        given, _blocks.NearestCodeTpuBlocks, _TABLE, "tpu", (tokens, codes, features), heuristic
    )


def _least(score: jax.Array, code: jax.Array, none: int) -> jax.Array:
    """The lowest of the codes with the least score, [tokens, 1]; `none` where none is finite."""
    least = jnp.min(score, axis=1, keepdims=True)
    hit = (score == least) & (jnp.abs(least) < jnp.inf)
    return jnp.min(jnp.where(hit, code, none), axis=1, keepdims=True)


def _kernel(x, centre, codebook, bias, out, best, slices, *, none: int, second: bool):
    tile = pl.program_id(1)
    width = codebook.shape[0] // _LANES

    @pl.when(tile == 0)
    def _():
        best[...] = jnp.full_like(best, jnp.inf)
        slices[...] = jnp.zeros_like(slices)

    score = bias[...] + jax.lax.dot_general(
        x[...] - centre[...],
        centre[...] - codebook[...],
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    least, at = best[0], slices[0]
    runner, runner_at = (best[1], slices[1]) if second else (least, at)
    for j in range(width):
        new, index = score[:, j * _LANES : (j + 1) * _LANES], tile * width + j
        closer = new < least  # strict, so that the lowest index stays
        if second:
            closer_second = new < runner
            runner_at = jnp.where(closer, at, jnp.where(closer_second, index, runner_at))
            runner = jnp.where(closer, least, jnp.where(closer_second, new, runner))
        at = jnp.where(closer, index, at)
        least = jnp.where(closer, new, least)
    best[0], slices[0] = least, at
    if second:
        best[1], slices[1] = runner, runner_at

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        lane = jax.lax.broadcasted_iota(jnp.int32, least.shape, 1)
        code = at * _LANES + lane
        first = _least(least, code, none)
        out[0, :] = first[:, 0]
        if second:
            won = code == first
            rest = jnp.where(won, runner, least)
            out[1, :] = _least(rest, jnp.where(won, runner_at * _LANES + lane, code), none)[:, 0]


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
    if total == 0 or features > _MOST_FEATURES:
        raise NotImplementedError(
            f"the kernel takes at least one token and at most {_MOST_FEATURES} features; "
            f"got {x.shape}."
        )
    _sharding.check_not_explicit(x, codebook)
    sizes = _sizes(total, num_codes, features, block_sizes)
    centre, bias = centre_and_bias(codebook)
    tiles, code_tiles = -(-total // sizes.tokens), -(-num_codes // sizes.codes)
    extra = code_tiles * sizes.codes - num_codes
    bias = jnp.pad(bias, (0, extra), constant_values=jnp.inf)[None]
    planes = 2 if second else 1
    scratch = (planes, sizes.tokens, _LANES)
    # The last tiles may reach beyond the arrays. Rows do not mix: what a token there gives is not
    # written, and the score of a code there is infinite or NaN, which is below nothing.
    out = pl.pallas_call(
        partial(_kernel, none=num_codes, second=second),
        grid=(tiles, code_tiles),
        in_specs=[
            pl.BlockSpec((sizes.tokens, features), lambda token, code: (token, 0)),
            pl.BlockSpec((1, features), lambda token, code: (0, 0)),
            pl.BlockSpec((sizes.codes, features), lambda token, code: (code, 0)),
            pl.BlockSpec((1, sizes.codes), lambda token, code: (0, code)),
        ],
        out_specs=pl.BlockSpec((planes, sizes.tokens), lambda token, code: (0, token)),
        out_shape=_sharding.result((planes, total), jnp.int32, x, codebook),
        scratch_shapes=[pltpu.VMEM(scratch, jnp.float32), pltpu.VMEM(scratch, jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="nearest_code",
    )(x, centre[None], codebook, bias)
    return out[0], out[1] if second else None
