"""One of two processes of a test: python huggingface_processes.py RANK PORT PATH.

Loads PATH/source, of which each process holds a part, saves it to PATH/saved, and
prints what comes of saving it over PATH/source and with an impossible source.
"""

import sys
from pathlib import Path

import jax

from examples.llama.checkpoints.huggingface import save_hugging_face
from examples.llama.checkpoints.loading import load_model
from examples.llama.model.parameters import named_parameters
from examples.llama.model.sharding import make_mesh, parameter_sharding


def main(rank: int, port: int, path: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    sharding = parameter_sharding(make_mesh("fsdp=2"))
    model = load_model(path / "source", param_dtype="bfloat16", sharding=sharding)
    kernel = named_parameters(model)["layers.1.mlp.up_proj.kernel"]
    assert kernel.addressable_data(0).size == kernel.size // 2
    save_hugging_face(model, path / "saved", max_shard_bytes=5000)
    assert (path / "saved" / "config.json").exists()  # for every process
    for directory, source in (("source", None), ("new", path / "absent")):
        try:
            save_hugging_face(model, path / directory, source=source)
        except ValueError as error:
            print(error)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
