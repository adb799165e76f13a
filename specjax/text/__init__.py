"""Tokenizers: loading, rebuilding from model files, chat templates."""
