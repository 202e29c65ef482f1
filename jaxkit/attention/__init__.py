"""Attention: in linear time over vector-quantised keys, and as a recurrence with constant state."""

from jaxkit.attention import streaming, vq

__all__ = ["streaming", "vq"]
