"""Faults on purpose: a run is disturbed, the same command is typed again, and the weights must be the same."""
