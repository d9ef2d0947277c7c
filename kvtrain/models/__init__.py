"""What is trained: a host, the surgery, and one folder an architecture."""
