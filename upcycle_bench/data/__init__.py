"""Training pairs, evaluation sets, and worlds, which have both."""
