"""What would run, its identity and its cost; nothing is trained here."""
