"""The settings of a training run."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from examples.llama.model.parameters import DTypeName
from examples.llama.text.sources import Source, find_files, parse_source
from examples.llama.training.flags import (
    parse_interpolation,
    parse_penalties,
    parse_targets,
)

_Many = tyro.conf.UseAppendAction

METHODS = (
    *("adamw", "sgd", "mofo", "lion", "mofo-lion"),
    *("gain", "gradient", "mv", "random", "hft", "keep"),
)
SELF = "self"  # the name of what the pretrained model writes, among replayed files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run. A flag wins over --config, that over --preset."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Settings of a known run to start from: llama2-7b-metamathqa, tinyllama-trace or
    llama3.2-1b-gsm8k. Model, data and output still have to be given."""
    config: Path | None = None
    """JSON file of settings, such as the config.json of another run."""

    # Files
    model: Path
    """A Hugging Face directory (config.json, safetensors), GGUF or llama2.c file."""
    tokenizer: Path | None = None
    """A directory with tokenizer.json, or a llama2.c tokenizer; else the model's."""
    data: Annotated[tuple[str, ...], _Many, tyro.conf.arg(metavar="FILE[:WEIGHT]")]
    """Records to learn: JSON lines, a directory or 'PATTERN*' of such files, or hf:NAME
    for a data set of the hub. Given several times, rows are drawn from each by its
    weight."""
    eval_data: str | None = None
    """Held-out records, in any of the same forms."""
    retain_data: Path | None = None
    """Plain text such as the model was pretrained on, on which forgetting shows."""
    knowledge: Annotated[str | None, tyro.conf.arg(metavar="world|FILE")] = None
    """Questions on which lost knowledge shows: world, those that packages make, or JSON
    lines of your own. Measured at each evaluation."""
    instructions: bool = False
    """Measure at each evaluation how many instructions the model obeys in chat form."""
    output: Path
    """Directory for the results. An unfinished run there is resumed."""

    # Data
    template: Literal["paper", "tokenizer"] = "paper"
    """How a conversation becomes text: as in the paper, or by the tokenizer's own chat
    template."""
    max_length: int = 1024
    """Maximum tokens per row and text window; longer records are truncated."""
    pack: bool = False
    """Put several records in a row, each seeing itself alone, instead of padding."""
    skip_bad_records: bool = False
    """Count malformed lines and skip them, instead of stopping at the first."""
    cache_dir: Path | None = None
    """Directory for the tokenized rows of large data (over 64 MiB), which later runs
    with the same data take; by default mofo_jax in the user's cache directory. It may
    be deleted between runs."""

    # Optimizer
    # A plain str, so that `check` names an unknown method in one line.
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}")] = (
        "mofo"
    )
    """The optimizer. sgd has momentum 0.9; mofo-lion is the momentum filter over Lion;
    gain, gradient, mv and random select by other scores than mofo, with the same Adam;
    hft is Adam on half of the matrices, drawn by the seed; keep is gain with
    --importance self."""
    alpha: float = 0.1
    """The fraction of each parameter that moves in a step, above 0 and up to 1."""
    learning_rate: float = 2e-5
    """Learning rate at its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Down to 0 at the last step, or constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to its peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of every entry and with any method."""
    clip_norm: float | None = None
    """The most that the gradient's global norm may be."""
    lora_rank: int = 0
    """Train a product of this rank beside each projection, not the weights (LoRA)."""
    lora_alpha: float = 16.0
    """LoRA's alpha: the product is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """Share of a projection's inputs that LoRA does not see in a step."""
    lora_targets: Annotated[str, tyro.conf.arg(metavar="NAME[,NAME]|all")] = "all"
    """Projections that get LoRA: all, or names among q_proj, k_proj, v_proj, o_proj,
    gate_proj, up_proj and down_proj."""
    lora_merge: bool = False
    """Write the merged model too, not only the adapter."""

    # Against forgetting
    importance: Annotated[str | None, tyro.conf.arg(metavar="self|FILE")] = None
    """Divide each step by the Fisher information of this: self, texts that the
    pretrained model writes; or a file of examples.llama.fisher."""
    importance_texts: int = 32
    """Number of texts that self draws for it."""
    regularize: Annotated[tuple[str, ...], _Many, tyro.conf.arg(metavar="KIND:X")] = ()
    """A penalty of strength X, several times too: l1 or l2, the distance from the
    pretrained weights, in the loss; l1-decoupled or l2-decoupled, beside it, as weight
    decay is; ewc, l2 weighted by the Fisher information of --fisher-data; kl, the
    divergence from the pretrained model's predictions of the answers learned."""
    fisher_data: str | None = None
    """Records for ewc, of what is to be kept, in any of the forms of --data; or self,
    texts that the pretrained model writes."""
    fisher_records: int = 128
    """Number of records or texts for that estimate."""
    replay: Annotated[tuple[str, ...], _Many, tyro.conf.arg(metavar="FILE:SHARE")] = ()
    """Records to see again, SHARE rows of them for each row of --data; several times
    too. self:SHARE replays texts that the pretrained model writes by itself."""
    self_replay_rows: int = 256
    """Number of texts that the pretrained model writes."""
    soft_targets: bool = True
    """Replay those texts by the pretrained model's predictions, not as plain text."""
    gem: Annotated[tuple[str, ...], _Many, tyro.conf.arg(metavar="FILE")] = ()
    """Records of an earlier task, whose loss no step may raise (GEM), or self; several
    times too. Each takes a gradient more per step."""
    gem_margin: float = 0.5
    """The least weight of an earlier task's gradient where the step is changed."""
    gem_per_tensor: bool = False
    """Compare gradients tensor by tensor instead of whole."""
    interpolate: Annotated[str | None, tyro.conf.arg(metavar="W[:W]")] = None
    """At the end, go back to this share of the way from the pretrained weights: one
    number (Wise-FT), or that of the first and of the last layer (as in HMA)."""

    # Length and size
    steps: int | None = None
    """Training steps; or give epochs."""
    epochs: float | None = None
    """Passes over the rows, instead of steps."""
    batch_size: int = 16
    """Rows per step, over all devices and accumulated parts together."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another, to save memory."""
    seed: int = 0
    """Seed for the order of the rows, and for LoRA's initial weights and dropout."""

    # Precision and devices
    dtype: DTypeName = "float32"
    """Precision of the computation."""
    param_dtype: DTypeName = "float32"
    """Precision of the parameters: float32 or bfloat16. With LoRA, those are frozen and
    may be float16 too, and what LoRA adds is float32."""
    moments_dtype: DTypeName | None = None
    """Precision of the first moments; by default that of what trains."""
    remat: Literal["none", "dots", "full"] = "none"
    """What to compute again in the backward pass to save memory."""
    mesh: str = "fsdp=-1"
    """Devices by use, as in data=2,fsdp=4,tensor=2; -1 is as many as there are."""
    distributed: bool = False
    """Start jax.distributed; needed on several hosts. TPU pods, SLURM, Open MPI and
    Kubernetes are recognised; elsewhere give the next three as well."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    # Along the way
    eval_every: int = 100
    """Steps between evaluations."""
    reference: bool = True
    """Keep the pretrained weights at hand, for the distance from them and the KL. They
    take as much memory as the parameters."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    resume_from: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None
    """Resume from the checkpoint of this step; by default the newest good one."""
    keep: int = 2
    """Number of checkpoints to keep."""
    report: bool = True
    """Write report.html and losses.png at the end."""
    samples: int = 3
    """Answers that the report shows, before and after."""
    export_dtype: DTypeName | None = None
    """Precision of the exported model; by default that of the parameters."""

    # The same as typed values. What is wrong with a text is a ValueError here, which
    # `check` brings about before any work begins.

    @functools.cached_property
    def sources(self) -> tuple[Source, ...]:
        """What to learn."""
        return tuple(map(parse_source, self.data))

    @functools.cached_property
    def replayed(self) -> tuple[Source, ...]:
        """What to see again, with a row's share for each row to learn."""
        found = tuple(map(parse_source, self.replay))
        for text, source in zip(self.replay, found, strict=True):
            if source.path == text:
                raise ValueError(f"replay must be FILE:SHARE, got {text!r}")
        return found

    @functools.cached_property
    def self_replay_share(self) -> float | None:
        """The share of what the pretrained model writes, where that is replayed."""
        shares = (source.weight for source in self.replayed if source.path == SELF)
        return next(shares, None)

    @property
    def record_files(self) -> tuple[Path, ...]:
        """All files of records. Data sets of the hub are none, nor is self."""
        mixed = (source.path for source in (*self.sources, *self.replayed))
        names = (*mixed, *self.gem, self.eval_data, self.fisher_data)
        return tuple(
            file
            for name in names
            if name not in (None, SELF)
            for file in find_files(name)
        )

    @property
    def rows_directory(self) -> Path:
        """Where the rows of large data are."""
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return self.cache_dir or caches / "mofo_jax"

    @property
    def importance_source(self) -> str | None:
        """What gives the Fisher information that divides steps; None divides none."""
        if self.importance is None and self.method == "keep":
            return SELF
        return self.importance

    @property
    def own_texts(self) -> int:
        """How many texts the pretrained model has to write for all that needs some."""
        replays = self.self_replay_share is not None
        seen_again = replays or SELF in (*self.gem, self.fisher_data)
        return max(
            self.self_replay_rows if seen_again else 0,
            self.importance_texts if self.importance_source == SELF else 0,
        )

    @property
    def needs_own_texts(self) -> bool:
        """Whether the pretrained model has to write texts."""
        return self.own_texts > 0

    @property
    def has_soft_targets(self) -> bool:
        """Whether replayed texts have the pretrained model's predictions as targets."""
        return self.self_replay_share is not None and self.soft_targets

    @functools.cached_property
    def penalties(self) -> dict[str, float]:
        """The strength of each kind of penalty."""
        return parse_penalties(self.regularize)

    @functools.cached_property
    def lora_modules(self) -> tuple[str, ...]:
        """The names of the projections that get LoRA."""
        return parse_targets(self.lora_targets)

    @functools.cached_property
    def interpolation(self) -> tuple[float, float] | None:
        """The weight of the trained parameters in the first and in the last layer."""
        text = self.interpolate
        return None if text is None else parse_interpolation(text)
