"""Block sizes of the kernels: frozen dataclasses that check themselves, and how one is chosen."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

__all__ = [
    "BlockSizes",
    "CauchyGpuBlocks",
    "CauchyTpuBlocks",
    "CauchyXlaBlocks",
    "NearestCodeGpuBlocks",
    "NearestCodeTpuBlocks",
    "NearestCodeXlaBlocks",
    "VandermondeGpuBlocks",
    "VandermondeTpuBlocks",
    "VandermondeXlaBlocks",
    "VqAttentionGpuBlocks",
    "VqAttentionTpuBlocks",
    "VqAttentionXlaBlocks",
    "bucket",
    "choose",
    "device_kind",
]

B = TypeVar("B", bound="BlockSizes")


def _size(*, multiple_of: int = 1, power_of_two: bool = False, most: int = 1 << 24) -> Any:
    rule = {"multiple_of": multiple_of, "power_of_two": power_of_two, "most": most}
    return dataclasses.field(metadata=rule)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Base of all block sizes: every field is a positive int that obeys its rule."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata
            name = f"{type(self).__name__}.{field.name}"
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int; got {value!r}.")
            if not 1 <= value <= rule["most"]:
                raise ValueError(f"{name} must lie in [1, {rule['most']}]; got {value}.")
            if value % rule["multiple_of"]:
                raise ValueError(
                    f"{name} must be a multiple of {rule['multiple_of']}; got {value}."
                )
            if rule["power_of_two"] and value & (value - 1):
                raise ValueError(f"{name} must be a power of two; got {value}.")


@dataclasses.dataclass(frozen=True)
class CauchyXlaBlocks(BlockSizes):
    """Nodes handled at a time by the pure-JAX form."""

    chunk: int = _size(multiple_of=8)


@dataclasses.dataclass(frozen=True)
class CauchyTpuBlocks(BlockSizes):
    """Rows of 128 nodes in one program of the TPU kernels."""

    rows: int = _size(multiple_of=8, most=512)


@dataclasses.dataclass(frozen=True)
class CauchyGpuBlocks(BlockSizes):
    """Nodes in one program of the GPU kernels, forward and backward."""

    nodes: int = _size(multiple_of=128, power_of_two=True, most=4096)
    nodes_backward: int = _size(multiple_of=128, power_of_two=True, most=4096)


@dataclasses.dataclass(frozen=True)
class VandermondeXlaBlocks(BlockSizes):
    """Length T of one block of the two-level form."""

    block: int = _size(most=1 << 12)


@dataclasses.dataclass(frozen=True)
class VandermondeTpuBlocks(BlockSizes):
    """Blocks of 128 positions in one program of the TPU kernels."""

    rows: int = _size(multiple_of=8, most=1024)


@dataclasses.dataclass(frozen=True)
class VandermondeGpuBlocks(BlockSizes):
    """Blocks of 128 positions in one program of the GPU kernels."""

    rows: int = _size(power_of_two=True, most=32)


@dataclasses.dataclass(frozen=True)
class NearestCodeXlaBlocks(BlockSizes):
    """Tokens handled at a time by the pure-JAX form, and columns the codes are laid out in."""

    tokens: int = _size(most=1 << 16)
    codes: int = _size(most=1 << 16)


@dataclasses.dataclass(frozen=True)
class NearestCodeTpuBlocks(BlockSizes):
    """Tokens in one program of the TPU kernel, and codes it takes at a time."""

    tokens: int = _size(multiple_of=128, most=4096)
    codes: int = _size(multiple_of=128, most=4096)


@dataclasses.dataclass(frozen=True)
class NearestCodeGpuBlocks(BlockSizes):
    """Tokens in one program of the GPU kernel, and codes it takes at a time."""

    tokens: int = _size(multiple_of=128, power_of_two=True, most=1024)
    codes: int = _size(power_of_two=True, most=32)


@dataclasses.dataclass(frozen=True)
class VqAttentionXlaBlocks(BlockSizes):
    """Most blocks handled at a time by the pure-JAX form, or most queries of one block and head."""

    blocks: int = _size()
    queries: int = _size()


@dataclasses.dataclass(frozen=True)
class VqAttentionTpuBlocks(BlockSizes):
    """Queries, and keys or codes, in one tile of the TPU kernels."""

    queries: int = _size(multiple_of=128, most=1024)
    keys: int = _size(multiple_of=128, most=1024)


@dataclasses.dataclass(frozen=True)
class VqAttentionGpuBlocks(BlockSizes):
    """Columns in one tile of the GPU kernels, whose programs have 64 rows."""

    columns: int = _size(multiple_of=64, most=128)


def bucket(*sizes: int) -> tuple[int, ...]:
    """Each size rounded up to a power of two, so that near shapes share a table entry.

    Example:
        >>> bucket(3, 64, 1000)
        (4, 64, 1024)
    """
    return tuple(1 << max(size - 1, 0).bit_length() for size in sizes)


def device_kind(platform: str) -> str:
    """The kind of the first device of the platform, or "" where the host has none.

    Example:
        >>> device_kind("no such platform")
        ''
    """
    try:
        return jax.devices(platform)[0].device_kind
    except RuntimeError:
        return ""


def choose(
    given: BlockSizes | None,
    kind: type[B],
    table: Mapping[tuple[str, tuple[int, ...]], B],
    platform: str,
    shape: tuple[int, ...],
    heuristic: Callable[[], B],
) -> B:
    """The block sizes to use: those given, else the table's, else the heuristic's.

    Args:
        given: from the caller. Sizes meant for another implementation are passed over, so that
            they can accompany `implementation="auto"`.
        kind: the dataclass that the implementation takes.
        table: entries by device kind and bucketed shape.
        platform: whose first device is looked up.
        shape: static sizes, before bucketing.
        heuristic: what to use where the table has no entry.

    Returns:
        An instance of `kind`.

    Example:
        >>> sizes = CauchyXlaBlocks(chunk=64)
        >>> choose(None, CauchyXlaBlocks, {}, "cpu", (1,), lambda: sizes).chunk
        64
    """
    if isinstance(given, kind):
        return given
    entry = table.get((device_kind(platform), bucket(*shape))) if table else None
    return heuristic() if entry is None else entry
