"""What the pytest plugin is made of: a guard in a process of its own, and which test each of its faults belongs to."""
