"""A Hub on this machine, and the real client pointed at it."""
