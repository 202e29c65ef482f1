"""The contract: what obeys it passes, and each rule catches an optimizer that breaks it."""

import optax
import pytest

from jaxkit.optim import check_optimizer


@pytest.mark.parametrize("name", ["sgd", "lion"])
def test_optax_passes(name):
    check_optimizer(getattr(optax, name))


def test_adam_passes_but_for_strict_promotion():
    with pytest.raises(AssertionError, match=r"breaks 1 of 1 rules of the contract\n  strict_prom"):
        check_optimizer(optax.adam, checks=["strict_promotion"])
    check_optimizer(optax.adam, skip=["strict_promotion"])
