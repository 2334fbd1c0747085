"""One run: train, test, and write down what came out."""
