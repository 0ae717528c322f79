"""A run's rows and training curves as pictures (`plots`).

It knows the two kinds of record that a run folder holds, `rows.jsonl` (one flat row per SAE) and
`metrics.jsonl` (one object per logged step), and nothing of training: importing it needs neither torch nor a
model.
"""
