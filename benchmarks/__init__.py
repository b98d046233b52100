"""What moevision costs and what its studies found: `python -m benchmarks --help`. Not part of the wheel.

A folder for each benchmark and study holds its code and its records; what they share is in `harness.py` (command line,
records, tables), `timing.py` (interleaved timing), `subject.py` (models to measure), `study.py` (small trainings) and
`memory.py`.
"""
