"""What a model that answers in words keeps of its prompt: the keys and values of attention."""
