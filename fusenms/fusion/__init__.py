"""From a raw model and its layout to a fused model."""
