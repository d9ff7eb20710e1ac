"""The model: its shapes, layers, loss, LoRA, and how it lies on a mesh."""
