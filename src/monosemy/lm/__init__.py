"""The language model: what its configuration says, its weights, its activations."""
