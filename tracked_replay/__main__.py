"""``python -m tracked_replay STAGE``."""

from tracked_replay.cli import main

if __name__ == "__main__":
    main()
