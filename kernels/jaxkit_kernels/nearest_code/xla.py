"""The pure-JAX form: some tokens at a time against the whole codebook.

A reduction with an index is slow on CPU. So the codes are laid out in blocks of columns, and a
running (least score, block) is kept for each column: compares and selects that the compiler
vectorises and fuses. Only the columns are reduced, once for every token.
"""

import jax
import jax.numpy as jnp

from jaxkit_kernels import _blocks
from jaxkit_kernels.nearest_code.scores import centre_and_bias, least

__all__ = ["forward"]

_TABLE: dict[tuple[str, tuple[int, ...]], _blocks.NearestCodeXlaBlocks] = {}


def _sizes(
    tokens: int, codes: int, features: int, given: _blocks.BlockSizes | None
) -> _blocks.NearestCodeXlaBlocks:
    def heuristic() -> _blocks.NearestCodeXlaBlocks:
        # On CPU the scores of a step stay in the cache. A step is a small part of all tokens, so
        # that its scores are a small part of the whole matrix.
        most = 128 if jax.default_backend() == "cpu" else 2048
        rows = 1 << max(tokens // 64, 8).bit_length() - 1
        # At most some sixteen blocks, since they are unrolled.
        columns = max(-(-codes // 16 // 128) * 128, 256)
        return _blocks.NearestCodeXlaBlocks(tokens=min(rows, most), codes=min(columns, 1 << 16))

    return _blocks.choose(
        given,
        _blocks.NearestCodeXlaBlocks,
        _TABLE,
        "cpu",
        (tokens, codes, features),
        heuristic,
    )


def _search(score: jax.Array, num_codes: int, columns: int, second: bool):
    """(first, second or None) for scores [tokens, blocks * columns]."""
    count = score.shape[1] // columns
    best = score[:, :columns]
    block = jnp.zeros_like(best, jnp.int32)
    runner, runner_block = jnp.full_like(best, jnp.inf), block
    for j in range(1, count):
        new = score[:, j * columns : (j + 1) * columns]
        closer = new < best  # strict, so that the lowest index stays
        if second:
            closer_second = new < runner
            runner_block = jnp.where(closer, block, jnp.where(closer_second, j, runner_block))
            runner = jnp.where(closer, best, jnp.where(closer_second, new, runner))
        block = jnp.where(closer, j, block)
        best = jnp.where(closer, new, best)
    column = jnp.arange(columns, dtype=jnp.int32)[None]
    code = block * columns + column
    first = least(best, code, num_codes)
    if not second:
        return first, None
    won = code == first[:, None]
    rest = jnp.where(won, runner, best)
    return first, least(rest, jnp.where(won, runner_block * columns + column, code), num_codes)


def forward(
    x: jax.Array,
    codebook: jax.Array,
    *,
    second: bool,
    block_sizes: _blocks.BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """As `reference.forward`, with O(tokens of a block times K) memory."""
    (total, features), num_codes = x.shape, codebook.shape[0]
    sizes = _sizes(total, num_codes, features, block_sizes)
    blocks = -(-num_codes // sizes.codes)
    columns = -(-num_codes // (8 * blocks)) * 8  # evenly, so that little is padded
    centre, bias = centre_and_bias(codebook)
    extra = blocks * columns - num_codes
    weights = jnp.pad(centre[None] - codebook, ((0, extra), (0, 0))).T
    bias = jnp.pad(bias, (0, extra), constant_values=jnp.inf)[None]

    rows = min(sizes.tokens, max(total, 1))
    steps = max(-(-total // rows), 1)
    # A step takes every `steps`-th token: where tokens are sharded, every device works in every
    # step on its own.
    padded = jnp.pad(x, ((0, rows * steps - total), (0, 0))).reshape(rows, steps, features)

    def step(j: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        part = jax.lax.dynamic_index_in_dim(padded, j, axis=1, keepdims=False)
        score = bias + jnp.dot(part - centre[None], weights, precision="highest")
        return _search(score, num_codes, columns, second)

    out = jax.lax.map(step, jnp.arange(steps, dtype=jnp.int32))
    return jax.tree.map(lambda index: index.T.reshape(-1)[:total], out)
