"""A functional research toolkit for JAX."""

__version__ = "0.1.0.dev0"
