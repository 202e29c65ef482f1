"""A clear error for reverse-mode differentiation through loops of unknown length."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# The identity, which forward mode passes through and reverse mode is told why it cannot.
_forward_only_p = Primitive("forward_only")
_forward_only_p.def_impl(lambda x, *, message: x)
_forward_only_p.def_abstract_eval(lambda x, *, message: x)
mlir.register_lowering(_forward_only_p, lambda ctx, x, *, message: [x])
batching.defvectorized(_forward_only_p)


def _refuse(cotangent: Any, x: Any, *, message: str) -> None:
    raise ValueError(message)


ad.deflinear2(_forward_only_p, _refuse)


def forward_only(tree: Any, message: str) -> Any:
    """`tree` itself; a `ValueError` with `message` where a gradient is to flow back through it."""
    return jax.tree.map(lambda x: _forward_only_p.bind(x, message=message), tree)
