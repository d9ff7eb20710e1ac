"""A run from its first step, or its last checkpoint, to its results."""

import contextlib
import functools
import itertools
import math
import resource
import signal
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from examples import terminal
from examples.environment import environment
from examples.files import locked, write_json
from examples.llama.model.flops import peak_flops, training_flops
from examples.llama.model.loss import next_token_loss
from examples.llama.model.sharding import put_batch
from examples.llama.reporting.measured import MEASURES
from examples.llama.text.batches import records_of
from examples.llama.training import inputs
from examples.llama.training.checkpoint import Checkpoint, Checkpoints, check_space
from examples.llama.training.checks import check
from examples.llama.training.config import Config
from examples.llama.training.importance import save_importance
from examples.llama.training.log import MetricsLog
from examples.llama.training.optimizers import MakeOptimizer, make_optimizer
from examples.llama.training.own_texts import save_texts
from examples.llama.training.parsing import settings
from examples.llama.training.results import exports, finish, interpolated, sample
from examples.llama.training.setup import Run, describe, set_up
from examples.llama.training.steps import Loss, compile_step, make_step, peak_bytes
from examples.llama.training.streams import Streams
from examples.llama.training.stuck import StuckEntries
from mofo_jax.continual import project_gradient


def train(
    config: Config,
    *,
    progress: bool = True,
    optimizer: MakeOptimizer = make_optimizer,
    loss: Loss = next_token_loss,
    before: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Runs what `config` describes, with a bar and printed evaluations if `progress`.

    Args:
      config: The settings. To resume a run, pass the same other arguments too.
      progress: Whether to show and say anything.
      optimizer: Makes the optimizer of the settings, instead of that of their method.
        The learning rate is an extra argument of its updates, `learning_rate`, to be
        applied inside, as by `optimizers.scale_by_given_learning_rate`.
      loss: What to train by, in place of `next_token_loss`, with the same arguments.
        It gets the pretrained model, if `config.reference`.
      before: Measures of the pretrained model that another run has, not to be measured
        again.

    Returns:
      "before" and "after", each a dictionary of those of MEASURES that can be
      measured, which a rerun gives again; and of the training since the last restart,
      without compilation and evaluation, "seconds", "milliseconds_per_step",
      "tokens_per_second" and "mfu", the share of the devices' peak that the model's
      own operations took; "preparing", the seconds in which texts and Fisher
      information were made, without compilation; "bytes", what the compiled
      training step needs at most on each device, all that it reads included; and
      "stuck_entries", how many entries cannot move any more at the end, see
      `StuckEntries`.

    Raises:
      ValueError, OSError: Something is wrong with the configuration, a file or the
        disk. Before training has begun, nothing is written.
      FloatingPointError: A loss or gradient is not finite.
      terminal.Stopped: A signal came; a checkpoint has been written.
    """
    check(config)
    first = jax.process_index() == 0
    with locked(config.output) if first else contextlib.nullcontext():
        return _train(
            config,
            progress=progress and first,
            optimizer=optimizer,
            loss=loss,
            before=before,
        )


def _train(
    config: Config,
    *,
    progress: bool,
    optimizer: MakeOptimizer,
    loss: Loss,
    before: dict[str, float] | None,
) -> dict[str, Any]:
    first = jax.process_index() == 0
    say = tqdm.write if progress else lambda _: None
    run = set_up(config, say, progress=progress, optimizer=optimizer, loss=loss)
    output = config.output
    check_space(output, run.state, config.keep)
    if first and not (output / "config.json").exists():
        write_json(output / "config.json", settings(config))
    if first and not (output / inputs.FILE).exists():
        write_json(output / inputs.FILE, inputs.digests(config))
    if first and not (output / "samples.json").exists():
        write_json(output / "run.json", describe(run) | environment())
        if run.datasets.written is not None:
            save_texts(run.datasets.written, run.tokenizer, output)
        save_importance(run.importance, output)
        # Of the pretrained model, also where an earlier process was killed before this.
        write_json(output / "samples.json", sample(run, run.state.params))
    checkpoints = Checkpoints(output / "checkpoints", keep=config.keep)
    resumed = checkpoints.restore(
        run.state, step=config.resume_from, warn=lambda text: say(f"warning: {text}")
    )
    log = MetricsLog(output, None if resumed is None else resumed.step, first)
    try:
        loop = _Loop(run, checkpoints, resumed, log, progress=progress, before=before)
        # Several processes need JAX's own handler of SIGTERM; see `_stopping`.
        stop = terminal.StopRequest()
        alone = jax.process_count() == 1
        with stop if alone else contextlib.nullcontext(), loop.bar:
            loop(stop)
    except OSError as error:
        raise OSError(f"{error}; {checkpoints.where()}") from error
    finally:
        log.close()
        checkpoints.close()
    rate, mfu = loop.speed(loop.seconds)
    trained = max(1, run.steps - (loop.first or 0))
    speed = {
        "seconds": loop.seconds,
        "milliseconds_per_step": 1000 * loop.seconds / trained,
        "tokens_per_second": rate,
        "mfu": mfu,
        "preparing": run.preparing,
        "bytes": loop.bytes,
        "stuck_entries": loop.stuck.count,
    }
    result = finish(run, loop.state, loop.evaluations, speed)
    say(f"{'':54}{'before':>10}{'after':>10}")
    for name, value in result["before"].items():
        label = MEASURES[name].label
        say(f"{label:54}{value:10.4f}{result['after'][name]:10.4f}")
    say(f"{rate:,.0f} tokens/s, MFU {mfu:.1%}")
    for directory in exports(config):
        say(f"{directory.name}: {directory}")
    if config.report:
        say(f"report: {output / 'report.html'}")
    return result


class _Loop:
    """The steps of a run from its last checkpoint on, and the speed they went at."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        resumed: Checkpoint | None,
        log: MetricsLog,
        *,
        progress: bool,
        before: dict[str, float] | None,
    ):
        config = run.config
        self.run, self.checkpoints, self.log = run, checkpoints, log
        self.before = before
        self.training = run.datasets.training
        self.batches = Streams(run.datasets, config)
        self.say = tqdm.write if progress else lambda _: None
        self.stuck = StuckEntries(self.say)
        self.state, self.first = run.state, None
        # The first and the last, by step. They are in each checkpoint, so that the
        # results do not depend on metrics.jsonl.
        self.evaluations: dict[int, dict[str, float]] = {}
        if resumed is not None:
            self.first, self.state = resumed.step, resumed.state
            self.batches.set_state(resumed.data["position"])
            evaluations = resumed.data["evaluations"].items()
            self.evaluations = {int(step): values for step, values in evaluations}
            self.say(f"resuming from the checkpoint of step {self.first}")
        peak, source = peak_flops(jax.local_devices()[0], config.dtype)
        self.peak = peak * run.mesh.size
        self.say(f"MFU is relative to {self.peak / 1e12:.3g} TFLOP/s ({source})")
        self.flops = training_flops(
            run.architecture, config.max_length, lora=config.lora_rank > 0
        )
        self.bar = tqdm(
            total=run.steps,
            initial=self.first or 0,
            mininterval=0.2,
            disable=not progress,
            **terminal.bar_style(),
        )
        # Results of the last step, still on the device, and the rows of its batch.
        self.pending: tuple[int, Any, np.ndarray] | None = None
        self.seconds, self.tokens, self.started = 0.0, 0.0, 0.0
        self.bytes = 0

    def __call__(self, stop: terminal.StopRequest) -> None:
        config, steps = self.run.config, self.run.steps
        if self.first is None:
            self.evaluate(0, self.before)
        else:
            self.stuck.look(self.first, self.state.opt_state)
        self.bar.set_description("compiling")
        run_step = self.compile()
        self.bytes = peak_bytes(run_step)
        self.go_on()
        for step in range((self.first or 0) + 1, steps + 1):
            batches, rows = self.next_batches()
            rate = self.run.learning_rates[step - 1]
            self.state, metrics = run_step(self.state, self.run.fixed, rate, *batches)
            self.settle()  # the step before, while this one runs
            self.pending = step, metrics, rows
            signum = _stopping(stop, self.checkpoints, step)
            evaluating = step % config.eval_every == 0 or step == steps
            saving = step % config.save_every == 0 or step == steps or signum
            if not (evaluating or saving):
                continue
            self.settle()
            self.seconds += time.perf_counter() - self.started
            if step == steps:
                self.state = interpolated(self.run, self.state)
            if evaluating:
                self.evaluate(step)
            if saving:
                position, evaluations = self.batches.get_state(), self.evaluations
                data = {"position": position, "evaluations": evaluations}
                self.checkpoints.save(step, self.state, data)
            if signum:
                self.checkpoints.finish()
                raise terminal.Stopped(
                    signum,
                    f"stopped by signal {signum} after step {step}; the same command "
                    f"resumes there; {self.checkpoints.where()}",
                )
            self.go_on()
        self.checkpoints.finish()

    def compile(self) -> Any:
        """The step for the shapes of a batch, compiled without consuming any data."""
        run, position = self.run, self.batches.get_state()
        examples, _ = self.next_batches()
        self.batches.set_state(position)
        project = None
        if run.config.gem:
            project = functools.partial(
                project_gradient,
                margin=run.config.gem_margin,
                per_tensor=run.config.gem_per_tensor,
            )
        step = make_step(
            run.graph,
            run.optimizer,
            packed=run.config.pack,
            loss=run.loss,
            reference=run.reference,
            project=project,
        )
        return compile_step(step, self.state, run.fixed, *examples, mesh=run.mesh)

    def next_batches(self) -> tuple[tuple[Any, list[Any]], np.ndarray]:
        """A step's batch and memories on the devices, and the batch's rows."""
        batch, memories, rows = next(self.batches)
        placed = [
            put_batch(x, self.run.mesh, self.run.config.accumulate)
            for x in (batch, *memories)
        ]
        return (placed[0], placed[1:]), rows

    def go_on(self) -> None:
        """Starts the clocks; what came before does not count in the time left."""
        self.bar.set_description("training")
        self.bar.unpause()
        self.started = time.perf_counter()

    def settle(self) -> None:
        """Logs the pending step, once the device is done with it."""
        if self.pending is None:
            return
        (step, metrics, rows), self.pending = self.pending, None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self.tokens += values.pop("tokens")
        self.log.write(step, values, "train")
        for name, value in values.items():
            if not math.isfinite(value):
                ids = (records_of(self.training, int(row)) for row in rows)
                raise FloatingPointError(
                    f"{name} is {value} at step {step}; the batch's records are "
                    f"{', '.join(itertools.chain(*ids))}; {self.checkpoints.where()}"
                )
        rate, mfu = self.speed(self.seconds + time.perf_counter() - self.started)
        memory = f"{_memory() / 1e9:.1f} GB"
        loss = f"loss {values['loss']:.3f}"
        self.bar.set_postfix_str(
            f"{loss}, {rate:,.0f} tokens/s, {memory}, MFU {mfu:.0%}", refresh=False
        )
        self.bar.update(step - self.bar.n)

    def speed(self, seconds: float) -> tuple[float, float]:
        """Tokens per second, padding not counted, and the model FLOPs utilization."""
        rate = self.tokens / max(seconds, 1e-9)
        return rate, rate * self.flops / self.peak

    def evaluate(self, step: int, known: dict[str, float] | None = None) -> None:
        self.bar.set_description("evaluating")
        values = known or self.run.measures(self.state.params)
        first = self.evaluations.get(0, values)
        self.evaluations = {0: first, step: values}
        stuck = self.stuck.look(step, self.state.opt_state)
        self.log.write(step, values | stuck, "eval")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.say(f"step {step}: {shown}")
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step}; {self.checkpoints.where()}"
                )


def _stopping(
    stop: terminal.StopRequest, checkpoints: Checkpoints, step: int
) -> int | None:
    """The signal after which to stop now, on which several processes agree."""
    if jax.process_count() > 1:
        # JAX's own handler; it has every process stop after the same step.
        return signal.SIGTERM if checkpoints.preempted(step) else None
    return stop.signum


def _memory() -> float:
    """The most bytes in use so far: of the device's memory, else of the process's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats["peak_bytes_in_use"]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
