"""What a step, LC, loading and memory cost, beside what they could cost."""
