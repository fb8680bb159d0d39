"""Classes that replace those that a checkpoint names (stand-ins), and the code that builds them from its records."""
