"""The training loop, its config and the checkpoints of a run."""
