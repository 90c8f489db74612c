"""What is measured while a model runs: scores, activations, gradients."""
