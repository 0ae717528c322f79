"""Labels of latents: what a language model says of each, and how well that foretells where it fires.

examples.py: contexts of a latent from what an evaluation kept; prompts.py: requests and what their answers
say; asking.py: many requests at a time, each answer kept; endpoint.py, local_model.py: who answers;
scoring.py: detection and fuzzing. Nothing here imports torch but local_model.py.
"""
