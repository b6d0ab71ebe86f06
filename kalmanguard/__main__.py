"""``python -m kalmanguard`` is the command line."""

from kalmanguard.cli import main

if __name__ == "__main__":
    main()
