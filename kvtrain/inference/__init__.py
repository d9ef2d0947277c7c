"""Opening a model and generating with it."""
