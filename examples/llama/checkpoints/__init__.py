"""Weights from and to files: Hugging Face's safetensors, GGUF, llama2.c."""
