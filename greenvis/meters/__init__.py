"""What a run cost: energy, carbon, FLOPs, speed, memory."""
