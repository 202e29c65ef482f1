"""The public transformer-vq code's layer, run from a checkout that the user has.

`git clone https://github.com/transformer-vq/transformer_vq` (branch `main`: block recurrence) and
give its path. Nothing of it is copied here: its modules are imported where they lie, with one
repair, since `jnp.clip(x, a_min=...)` no longer exists in JAX.

Source: Lingle 2023 (arXiv 2309.16354).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["PublicLayer", "Unavailable"]

_MODULES = ("grad", "types", "norm", "pe", "vq", "attn")


class Unavailable(RuntimeError):
    """The public code cannot be run here; the message says why."""


class _Numpy:
    """`jax.numpy` whose `clip` also takes the names that it had until JAX 0.4.27."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(x: Any, a_min: Any = None, a_max: Any = None) -> Any:
        return jnp.clip(x, a_min, a_max)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`folder` first on the path, and no `transformer_vq` from elsewhere, before or after."""
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_theirs(name)}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in list(sys.modules):
            if _is_theirs(name):
                del sys.modules[name]
        sys.modules.update(held)


@contextmanager
def _defaults() -> Iterator[None]:
    """Their code mixes ranks and dtypes, as JAX lets it by default."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def _is_theirs(name: str) -> bool:
    return name.partition(".")[0] == "transformer_vq"


def _load(checkout: Path) -> SimpleNamespace:
    folder = checkout.expanduser() / "src"
    if not (folder / "transformer_vq" / "nn" / "attn.py").exists():
        raise Unavailable(
            f"no src/transformer_vq/nn/attn.py in {checkout}: it must be a checkout of branch main"
        )
    with _importable(folder):
        try:
            modules = {
                name: importlib.import_module(f"transformer_vq.nn.{name}") for name in _MODULES
            }
        except Exception as error:  # whatever an old package does on a new JAX
            raise Unavailable(f"it does not import: {type(error).__name__}: {error}") from error
    for module in modules.values():
        if hasattr(module, "jnp"):
            module.jnp = _Numpy()  # type: ignore[attr-defined]
    return SimpleNamespace(**modules)


class PublicLayer:
    """Their attention layer with one head: x to x + residual, block after block.

    Args:
      checkout: path of the clone.
      model_dim: width of x.
      key_dim: dk.
      value_dim: dv.
      block_length: L, also the length of their window.
      num_codes: S.

    Raises:
      Unavailable: there is no such code at `checkout`, or it does not import with this JAX.
    """

    def __init__(
        self,
        checkout: Path,
        *,
        model_dim: int,
        key_dim: int,
        value_dim: int,
        block_length: int,
        num_codes: int,
    ):
        self._code = _load(checkout)
        self.block_length = block_length
        self.config = self._code.types.TransformerConfig.create(
            param_dtype=jnp.float32,
            dtype=jnp.float32,
            global_batch_size=None,
            sequence_len=None,
            update_len=None,
            block_len=block_length,
            mem_len=block_length,
            grad_thru_cache=True,
            agg_cache=True,
            d_model=model_dim,
            d_k=key_dim,
            d_v=value_dim,
            d_ff=0,
            n_head=1,
            n_code=num_codes,
            n_layer=1,
            n_vocab=1,
            pe_abs=False,
            pe_lam=1e5,
            p_dropemb=0.0,
            p_dropsin=0.0,
            p_dropres=0.0,
            p_droplyr=0.0,
            p_nucleus=1.0,
            c_beta=1e-4,
            c_gamma=0.99,
            e_tie=True,
            e_preln=True,
            e_scale="default",
            is_train=False,
        )
        self._layer = self._code.attn.VQAttention(self.config)

    def _inputs(self, block: jax.Array) -> dict[str, Any]:
        batch = block.shape[0]
        ones = jnp.ones((batch, self.block_length), jnp.int32)
        spec = self._code.vq.VQSpec.create(
            n_device=jnp.ones(1, jnp.int32),
            n_block_per_update=jnp.ones(1, jnp.int32),
            loss_mask=ones,
        )
        return {"input_features": block, "doc_ids": ones, "vq_spec": spec}

    def init(self, key: jax.Array) -> Mapping[str, Any]:
        """Their parameters, in their layout, for a batch of any size."""
        block = jnp.zeros((1, self.block_length, self.config.d_model), jnp.float32)
        with _defaults():
            state = self._layer.initial_state(self.config, 1)
            return self._layer.init(key, state=state, input_dict=self._inputs(block))["params"]

    def __call__(self, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """`[batch, T, model_dim]` to the same shape; T is a multiple of the block length."""
        batch, length, width = x.shape
        blocks = jnp.moveaxis(x.reshape(batch, -1, self.block_length, width), 1, 0)

        def body(state: Any, block: jax.Array) -> Any:
            state, out = self._layer.apply(
                {"params": params}, state=state, input_dict=self._inputs(block)
            )
            return state, block + out["res"]

        with _defaults():
            _, out = jax.lax.scan(body, self._layer.initial_state(self.config, batch), blocks)
        return jnp.moveaxis(out, 0, 1).reshape(batch, length, width)
