"""The programs that the soak runs: each reads steps, one a line, and writes what it got, one line for each."""
