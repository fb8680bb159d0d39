"""A raw model to another: with a dynamic batch, in half precision."""
