"""One run: train, test, and write the results."""
