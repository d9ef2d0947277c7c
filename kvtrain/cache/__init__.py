"""Where keys and values live: one ragged paged store, and the base of every cache."""
