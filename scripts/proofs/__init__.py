"""The sections of scripts/prove_on_gpu.py, by theme."""
