"""Our classes in place of those that a checkpoint names, and how they are built from its records."""
