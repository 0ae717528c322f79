"""From text to batches of activations."""
