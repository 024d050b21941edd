"""From a dense CLIP to the model that a run starts to train, and the mathematics that several strategies share."""
