"""What runs came to: tables in the shape of the paper's, figures, one page with all of it.

python -m experiments.report multirun/2026-01-31_12-00-00
"""
