"""The published benchmarks, one file each."""
