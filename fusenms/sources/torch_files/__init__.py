"""A checkpoint's zip and pickle, read as plain data."""
