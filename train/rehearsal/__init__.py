"""What a step takes of a device, found out without one: its real code on tensors that hold nothing."""
