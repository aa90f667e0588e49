"""The guard itself, on trio: listeners, upstream connections, the relay, and what happens when a verdict falls."""
