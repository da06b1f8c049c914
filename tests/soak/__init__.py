"""Campaigns of faults: `make soak`, or `python -m tests.soak [NAME ...]`. Small versions run with the tests."""
