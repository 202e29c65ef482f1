"""A run's folder: JSON files that are whole or absent, metrics as JSON lines, and one owner.

    config.json        experiment, preset, config
    environment.json   versions, devices, commit
    metrics.jsonl      one record a line: arm, stage, step, split, then the metrics
    arms/ARM/          result.json when the arm is done; checkpoints of the trainer
    arrays/  plots/    data that plots need; figures
    summary.json       table, claims, plots: what `jaxkit report` reads

Every file but metrics.jsonl is written beside its place and then renamed, so that a run killed at
any moment leaves the old file or the new one. A record of metrics.jsonl is one `write`; a line cut
short by a kill is reported, and dropped when the run resumes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "DiskFull",
    "MetricLog",
    "RunError",
    "RunLocked",
    "RunWarning",
    "disk_errors",
    "lock",
    "read_json",
    "write_json",
]


class RunError(Exception):
    """Something about a run that its user can act on; the command line prints it as one line."""


class RunLocked(RunError):
    """Another process is writing to the run folder."""


class DiskFull(RunError):
    """The disk of the run folder has no room left."""


class RunWarning(UserWarning):
    """A fault that was worked around, such as a corrupt checkpoint that was passed over."""


def plain(value: Any) -> Any:
    """`value` as strict JSON takes it: arrays as lists, non-finite numbers as strings.

    `float` reads the strings back.

    Example:
      >>> plain({"loss": np.array([1.0, np.nan])})
      {'loss': [1.0, 'NaN']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if hasattr(value, "tolist"):
        return plain(np.asarray(value).tolist())
    return str(value)


@contextmanager
def disk_errors(what: str | Path) -> Iterator[None]:
    """Turn "no space left on device", whoever reports it, into `DiskFull` naming `what`."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        full = (
            isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        ) or os.strerror(errno.ENOSPC) in str(error)
        if not full:
            raise
        raise DiskFull(
            f"{what}: no space left on the disk; free some and run the same command to resume."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, all or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w") as file:
                json.dump(plain(value), file, indent=1, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
      RunError: the file is no JSON; the message names it.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); delete it or use --fresh.") from None


class MetricLog:
    """metrics.jsonl: append records, read them back, drop those of an arm.

    Example:
      >>> import tempfile
      >>> log = MetricLog(Path(tempfile.mkdtemp()) / "metrics.jsonl")
      >>> log.append({"arm": "a", "step": 1, "loss": 0.5})
      >>> log.drop(arm="a")
      >>> log.read()
      []
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record as one line, in one write."""
        line = json.dumps(plain(record), allow_nan=False) + "\n"
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(line.encode())

    def read(self) -> list[dict[str, Any]]:
        """All records. A line that is no JSON object is dropped with a warning naming it."""
        if not self.path.exists():
            return []
        records = []
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError
            except ValueError:
                warnings.warn(
                    f"{self.path}, line {number}: not a whole record; dropped.",
                    RunWarning,
                    stacklevel=2,
                )
                continue
            records.append(record)
        return records

    def drop(self, then: Sequence[Mapping[str, Any]] = (), **fields: Any) -> None:
        """Take out the records whose fields have these values, and append the records `then`."""
        if not self.path.exists() and not then:
            return
        kept = [
            record
            for record in self.read()
            if any(record.get(key) != value for key, value in fields.items())
        ]
        lines = [json.dumps(plain(record), allow_nan=False) + "\n" for record in [*kept, *then]]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text("".join(lines))
                os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Own a run folder. The kernel gives the lock back when its holder dies, however it dies.

    Raises:
      RunLocked: another process owns the folder.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RunLocked(
                f"{folder} is in use by {owner}; wait for it, or choose another --out."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def contents(folder: Path) -> list[Path]:
    """What is in a folder, but for the lock and what a killed write left behind."""
    return [item for item in folder.iterdir() if not item.name.startswith(".")]


def clear(folder: Path) -> None:
    """Empty a run folder but for its lock.

    Raises:
      RunError: the folder holds files but no config.json, so it is not a run's.
    """
    if not (folder / "config.json").exists():
        if contents(folder):
            raise RunError(f"{folder} is not a run folder (no config.json), so it is not emptied.")
        return
    # config.json last: a folder that was being emptied when killed is still a run folder.
    for item in sorted(folder.iterdir(), key=lambda item: item.name == "config.json"):
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != ".lock":
            item.unlink()
