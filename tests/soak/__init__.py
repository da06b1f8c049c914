"""Faults on purpose, at random: `make soak`, or `python -m tests.soak [NAME ...]`; a small share of each is tested."""
