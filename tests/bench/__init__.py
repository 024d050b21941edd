"""`make bench`: how fast it is, as ratios of two things measured in turns in one run.

    python -m tests.bench [--only moe_layer] [--rounds 5] [--threads 2] [--device cpu] [--markdown docs/performance.md]

Rows are numbered as their goals are. Each stands in `layers.py`, `steps.py`, `initialisation.py`, `pipeline.py` or
`probing.py`, and what it compares with beside it (`training.py`, `naive.py`, `clip_benchmark_probe.py`).
`side_by_side.py` is a script apart, and `python -m tests.bench.scaling` draws how time grows with size.
"""
