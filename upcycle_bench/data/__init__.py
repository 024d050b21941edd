"""Training pairs, evaluation sets and the worlds that bring both."""
