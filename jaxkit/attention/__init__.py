"""Attention in linear time: over vector-quantised keys."""

from jaxkit.attention import vq

__all__ = ["vq"]
