"""Dense checkpoints that ship with the package: weights in half precision, record, training metrics, model card."""
