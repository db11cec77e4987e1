"""One optimizer step: the loss, what it costs, and the engine that makes the update."""
