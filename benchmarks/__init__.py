"""Benchmarks behind every speed that the project claims: `python benchmarks/run.py --out DIR`."""
