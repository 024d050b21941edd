"""Slow, obvious transcriptions of the formulas, which the tests hold the fast code against."""
