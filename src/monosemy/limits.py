"""Sizes of what is held at a time, shared by the code that keeps to them and by the memory that is predicted from them."""

GRADIENTS_AT_ONCE = 2**31  # bytes of gradients that a group on a GPU holds before it updates
ESTIMATE_BELOW = 0.03  # share of latents per token; below it a CPU estimates the product and looks up what it selects
SELECTION_TOKENS = 2048  # tokens that compete in BatchTopK's selection in evaluation: a batch of dictionary_learning
HEAD_ELEMENTS = 2**24  # logits held at a time in evaluation
