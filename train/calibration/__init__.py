"""Which layers freeze: layer contribution, measured and chosen by."""
