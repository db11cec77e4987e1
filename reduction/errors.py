"""What a caller can mend about a reduction or its inputs. Travels with the modeling code, so it knows nothing else."""


class ReductionError(ValueError):
    """A reduction, checkpoint or input that does not fit; the message holds the value, what is allowed, the cure."""
