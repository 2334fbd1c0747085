"""Reports on runs: tables like the paper's, figures, and one HTML page with all of it.

python -m experiments.report multirun/2026-01-31_12-00-00
"""
