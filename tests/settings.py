"""JAX as its users have it, where tests/conftest.py is stricter."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def users_settings() -> Iterator[None]:
    """32-bit types, and implicit promotion of dtypes and ranks."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
