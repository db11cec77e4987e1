"""Tuning a projector: tune_projector.py is the run, preparation.py what precedes it, finish.py what follows it; the
rooms answer one question each."""
