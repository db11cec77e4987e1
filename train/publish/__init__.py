"""A run's checkpoint on the Hub, with its card."""
