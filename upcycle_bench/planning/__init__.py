"""What would run, its identity and its price; trains nothing."""
