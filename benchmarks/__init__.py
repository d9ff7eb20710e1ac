"""Programs that measure mofo_jax; each writes its numbers to files.

The commands are cost, cost_fine_tuning, facts, forgetting, landscape, load_memory,
loss_memory, pretrain and training_speed. The other modules are parts of them.
"""
