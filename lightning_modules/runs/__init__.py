"""A run before and around its work: the command line, checks, the folder, checkpoints, messages."""
