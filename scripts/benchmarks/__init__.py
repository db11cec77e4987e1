"""What a step, LC, loading, memory and choosing tokens cost, beside what they could cost."""
