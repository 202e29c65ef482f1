"""What the Pallas kernels must know of sharded operands."""

from typing import Any

import jax

__all__ = ["check_not_explicit", "result", "together", "vary"]


def check_not_explicit(*operands: jax.Array) -> None:
    """Refuse operands whose sharding over several devices is part of their type.

    A kernel runs on one device. Call it inside `jax.shard_map` to run it on the part of each.

    Args:
        *operands: of the kernel.

    Raises:
        NotImplementedError: with the sharding found.

    Example:
        >>> import jax.numpy as jnp
        >>> check_not_explicit(jnp.ones(3))
    """
    for operand in operands:
        sharding = jax.typeof(operand).sharding
        if any(sharding.spec):
            raise NotImplementedError(
                f"a kernel takes no explicitly sharded array (got {sharding.spec}); "
                "call it inside jax.shard_map."
            )


def _varying(operands: tuple[jax.Array, ...]) -> frozenset[str]:
    kinds = [jax.typeof(operand).manual_axis_type for operand in operands]
    return frozenset().union(*(kind.varying for kind in kinds))


def result(shape: tuple[int, ...], dtype: Any, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which inside `jax.shard_map` varies as its operands do.

    Args:
        shape: of the result.
        dtype: of the result.
        *operands: of the kernel.

    Returns:
        The type, for `out_shape`.

    Example:
        >>> import jax.numpy as jnp
        >>> result((2,), jnp.float32, jnp.ones(3)).shape
        (2,)
    """
    kind = jax.typeof(operands[0]).manual_axis_type.update(varying=_varying(operands))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def vary(value: jax.Array, *operands: jax.Array) -> jax.Array:
    """The value, with a type that inside `jax.shard_map` varies as the operands do.

    `plgpu.kernel` drops this from the types of its results.

    Args:
        value: any array.
        *operands: what it was computed from.

    Returns:
        The value.

    Example:
        >>> import jax.numpy as jnp
        >>> vary(jnp.ones(2), jnp.ones(3)).shape
        (2,)
    """
    missing = tuple(sorted(_varying(operands) - _varying((value,))))
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def together(*operands: jax.Array | None) -> tuple[Any, ...]:
    """The operands, with types that inside `jax.shard_map` vary along the same mesh axes.

    To be called outside of a `custom_vjp`, whose backward pass then gives cotangents of these
    types; that of an operand which was the same on all devices is added up over them by JAX.

    Args:
        *operands: arrays, or None.

    Returns:
        As many.

    Example:
        >>> import jax.numpy as jnp
        >>> together(jnp.ones(2), None)[1] is None
        True
    """
    arrays = [operand for operand in operands if operand is not None]
    return tuple(None if operand is None else vary(operand, *arrays) for operand in operands)
