"""Transformations of a raw model into another one: dynamic batch, half precision."""
