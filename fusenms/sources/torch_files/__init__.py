"""Reads the zip archive and the pickle of a checkpoint as plain data."""
