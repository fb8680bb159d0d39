"""Transformations of a model into another one: dynamic batch and half precision of a raw one, frames as the input of a fused one."""
