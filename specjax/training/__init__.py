"""Training: vocabularies, packed batches, the step, checkpoints, and the loop around them."""
