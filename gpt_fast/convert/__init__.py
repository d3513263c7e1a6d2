"""Converters: published checkpoints in, one directory of gpt-fast-named safetensors out.

`source` reads tensors by name from each file format, `names` says which source rows make each of the model's
tensors, `run` checks, streams and installs them. gguf and meta also translate their metadata to config.json's form.
"""
