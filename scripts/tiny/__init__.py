"""Releases of a few kilobytes, a file for each family: random weights, the real classes."""
