"""Optimizers that plug into optax, and the contract that they all pass."""

from jaxkit.optim.contract import CONTRACT, check_optimizer

__all__ = [
    "CONTRACT",
    "check_optimizer",
]
