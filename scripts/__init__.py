"""The commands: each file is one, and runs as `python scripts/NAME.py`."""
