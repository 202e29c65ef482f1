"""What tests and docstring examples share; tests/conftest.py is stricter for the tests."""

import jax
import pytest
from _pytest.doctest import DoctestItem

from tests.settings import users_settings


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_do_not_pile_up():
    """A process that keeps every program of the suite grows by gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _users_settings(request):
    """Examples run as a user has JAX."""
    if not isinstance(request.node, DoctestItem):
        yield
        return
    with users_settings():
        yield
