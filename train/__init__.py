"""Tuning a projector: tune_projector.py is the run, finish.py what follows it; the rooms answer one question each."""
