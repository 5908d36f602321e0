"""What a run would cost and reach, before it is run."""
