"""Checkpoints of a training run: whole or absent, verified byte for byte, the last few kept.

Orbax writes the arrays and renames the folder when it is complete. A manifest with the size and
SHA-256 of every file is added last, so that whatever happened to a checkpoint in the meantime (a
kill while writing, a truncated or altered file) is seen before it is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxkit_experiments.runfolder import RunError, RunWarning, disk_errors, write_json

__all__ = ["Checkpoints", "Restored"]

_MANIFEST = "manifest.json"


class Restored(NamedTuple):
    """A checkpoint that was read back."""

    step: int
    tree: Any
    records: list[dict[str, Any]]


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path; typed random keys as the integers they hold."""
    return {
        jax.tree_util.keystr(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _shapes(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _digests(folder: Path) -> dict[str, list[Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): [
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        ]
        for path in files
        if path.name != _MANIFEST
    }


class Checkpoints:
    """The checkpoints in one folder.

    Several processes that train together all call `save` and `restore`; the folder is one that
    they share.

    Args:
      folder: where they are.
      keep: how many to keep.

    Example:
      >>> import tempfile
      >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()))
      >>> tree = {"w": jax.numpy.arange(3.0)}
      >>> checkpoints.save(10, tree, []).name
      'step_00000010'
      >>> checkpoints.restore(tree).step
      10
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.keep = keep

    def save(
        self,
        step: int,
        tree: Any,
        records: list[dict[str, Any]],
        *,
        name: str | None = None,
    ) -> Path:
        """Write `tree` and the metric records so far; then drop all but the newest checkpoints.

        Args:
          step: steps that led to `tree`.
          tree: pytree of arrays.
          records: metric history, given back by `restore`.
          name: of the folder; with one, the checkpoint is kept for inspection and not resumed.

        Returns:
          The checkpoint's folder.

        Raises:
          DiskFull: naming the checkpoint. Older checkpoints are left as they were.
        """
        path = self.folder / (name or f"step_{step:08d}")
        leaves = _named(tree)
        main = jax.process_index() == 0
        with disk_errors(f"checkpoint {path}"):
            try:
                if main:
                    self.folder.mkdir(parents=True, exist_ok=True)
                _barrier("checkpoint folder")
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(path, leaves, force=True)
                    checkpointer.wait_until_finished()
                if main:
                    manifest = {
                        "step": step,
                        "leaves": _shapes(leaves),
                        "records": records,
                        "files": _digests(path),
                    }
                    write_json(path / _MANIFEST, manifest)
            except BaseException:
                if main:
                    shutil.rmtree(path, ignore_errors=True)
                raise
        if main and name is None:
            for old in self._steps()[: -self.keep]:
                shutil.rmtree(old)
            for partial in self.folder.glob("step_*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
        _barrier("checkpoint saved")
        return path

    def restore(self, template: Any) -> Restored | None:
        """The newest good checkpoint, or None.

        Bad ones are reported by name with a `RunWarning` and passed over.

        Args:
          template: pytree of arrays with the shapes, dtypes and shardings wanted.

        Raises:
          RunError: a checkpoint is whole but holds another model's state.
        """
        wanted = _named(template)
        paths, skip = self._steps(), 0
        # One process looks at the files, so that all agree on what is good.
        if jax.process_index() == 0:
            for path in reversed(paths):
                if not (fault := self._fault(path)):
                    break
                skip += 1
                _warn_bad(path, fault)
        if jax.process_count() > 1:
            skip = int(multihost_utils.broadcast_one_to_all(np.int32(skip)))
        for path in reversed(paths[: len(paths) - skip]):
            manifest = json.loads((path / _MANIFEST).read_text())
            if manifest["leaves"] != _shapes(wanted):
                raise RunError(
                    f"checkpoint {path} holds the state of another model or optimizer "
                    f"({_difference(manifest['leaves'], _shapes(wanted))}); use --fresh."
                )
            abstract = {
                key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for key, leaf in wanted.items()
            }
            with ocp.StandardCheckpointer() as checkpointer:
                leaves = checkpointer.restore(path, abstract)
            flat, structure = jax.tree.flatten(template)
            values = [
                jax.random.wrap_key_data(value, impl=jax.random.key_impl(old))
                if _is_key(old)
                else value
                for old, value in zip(flat, (leaves[key] for key in wanted), strict=True)
            ]
            return Restored(
                manifest["step"], jax.tree.unflatten(structure, values), manifest["records"]
            )
        return None

    def _steps(self) -> list[Path]:
        found = self.folder.glob("step_*")
        return sorted(path for path in found if path.is_dir() and path.name[5:].isdigit())

    @staticmethod
    def _fault(path: Path) -> str:
        """What is wrong with a checkpoint; empty if nothing is."""
        try:
            manifest = json.loads((path / _MANIFEST).read_text())
            files = dict(manifest["files"])
            manifest["step"], manifest["leaves"], manifest["records"]
        except FileNotFoundError:
            return "it was not finished"
        except (ValueError, KeyError, TypeError):
            return f"{_MANIFEST} is corrupt"
        for name, (size, digest) in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                return f"{name} is corrupt"
        return ""


def _difference(stored: dict[str, str], wanted: dict[str, str]) -> str:
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            return f"{name} is {stored.get(name, 'absent')} there, {wanted.get(name, 'absent')} now"
    return "in another order"


def _warn_bad(path: Path, fault: str) -> None:
    warnings.warn(f"checkpoint {path} is not used: {fault}.", RunWarning, stacklevel=4)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
