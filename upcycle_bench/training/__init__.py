"""One training; knows no strategy by name."""
