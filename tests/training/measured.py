"""Columns of ``metrics.csv`` that are measured, and that two equal runs do not share."""

MEASURED = frozenset(
    ("tokens_per_second", "tokens_per_second_least", "tokens_per_second_most", "data_wait", "peak_memory_gib")
)
