"""The only code that chooses between implementations of an operation."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "check_implementation",
    "compute_dtype",
    "dispatch",
    "lazy",
]

Implementation: TypeAlias = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

# What `auto` tries on each platform, best first. Everything else (ROCm among it) takes `default`.
_PREFERENCE: Mapping[str, Sequence[str]] = {
    "tpu": ("pallas_tpu", "xla", "reference"),
    "cuda": ("pallas_gpu", "xla", "reference"),
    "default": ("xla", "reference"),
}


def check_implementation(implementation: str) -> None:
    """Refuse a name that is none of `IMPLEMENTATIONS`.

    Args:
        implementation: the name to check.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> check_implementation("xla")
    """
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise ValueError(f"implementation must be one of {names}; got {implementation!r}.")


def compute_dtype(dtype: Any) -> Any:
    """float64 for float64; float32 for it and everything shorter.

    Example:
        >>> import jax.numpy as jnp
        >>> compute_dtype(jnp.bfloat16).name
        'float32'
    """
    wide = jnp.dtype(dtype) == jnp.dtype("float64")
    return jnp.dtype("float64") if wide else jnp.dtype("float32")


def lazy(module: str, function: str, **options: Any) -> Callable[..., Any]:
    """A function of a module that is imported at the first call only.

    Not every installation of JAX carries the parts that the Pallas backends import; where they
    are missing, the implementation is refused like any other that does not apply.

    Example:
        >>> lazy("operator", "add")(1, 2)
        3
    """

    def call(*operands: Any) -> Any:
        try:
            loaded = importlib.import_module(module)
        except ImportError as error:
            raise NotImplementedError(f"{module} cannot be imported here: {error}") from error
        return getattr(loaded, function)(*operands, **options)

    return call


def _first_supported(
    op: str, names: Sequence[str], table: Mapping[str, Callable[..., Any]], operands: Any
) -> Any:
    reasons = []
    for name in names:
        if name not in table:
            continue
        try:
            return table[name](*operands)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(f"{op}: no implementation takes these arguments ({reasons}).")


def dispatch(
    op: str, implementation: str, table: Mapping[str, Callable[..., Any]], *operands: Any
) -> Any:
    """Call the implementation with this name, or the best one for the platform.

    An implementation says at trace time that it does not take certain static shapes or dtypes by
    raising `NotImplementedError`. Under `"auto"` the next one in the platform's order is then
    tried; any other exception passes through, and a name given explicitly never falls back. The
    platform is the one that the program is lowered for (`jax.lax.platform_dependent`), so a
    function traced on a CPU host and compiled for a TPU gets the TPU kernel.

    Args:
        op: name of the operation, for messages.
        implementation: one of `IMPLEMENTATIONS`.
        table: implementations by name, all with the same signature and result types.
        *operands: arrays, passed to the implementation.

    Returns:
        What the implementation returns.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: with the reason, if the named implementation does not take these
            arguments or does not exist for this operation.

    Example:
        >>> dispatch("double", "auto", {"xla": lambda x: 2 * x}, 3)
        6
    """
    check_implementation(implementation)
    if implementation != "auto":
        if implementation not in table:
            raise NotImplementedError(
                f"{op} has no implementation {implementation!r}; it has {', '.join(table)}."
            )
        return table[implementation](*operands)

    plans = {
        platform: tuple(name for name in names if name in table)
        for platform, names in _PREFERENCE.items()
    }
    if len(set(plans.values())) == 1:
        return _first_supported(op, plans["default"], table, operands)

    def branch(names: Sequence[str], *args: Any) -> Any:
        return _first_supported(op, names, table, args)

    default = plans.pop("default")
    return jax.lax.platform_dependent(
        *operands,
        default=partial(branch, default),
        **{platform: partial(branch, names) for platform, names in plans.items()},
    )
