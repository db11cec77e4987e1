"""Where a LLaVA comes from and where a tuned one goes: opening, converting, writing."""
