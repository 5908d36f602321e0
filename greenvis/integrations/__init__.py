"""greenvis inside the trainers people already use: one file each, its library imported with it."""
