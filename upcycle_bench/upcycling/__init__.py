"""From a dense model to experts: what strategies share on the way to the model that a run starts to train."""
