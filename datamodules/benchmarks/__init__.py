"""The published benchmarks, a file each."""
