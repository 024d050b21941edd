"""One training, the same for every strategy: it knows none of them by name."""
