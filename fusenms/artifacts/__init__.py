"""The values that travel along the line, and their files."""
