"""Side-by-side benchmarks behind `greenvis bench`: one file each."""
