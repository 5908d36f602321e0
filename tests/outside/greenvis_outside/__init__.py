"""What a third party may add to greenvis through entry points: one file for each door."""
