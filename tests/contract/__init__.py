"""What every strategy, model and command must keep, whoever wrote it."""
