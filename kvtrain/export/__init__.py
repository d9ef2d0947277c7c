"""A trained run becomes a Hugging Face folder."""
