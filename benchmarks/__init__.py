"""Every speed that the project claims, beside what it is compared with: `python benchmarks/run.py --out DIR`."""
