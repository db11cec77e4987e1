"""How checkpoints/demo-llava was made."""
