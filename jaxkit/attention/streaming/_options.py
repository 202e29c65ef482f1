"""Arguments that all forms of attention share: shapes, masks, positions, and their checks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit._checks import check_floating, check_int, check_real, is_traced
from jaxkit._typing import Array

# An axis of a bias or mask is that of the problem, or 1.
Extra = Array | None


class Sizes(NamedTuple):
    """Axes of q [*batch, T, H, dk], k [*batch, S, G, dk], v [*batch, S, G, dv]."""

    batch: tuple[int, ...]
    queries: int
    keys: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int

    @property
    def rows(self) -> int:
        """Size of all batch axes flattened into one."""
        size = 1
        for axis in self.batch:
            size *= axis
        return size

    @property
    def per_group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.groups


def check_qkv(q: Any, k: Any, v: Any) -> Sizes:
    """The sizes of q, k, v, or an error that names the argument at fault."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x)
        if x.ndim < 3 or 0 in x.shape:
            raise ValueError(
                f"{name} must be [*batch, length, heads, dim] without empty axes; "
                f"got shape {tuple(x.shape)}."
            )
    batch = q.shape[:-3]
    for name, x in (("k", k), ("v", v)):
        if x.shape[:-3] != batch:
            raise ValueError(
                f"{name} must have the batch axes of q, {batch}; got shape {tuple(x.shape)}."
            )
    if v.shape[-3] != k.shape[-3]:
        raise ValueError(
            f"v must have a value for each of the {k.shape[-3]} keys; got shape {tuple(v.shape)}."
        )
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v must have the {k.shape[-2]} heads of k; got shape {tuple(v.shape)}.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"k must have the size of q on its last axis, {q.shape[-1]}; "
            f"got shape {tuple(k.shape)}."
        )
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"q must have a multiple of the {k.shape[-2]} heads of k; got {q.shape[-2]} heads."
        )
    return Sizes(
        batch, q.shape[-3], k.shape[-3], q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    )


def work_dtype(*arrays: Any) -> Any:
    """float64 if anything is, else float32."""
    wide = any(x is not None and x.dtype == jnp.float64 for x in arrays)
    return jnp.float64 if wide else jnp.float32


def check_scale(scale: Any, key_dim: int) -> Any:
    """The scale, by default 1/√dk."""
    if scale is None:
        return key_dim**-0.5
    if jnp.ndim(scale) != 0:
        raise ValueError(f"scale must be one number; got shape {jnp.shape(scale)}.")
    return check_real("scale", scale)


def check_window(window: Any, causal: bool) -> int | None:
    """The window, which only a causal mask can have."""
    if window is None:
        return None
    window = check_int("window", window, least=1)
    if not causal:
        raise ValueError(
            f"window must come with causal=True: it is the last keys a query reads; got {window}."
        )
    return window


def check_soft_cap(soft_cap: Any) -> float | None:
    """The cap, a positive number."""
    if is_traced(soft_cap):
        raise TypeError(f"soft_cap must be a number, not traced; got {soft_cap}.")
    return None if soft_cap is None else float(check_real("soft_cap", soft_cap, above=0.0))


def per_row(name: str, value: Any, sizes: Sizes) -> Array:
    """An integer, or one for each example, as int32 [rows or 1]."""
    if not hasattr(value, "ndim"):
        value = check_int(name, value)
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be of integers; got dtype {value.dtype}.")
    if value.ndim and value.shape != sizes.batch:
        raise ValueError(
            f"{name} must be one integer or have shape {sizes.batch}; got {tuple(value.shape)}."
        )
    return value.astype(jnp.int32).reshape(-1)


def check_offset(offset: Any, causal: bool, sizes: Sizes) -> Array | None:
    """Position of the first query among the keys: int32 [rows or 1], or None if not causal."""
    if not causal:
        if offset is not None:
            raise ValueError(f"offset must come with causal=True; got {offset!r}.")
        return None
    if offset is None:
        if sizes.keys < sizes.queries:
            raise ValueError(
                "offset must be given for a causal mask with fewer keys than queries; "
                f"got {sizes.keys} keys and {sizes.queries} queries."
            )
        offset = sizes.keys - sizes.queries
    return per_row("offset", offset, sizes)


def check_kv_length(kv_length: Any, sizes: Sizes) -> Array | None:
    """How many keys are real: int32 [rows or 1], or None for all."""
    if kv_length is None:
        return None
    if not hasattr(kv_length, "ndim"):
        check_int("kv_length", kv_length)
    lengths = per_row("kv_length", kv_length, sizes)
    # Of what lies on a device the shape alone is known.
    if not isinstance(kv_length, jax.Array) and (
        np.min(kv_length) < 0 or np.max(kv_length) > sizes.keys
    ):
        raise ValueError(
            f"kv_length must be from 0 to the number of keys, {sizes.keys}; got {kv_length}."
        )
    return lengths


def check_segments(
    segment_ids: Any, kv_segment_ids: Any, sizes: Sizes
) -> tuple[Array, Array] | None:
    """Segments of queries [rows or 1, T] and keys [rows or 1, S], or None."""
    if segment_ids is None:
        if kv_segment_ids is not None:
            raise ValueError("kv_segment_ids must come with segment_ids; got no segment_ids.")
        return None
    if kv_segment_ids is None:
        if sizes.keys != sizes.queries:
            raise ValueError(
                f"kv_segment_ids must be given where the {sizes.keys} keys are not the "
                f"{sizes.queries} queries; got None."
            )
        kv_segment_ids = segment_ids
    out = []
    for name, ids, length in (
        ("segment_ids", segment_ids, sizes.queries),
        ("kv_segment_ids", kv_segment_ids, sizes.keys),
    ):
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"{name} must be of integers; got dtype {ids.dtype}.")
        if ids.shape not in ((length,), (*sizes.batch, length)):
            raise ValueError(
                f"{name} must have shape {(*sizes.batch, length)} or {(length,)}; "
                f"got {tuple(ids.shape)}."
            )
        out.append(ids.reshape(-1, length))
    return out[0], out[1]


def pairwise(name: str, value: Any, sizes: Sizes, *, boolean: bool) -> Array | None:
    """A bias or mask that broadcasts to [*batch, H, T, S], as [b, g, r, T, S] with axes of 1."""
    if value is None:
        return None
    value = jnp.asarray(value)
    if boolean and value.dtype != jnp.bool_:
        raise TypeError(f"{name} must be boolean, true where visible; got dtype {value.dtype}.")
    if not boolean:
        check_floating(name, value)
    full = (*sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    if value.ndim > len(full):
        raise ValueError(f"{name} must broadcast to {full}; got shape {tuple(value.shape)}.")
    value = jnp.expand_dims(value, range(len(full) - value.ndim))
    if any(got not in (1, want) for got, want in zip(value.shape, full, strict=True)):
        raise ValueError(f"{name} must broadcast to {full}; got shape {tuple(value.shape)}.")
    lead, heads = value.shape[:-3], value.shape[-3]
    if any(axis != 1 for axis in lead):
        value = jnp.broadcast_to(value, (*sizes.batch, *value.shape[-3:]))
        rows = sizes.rows
    else:
        rows = 1
    groups = (sizes.groups, sizes.per_group) if heads != 1 else (1, 1)
    return value.reshape(rows, *groups, *value.shape[-2:])


def check_sinks(sinks: Any, sizes: Sizes) -> Array | None:
    """Extra logits, one for each head."""
    if sinks is None:
        return None
    check_floating("sinks", sinks)
    if sinks.shape != (sizes.heads,):
        raise ValueError(
            f"sinks must have one logit for each head, ({sizes.heads},); got {tuple(sinks.shape)}."
        )
    return sinks


def cap(scores: Array, soft_cap: float | None) -> Array:
    """`c tanh(s / c)`: scores that cannot leave (−c, c)."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _varying(x: Any) -> frozenset[str]:
    """Mesh axes of a surrounding `shard_map` over which an array may differ."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def spread_over_devices(*values: Any) -> tuple[Any, ...]:
    """Inside `shard_map`, the same arrays typed as varying over all axes that any varies over.

    Loop carries and cotangents then have one type; the transpose sums what was replicated.
    """
    axes = frozenset[str]().union(*(_varying(leaf) for leaf in jax.tree.leaves(values)))
    if not axes:
        return values

    def spread(leaf: Array) -> Array:
        missing = tuple(sorted(axes - _varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(spread, values)
