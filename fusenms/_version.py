"""The version of the package. It is written to every fused file and engine."""

__version__ = "0.2.0.dev0"
