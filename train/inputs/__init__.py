"""What goes into a step: samples, prompts, cached features."""
