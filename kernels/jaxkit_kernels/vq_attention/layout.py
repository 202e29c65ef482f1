"""How the Pallas kernels see the operands: rows of queries, columns of keys and codes.

The queries of a block, all heads of a group together, are the rows; its 2 L recent keys and the S
codes are the columns. Rows and columns are padded to whole tiles, the keys of each block by
themselves. Two arrays then say everything about masks and biases:

- `columns` [batch groups, blocks, 1, 2 L + S]: 0 or MASKED for keys, log N for codes;
- `cells` [groups or 1, 1, rows, 2 L], the causal mask and the table of biases, or with a bias
  for each query [batch groups, blocks, rows, 2 L].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit_kernels.vq_attention import skew
from jaxkit_kernels.vq_attention.reference import MASKED

__all__ = ["Layout", "pad_axis", "round_up"]


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is no less than `size`.

    Example:
        >>> round_up(130, 128)
        256
    """
    return -(-size // multiple) * multiple


def pad_axis(x: jax.Array, axis: int, size: int, value: float = 0.0) -> jax.Array:
    """Padding behind, up to `size`.

    Example:
        >>> import jax.numpy as jnp
        >>> pad_axis(jnp.ones((1, 2)), 1, 3).tolist()
        [[1.0, 1.0, 0.0]]
    """
    extra = [(0, 0)] * x.ndim
    extra[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, extra, constant_values=value)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one problem; all static.

    Attributes:
        batch: number of sequences.
        heads: of queries.
        groups: of keys.
        blocks: R.
        length: L.
        window: W.
        codes: S.
        tile_rows: rows of a tile.
        tile_columns: columns of a tile.
    """

    batch: int
    heads: int
    groups: int
    blocks: int
    length: int
    window: int
    codes: int
    tile_rows: int
    tile_columns: int

    @property
    def share(self) -> int:
        """Heads of one group."""
        return self.heads // self.groups

    @property
    def lead(self) -> int:
        """Batch and groups together."""
        return self.batch * self.groups

    @property
    def rows(self) -> int:
        """Padded rows of a block."""
        return round_up(self.share * self.length, self.tile_rows)

    @property
    def keys(self) -> int:
        """Padded keys of a block."""
        return round_up(self.length, self.tile_columns)

    @property
    def padded_codes(self) -> int:
        """Padded codes."""
        return round_up(self.codes, self.tile_columns)

    @property
    def row_tiles(self) -> int:
        """Tiles of the rows of a block."""
        return self.rows // self.tile_rows

    @property
    def key_tiles(self) -> int:
        """Tiles of the keys of one block."""
        return self.keys // self.tile_columns

    @property
    def code_tiles(self) -> int:
        """Tiles of the codes."""
        return self.padded_codes // self.tile_columns

    def by_row(self, x: jax.Array, value: float = 0.0) -> jax.Array:
        """[batch, heads, time, ...] -> [batch groups, blocks, rows, ...], padded by `value`."""
        tail = x.shape[3:]
        x = x.reshape(self.batch, self.groups, self.share, self.blocks, self.length, *tail)
        x = jnp.moveaxis(x, 3, 2)
        x = x.reshape(self.lead, self.blocks, self.share * self.length, *tail)
        return pad_axis(x, 2, self.rows, value)

    def from_rows(self, x: jax.Array) -> jax.Array:
        """The inverse of `by_row`."""
        tail = x.shape[3:]
        x = x[:, :, : self.share * self.length]
        x = x.reshape(self.batch, self.groups, self.blocks, self.share, self.length, *tail)
        x = jnp.moveaxis(x, 2, 3)
        return x.reshape(self.batch, self.heads, self.blocks * self.length, *tail)

    def by_key(self, x: jax.Array) -> jax.Array:
        """[batch, groups, time, d] -> [batch groups, blocks, keys, d]."""
        x = x.reshape(self.lead, self.blocks, self.length, x.shape[-1])
        return pad_axis(x, 2, self.keys)

    def from_keys(self, x: jax.Array) -> jax.Array:
        """The inverse of `by_key`."""
        x = x[:, :, : self.length]
        return x.reshape(self.batch, self.groups, self.blocks * self.length, x.shape[-1])

    def columns(self, log_counts: jax.Array, valid: jax.Array | None) -> jax.Array:
        """[batch groups, blocks, 1, 2 keys + codes]."""
        if valid is None:
            valid = jnp.ones((self.batch, self.blocks * self.length), bool)
        hidden = jnp.where(
            valid, jnp.zeros((), log_counts.dtype), jnp.full((), MASKED, log_counts.dtype)
        )
        own = pad_axis(hidden.reshape(self.batch, self.blocks, self.length), 2, self.keys, MASKED)
        before = jnp.concatenate([jnp.full_like(own[:, :1], MASKED), own[:, :-1]], axis=1)
        recent = jnp.concatenate([before, own], axis=-1)[:, None]
        recent = jnp.broadcast_to(recent, (self.batch, self.groups, self.blocks, 2 * self.keys))
        cache = pad_axis(log_counts, 3, self.padded_codes, MASKED)
        both = jnp.concatenate([recent, cache], axis=-1)
        return both.reshape(self.lead, self.blocks, 1, both.shape[-1])

    def cells(self, bias: jax.Array | None) -> jax.Array:
        """[groups or 1, 1, rows, 2 keys], or [batch groups, blocks, rows, 2 keys]."""
        length = self.length
        lag = length + np.arange(length)[:, None] - np.arange(2 * length)
        causal = jnp.asarray(np.where(lag >= 0, 0.0, MASKED), jnp.float32)
        if bias is None:
            cells = causal[None, None, None]
        elif bias.ndim == 2:
            table = jnp.broadcast_to(
                bias.astype(jnp.float32)[:, None], (self.heads, length, self.window + 1)
            )
            by_key = skew.to_keys(table, length)
            cells = (by_key + causal[None]).reshape(self.groups, 1, self.share, length, 2 * length)
        else:
            by_query = bias.astype(jnp.float32).reshape(
                self.batch, self.groups, self.share, self.blocks, length, self.window + 1
            )
            by_key = skew.to_keys(jnp.moveaxis(by_query, 3, 2), length)
            cells = (by_key + causal[None, None, None, None]).reshape(
                self.lead, self.blocks, self.share, length, 2 * length
            )
        cells = jnp.broadcast_to(cells, (*cells.shape[:2], self.share, length, 2 * length))
        cells = cells.reshape(*cells.shape[:2], self.share * length, 2, length)
        cells = pad_axis(pad_axis(cells, 2, self.rows), 4, self.keys, MASKED)
        return cells.reshape(*cells.shape[:2], self.rows, 2 * self.keys)

    def from_cells(self, x: jax.Array) -> jax.Array:
        """Cotangents of cells [a, b, rows, 2 keys] by lag: [a, b, share, L, W + 1]."""
        x = x[:, :, : self.share * self.length]
        x = x.reshape(*x.shape[:2], self.share, self.length, 2, self.keys)[..., : self.length]
        x = x.reshape(*x.shape[:2], self.share, self.length, 2 * self.length)
        return skew.to_lags(x, self.window)

    def cotangent_of_bias(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """Cotangents of cells, in the shape of the bias."""
        by_lag = self.from_cells(x)
        if bias.ndim == 2:
            return jnp.sum(by_lag.reshape(bias.shape[0], self.length, -1), axis=1)
        by_lag = by_lag.reshape(
            self.batch, self.groups, self.blocks, self.share, self.length, self.window + 1
        )
        return jnp.moveaxis(by_lag, 2, 3).reshape(bias.shape)
