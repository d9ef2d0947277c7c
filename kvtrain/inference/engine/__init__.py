"""One engine for every checkpoint: requests come and go while one thread owns the model and its matching cache."""
