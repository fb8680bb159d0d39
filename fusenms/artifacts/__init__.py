"""The values that the stages of the pipeline pass on, and their files."""
