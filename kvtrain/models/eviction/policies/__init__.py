"""One file a policy: its settings, and its answers to the questions of ``Eviction``; found by being here."""
