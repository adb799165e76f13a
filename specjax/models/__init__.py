"""Models as pure functions: the decoder, its layers and cache, and their weights."""
