"""The pages to read, run as they stand."""
