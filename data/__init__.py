"""From instruction JSON and images to micro-batches. Knows nothing of `reduction` and `train`."""
