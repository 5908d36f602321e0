"""From a recipe to records: jobs, the training loop, stages, streams, checkpoints."""
