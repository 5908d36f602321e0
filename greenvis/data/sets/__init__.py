"""The data sets that recipes name: one file each."""
