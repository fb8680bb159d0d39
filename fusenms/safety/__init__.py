"""Safe handling of files of unknown origin: opening, writing and printing them, and reading them in a child process."""
