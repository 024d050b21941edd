"""From weights to scores: what a model is asked, and why its answers can be believed."""
