"""Tokenizers: loading, rebuilding out of model files, chat templates."""
