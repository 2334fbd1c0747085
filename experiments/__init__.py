"""What is done with the method and the episodes: runs, reports, benchmarks."""
