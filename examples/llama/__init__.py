"""Fine-tune a Llama with MoFO: the model, its checkpoints, its data and trainer."""
