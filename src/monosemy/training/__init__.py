"""SAEs in training: one, a group, a sweep, and the loop."""
