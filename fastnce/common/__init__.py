"""Shared helpers: options, files, locks, terminal output, timing, operators."""
