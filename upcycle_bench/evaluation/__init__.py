"""From weights to scores: how suites encode, rank, probe and tune, and the certificate of an evaluation."""
