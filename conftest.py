"""Examples in docstrings run as a user has JAX; tests/conftest.py is stricter for the tests."""

import jax
import pytest
from _pytest.doctest import DoctestItem


@pytest.fixture(autouse=True)
def _users_settings(request):
    if not isinstance(request.node, DoctestItem):
        yield
        return
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield
