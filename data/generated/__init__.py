"""Data that is drawn, not read: the demo's scenes and an instruction mix for measuring."""
