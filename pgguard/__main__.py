"""``python -m pgguard``."""

from pgguard.cli.main import main

if __name__ == "__main__":
    main()
