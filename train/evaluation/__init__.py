"""How well a model answers: held-out conversations, benchmarks, the frontier."""
