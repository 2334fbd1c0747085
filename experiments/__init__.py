"""Runs, sweeps, reports and benchmarks."""
