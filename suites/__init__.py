"""Evaluation suites, one file each; registered by entry point like any outsider's, never imported by path."""
