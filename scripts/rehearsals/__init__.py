"""Nodes and faults, rehearsed on one machine."""
