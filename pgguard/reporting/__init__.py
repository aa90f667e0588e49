"""Where faults go: JSON Lines, the terminal, and the closing summary."""
