"""Releases of half a megabyte, a file for each family: random weights, the real classes."""
