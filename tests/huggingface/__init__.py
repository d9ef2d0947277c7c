"""transformers' own tests, run on our models."""
