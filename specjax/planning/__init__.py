"""What a model and its draft need on hardware that you do not have: memory, collectives, time."""
