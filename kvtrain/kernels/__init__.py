"""How the mathematics runs: one file an operation, a plain-torch reference beside every fast path."""
