"""Weights from and to files: Hugging Face's safetensors, llama2.c."""
