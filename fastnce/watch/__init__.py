"""Watching a run: trackers, and the display in notebooks."""
