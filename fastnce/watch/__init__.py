"""What shows a run to its user: trackers, and the display in notebooks."""
