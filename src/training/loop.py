"""Training, for all stages: a run of epochs, an epoch of steps, a step of micro-batches; logs and checkpoints."""
import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from models.backbone import training_format
from src.training.optimiser import build_optimiser, clip_gradient, set_rates
from src.training.resume import restore, state_of
from utils import distributed
from utils.checkpoint import save_checkpoint
from utils.config import Machine, TrainConfig
from utils.errors import UserError
from utils.files import write_json
from utils.interrupt import Interrupt, Interrupted
from utils.loader import EpochBatches, TrainingSamples, training_loader
from utils.log import JsonLog, NoBoard, NoLog, duration, environment, memory_gb, progress, say, tensorboard, warn
from utils.store import BEST, NEWEST

DIVERGED = 1e3  # mean loss of an epoch; at the start, all losses here are of order 1
Batch = Mapping[str, torch.Tensor]
Terms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """The images of a step that are computed at once, by one rank or by one after the other (--accumulate).

    weight: their number / images in the global batch: the weight of a mean over them.  totals: what `Task.totals`
    counts in the global batch, for losses that are means over something else.  progress: of the training, in [0, 1).
    """
    weight: float
    totals: torch.Tensor
    progress: float


def no_totals(batch: Batch) -> torch.Tensor:
    """For losses that are means over images: `MicroBatch.weight` is all they need."""
    return torch.zeros(0, device=batch["index"].device)


@dataclass
class Task:
    """What one stage trains.

    step: "stage1", "stage2" or "deeplab".  network: a `models.backbone.Network`, the module that learns.
    loss: function (network, batch on the device, MicroBatch) -> (scalar, {term: scalar tensor}): what the micro-batch
    adds to the loss of the global batch, so that micro-batches add up to what the whole batch would give.
    samples: addressed by (epoch, index).
    validate: function (network) -> {"score": higher is better, ...}, or None.
    contents: function () -> what a checkpoint holds besides the loop's own state: networks, classes.
    totals: function (batch without its images) -> tensor (n,).
    sparse: whether a step may leave some parameters without a gradient.
    keeps_last: whether the last epoch counts as the best, whatever its validation score.
    targets: tells label maps that `samples` reads from others; a run is resumed with the same ones only.
    """
    step: str
    network: torch.nn.Module
    loss: Callable[[torch.nn.Module, Batch, MicroBatch], tuple[torch.Tensor, Terms]]
    samples: TrainingSamples
    validate: Callable[[torch.nn.Module], dict[str, float]] | None
    contents: Callable[[], dict[str, object]]
    totals: Callable[[Batch], torch.Tensor] = no_totals
    sparse: bool = False
    keeps_last: bool = False
    targets: str = ""


def check_finite(values: torch.Tensor) -> torch.Tensor:
    """A network's weights or outputs as they are; UserError if they are not finite."""
    if not values.isfinite().all():
        raise UserError("training has diverged: the network's weights or outputs are not finite; lower --lr, or set "
                        "--clip_grad")
    return values


def train(task: Task, config: TrainConfig, machine: Machine, run_dir: Path, options: Mapping[str, object]) -> Path:
    """Train a task and return the path of its model_best.pth.tar.

    options: the resolved flags, for the record.  Writes options.json, log.jsonl, checkpoint.pth.tar after every epoch,
    every `save_every` minutes and, when interrupted, after the running step, and model_best.pth.tar after the epoch
    with the best validation score; of equal epochs the later wins.  Interrupted is raised once the state is saved.
    Of several ranks, rank 0 writes; all return when everything is written.
    """
    run = Run(task, config, machine, Path(run_dir), options)
    log_size = restore(run, run.newest) if config.resume else 0
    if not config.resume and distributed.is_main():
        run.newest.unlink(missing_ok=True)  # of an earlier run (--overwrite): --resume must not go on from that one
    run.write_record()
    with run.logging(log_size), Interrupt() as run.interrupt:
        while run.epoch < config.epochs:
            run.train_epoch()
            run.finish_epoch()
            run.stop_if_interrupted()  # while it validated
    run.write_record()
    distributed.barrier()
    return run.run_dir / BEST


class Run:
    """The state of a training run, and how it moves on."""

    def __init__(self, task: Task, config: TrainConfig, machine: Machine, run_dir: Path, options: Mapping[str, object]):
        self.task, self.config, self.machine = task, config, machine
        self.run_dir, self.options, self.newest = run_dir, dict(options), run_dir / NEWEST
        self.epoch, self.step, self.sums, self.best, self.failures = 0, 0, {}, -math.inf, {}
        self.steps_per_epoch = len(self._batches(0))
        self.saved = time.monotonic()
        check_world(len(task.samples), config.batch_size)
        self.format = training_format(task.network, machine.device, machine.precision)
        self.network = task.network.to(machine.device, memory_format=self.format).train()
        if distributed.world() > 1 and machine.device.type == "cuda":
            synchronise_norms(self.network)
        self.optimiser = build_optimiser(self.network, config)
        if config.compile:
            self.network.backbone.compile()
        self.compute = _Loss(self.network, task.loss)
        if distributed.world() > 1:
            self.compute = _parallel(self.compute, task.sparse)

    # --- an epoch and a step -----------------------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """Go through the rest of the current epoch, from `self.step` on."""
        batches = self._batches(self.epoch, self.step)
        loader = training_loader(self.task.samples, batches, self.machine.workers, self.machine.device)
        self.network.train()
        bar = progress(loader, f"{self.task.step} epoch {self.epoch + 1}/{self.config.epochs}", unit="step")
        pace = Pace()
        for batch in bar:
            bounds = batches.bounds(self.step)
            self._note_failures(batch.pop("failures", ()))
            terms = self.train_step(batch, bounds)
            pace.count(bounds[2])
            self._log_step(terms, bar, pace)
            self.stop_if_interrupted()
            if self.config.save_every and time.monotonic() - self.saved >= 60 * self.config.save_every:
                self.save()

    def train_step(self, batch: dict[str, torch.Tensor], bounds: tuple[int, int, int]) -> dict[str, float]:
        """One optimiser step.  batch: this rank's slice, on the CPU.  bounds: (first, end, images) of it in the global
        batch.  Returns the loss, its terms and the gradient's norm of the global batch.

        Ranks and micro-batches together do what one rank does with the whole batch: each loss is divided by what the
        whole batch holds, and gradients are summed. Frozen normalisation: exactly so; normalisation that learns takes
        the statistics of a micro-batch, on GPUs those of all ranks; dropout draws for each micro-batch.
        """
        (first, end, images), number, world = bounds, self.global_step(), distributed.world()
        set_rates(self.optimiser, number / self.total_steps())
        self.optimiser.zero_grad(set_to_none=True)
        batch = {name: self._to_device(name, value) for name, value in batch.items()}
        totals = distributed.all_reduce(self.task.totals({k: v for k, v in batch.items() if k != "image"}))
        torch.manual_seed(draw_seed(self.config.seed, number, distributed.rank()))
        found = []
        parts = min(self.config.accumulate, images // world)  # as many on each rank, so that none waits in vain
        edges = [(end - first) * part // parts for part in range(parts + 1)]
        for low, high in zip(edges, edges[1:]):
            micro = MicroBatch((high - low) / images, totals, number / self.total_steps())
            with self._synchronised(high == edges[-1]):
                with self.machine.autocast():
                    loss, terms = self._call({name: value[low:high] for name, value in batch.items()}, micro)
                (loss * world).backward()  # DistributedDataParallel takes the mean over ranks; here they add up
            found.append(torch.stack([torch.as_tensor(value, dtype=torch.float64, device=loss.device)
                                      for value in (loss.detach(), *terms.values())]))
        values = distributed.all_reduce(torch.stack(found).sum(dim=0)).tolist()
        said = dict(zip(("loss", *terms), values))
        norm = clip_gradient(self.optimiser, self.config.clip_grad) if all(map(math.isfinite, values)) else math.nan
        if not math.isfinite(norm):
            self._refuse(said, batch["index"])
        self.optimiser.step()
        self.step += 1
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in said.items()}
        return {**said, "grad_norm": norm}

    def _to_device(self, name: str, value: torch.Tensor) -> torch.Tensor:
        value = value.to(self.machine.device, non_blocking=True)
        return value.contiguous(memory_format=self.format) if name == "image" else value

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last or distributed.world() == 1 else self.compute.no_sync()

    def _call(self, batch: Batch, micro: MicroBatch) -> tuple[torch.Tensor, Terms]:
        if not self.config.compile:
            return self.compute(batch, micro)
        try:
            return self.compute(batch, micro)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--compile failed ({reason}); leave it out, or install what it needs, such as a C++ "
                            "compiler") from None

    def _refuse(self, said: dict[str, float], indices: torch.Tensor) -> None:
        what = "gradient" if all(map(math.isfinite, said.values())) else "loss"
        names = [self.task.samples.dataset.ids[index] for index in indices.tolist()]
        images = ", ".join(name for part in distributed.gather(names) for name in part)
        raise UserError(f"the {what} is not finite at step {self.global_step()} ({said}); its images: {images}; lower "
                        "--lr, or set --clip_grad")

    def finish_epoch(self) -> None:
        """Validate, log the epoch's means, and save."""
        means = {name: value / self.step for name, value in self.sums.items()}
        for parameter in self.network.parameters():
            check_finite(parameter)
        if means["loss"] > DIVERGED:
            raise UserError(f"training has diverged: the mean loss of epoch {self.epoch + 1} is {means['loss']:.3g}; "
                            "lower --lr, or set --clip_grad")
        scores = {"score": -means["loss"]}
        if self.task.validate is not None:
            self.network.eval()
            distributed.broadcast_tensors(self.network.buffers())  # statistics that each rank learned for itself
            # Whole images come in many sizes, and each would be compiled for anew.
            eager = torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()
            with torch.no_grad(), self.machine.autocast(), eager:
                scores = self.task.validate(self.network)
        self.log.write(epoch=self.epoch, mean=means, validation=scores)
        for name, value in scores.items():
            self.board.add_scalar(f"validation/{name}", value, self.global_step())
        told = "  ".join(f"{name} {value:.4f}" for name, value in {**means, **scores}.items())
        say(f"{self.task.step} epoch {self.epoch + 1}/{self.config.epochs} | {told}")
        self.failures = distributed.gather_dict(self.failures, self.task.samples.dataset.ids)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        score = -math.inf if math.isnan(scores["score"]) else scores["score"]  # no score is the worst one
        if score >= self.best or self.task.keeps_last:
            self.best = score
            if distributed.is_main():
                save_checkpoint(self.run_dir / BEST, self._contents())
        self.save()

    # --- where the run stands ----------------------------------------------------------------------------------------

    def _batches(self, epoch: int, start: int = 0) -> EpochBatches:
        return EpochBatches(len(self.task.samples), self.config.batch_size, self.config.seed, epoch, start,
                            distributed.rank(), distributed.world())

    def global_step(self) -> int:
        """Steps since the run began."""
        return self.epoch * self.steps_per_epoch + self.step

    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs

    def save(self) -> None:
        """Write checkpoint.pth.tar, from which --resume goes on."""
        if distributed.is_main():
            save_checkpoint(self.newest, {**self._contents(), **state_of(self, self.log.size())})
        self.saved = time.monotonic()

    def _contents(self) -> dict[str, object]:
        return {"step": self.task.step, "options": self.options, "epoch": self.epoch, **self.task.contents()}

    def stop_if_interrupted(self) -> None:
        """After a signal to any of the ranks: save, say how to go on, and raise Interrupted in all of them."""
        number = self.interrupt.seen()
        if not number:
            return
        self.save()
        print(f"\nSaved {self.newest} at epoch {self.epoch + 1}, step {self.step} of {self.steps_per_epoch}; the same "
              "command with --resume goes on from there.", file=sys.stderr)
        distributed.barrier()
        raise Interrupted(number)

    # --- records -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def logging(self, size: int) -> Iterator[None]:
        """Open log.jsonl, from byte `size` on, and TensorBoard, both in rank 0 alone."""
        main = distributed.is_main()
        self.log = JsonLog(self.run_dir / "log.jsonl", size) if main else NoLog()
        self.board = NoBoard()
        if main and self.config.tensorboard:
            self.board = tensorboard(self.run_dir, self.global_step() + 1)
        with contextlib.closing(self.log), contextlib.closing(self.board):
            yield

    def write_record(self) -> None:
        """options.json: how the run was made, and which images it passed over."""
        if distributed.is_main():
            write_json(self.run_dir / "options.json", {
                "step": self.task.step, "options": self.options, **environment(self.machine.device),
                "processes": distributed.world(), "failures": self.failures})

    def _note_failures(self, texts: list[str]) -> None:
        """Remember which images were passed over (--on_bad_image skip), and say so once of each."""
        for image_id, reason in {key: value for text in texts for key, value in json.loads(text).items()}.items():
            if image_id not in self.failures:
                warn(f"Skipping {image_id}: {reason}")
            self.failures[image_id] = reason

    def _log_step(self, terms: dict[str, float], bar: object, pace: "Pace") -> None:
        rates = [group["lr"] for group in self.optimiser.param_groups]
        left = pace.seconds * (self.total_steps() - self.global_step())
        memory = memory_gb(self.machine.device)
        self.log.write(epoch=self.epoch, step=self.global_step(), lr=rates[0], lrs=rates,
                       images_per_second=round(pace.rate, 2), seconds_left=round(left), memory_gb=round(memory, 3),
                       **terms)
        numbers = " ".join(f"{name} {value:.4f}" for name, value in terms.items())
        lrs = " ".join(f"{rate:.1e}" for rate in sorted(set(rates)))
        bar.set_postfix_str(f"{numbers} | lr {lrs} | {pace.rate:.1f} img/s | {memory:.1f} GB | training: "
                            f"{duration(left)} left", refresh=False)
        for name, value in {**terms, "lr": rates[0], "images_per_second": pace.rate}.items():
            self.board.add_scalar(f"train/{name}", value, self.global_step())


class Pace:
    """Images a second of the running epoch, and seconds a step."""

    def __init__(self):
        self.started, self.images, self.steps = time.time(), 0, 0

    def count(self, images: int) -> None:
        """Count a step of so many images."""
        self.images, self.steps = self.images + images, self.steps + 1
        spent = time.time() - self.started
        self.rate, self.seconds = self.images / spent, spent / self.steps


def draw_seed(seed: int, step: int, rank: int) -> int:
    """Seed of all draws of a step: of (seed, step, rank) alone, so that a resumed run draws the same.

    torch's generator on the CPU reads the lower 32 bits alone; the factor of rank, odd and far from any step, keeps
    ranks apart in these.
    """
    return seed * 1_000_003 + step + rank * 2_654_435_761


def check_world(images: int, batch_size: int) -> None:
    """UserError if there are more ranks than images in a step."""
    if min(images, batch_size) < distributed.world():
        raise UserError(f"{distributed.world()} processes cannot share steps of {min(images, batch_size)} images; "
                        "start fewer, or pass a larger --batch_size: it counts the images of all processes")


def synchronise_norms(network: torch.nn.Module) -> None:
    """Let batch normalisation that learns take the statistics of all ranks' images, in place.  GPUs only.

    The network is in training mode: frozen layers, which stay as they are, are in eval mode.
    """
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, torch.nn.BatchNorm2d) and layer.training:
                setattr(module, name, torch.nn.SyncBatchNorm.convert_sync_batchnorm(layer))


class _Loss(torch.nn.Module):
    """A network and its loss as one module: DistributedDataParallel needs all uses of the network inside one call."""

    def __init__(self, network: torch.nn.Module, loss: Callable):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: Batch, micro: MicroBatch) -> tuple[torch.Tensor, Terms]:
        return self.loss(self.network, batch, micro)


def _parallel(module: torch.nn.Module, sparse: bool) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch has another name for broadcast_buffers
        return torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True,
                                                         find_unused_parameters=sparse)
