"""What keeps a file of unknown origin harmless: how it is opened, printed, and read in a child process."""
