"""The one training loop of all stages: schedule, logging, validation, checkpoints, and resuming to the same result."""
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch

from src.resume import restore, state_of
from src.stepper import NotFinite, Stepper, autocast
from src.task import Part, Task
from utils import distributed
from utils.artifacts import write_json
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.interrupt import Interrupt, Interrupted
from utils.loader import EpochBatches, training_loader
from utils.log import JsonLog, NoBoard, NoLog, duration, environment, memory_gb, progress, tensorboard

__all__ = ["Part", "Task", "autocast", "train"]


def train(task, options, run_dir, device):
    """Train a task and return the path of its model_best.pth.tar.

    options: the resolved flags, a dict.  Writes options.json, log.jsonl, checkpoint.pth.tar after every epoch, every
    `save_every` minutes and, when interrupted, after the running step, and model_best.pth.tar after the epoch with the
    best validation score; of equal epochs the later wins.  Interrupted is raised once the state is saved.
    Of several processes, rank 0 writes; all return when everything is written.
    """
    run = Run(task, options, Path(run_dir), device)
    log_size = restore(run, run.newest) if options["resume"] else 0
    run.write_record()
    with contextlib.closing(run.open_log(log_size)) as run.log, contextlib.closing(run.open_board()) as run.board, \
            Interrupt() as run.interrupt:
        while run.epoch < options["epochs"]:
            run.train_epoch()
            run.finish_epoch()
            run.stop_if_interrupted()  # while it validated
    run.write_record()
    distributed.barrier()
    return run.run_dir / "model_best.pth.tar"


class Run:
    """The state of a training run, and how it moves on by one epoch."""

    def __init__(self, task, options, run_dir, device):
        self.task, self.options, self.run_dir, self.device = task, options, run_dir, device
        self.newest = run_dir / "checkpoint.pth.tar"
        self.steps_per_epoch = len(self._batches(0))
        _check_processes(task.count, options["batch_size"])
        self.stepper = Stepper(task, options, device)
        self.network = task.network
        self.epoch, self.step, self.sums, self.best, self.failures = 0, 0, {}, -math.inf, {}
        self.pace, self.saved = Pace(), time.monotonic()

    def _batches(self, epoch, start=0):
        return EpochBatches(self.task.count, self.options["batch_size"], self.options["seed"], epoch, start,
                            distributed.rank(), distributed.world())

    def train_epoch(self):
        """Go through the rest of the current epoch, from `self.step` on."""
        batches = self._batches(self.epoch, self.step)
        loader = training_loader(self.task.samples, batches, self.options["workers"], self.device)
        self.network.train()
        bar = progress(loader, f"{self.task.step} epoch {self.epoch + 1}/{self.options['epochs']}", unit="step")
        self.pace.start()
        for batch in bar:
            bounds = batches.bounds(self.step)
            self._note_failures(batch.pop("failures", ()))
            terms = self._step(batch, bounds)
            self.pace.count(bounds[2])
            self._log_step(terms, bar)
            self.stop_if_interrupted()
            self._save_in_time()

    def _step(self, batch, bounds):
        """One optimiser step; returns the loss, its terms and the gradient's norm as numbers."""
        number = self._global_step()
        done = number / (self.steps_per_epoch * self.options["epochs"])
        try:
            terms = self.stepper.step(batch, bounds, number, done)
        except NotFinite as error:
            names = [self.task.samples.dataset.ids[index] for index in batch["index"].tolist()]
            shown = ", ".join(name for part in distributed.gather(names) for name in part)
            raise UserError(f"{error}; its images: {shown}; lower --lr, or set --clip_grad") from None
        self.step += 1
        for name, value in terms.items():
            if name != "grad_norm":
                self.sums[name] = self.sums.get(name, 0.0) + value
        return terms

    def _log_step(self, terms, bar):
        rates = [group["lr"] for group in self.stepper.optimizer.param_groups]
        left = self.pace.seconds * (self.steps_per_epoch * self.options["epochs"] - self._global_step())
        memory = memory_gb(self.device)
        self.log.write(epoch=self.epoch, step=self._global_step(), lr=rates[0], lrs=rates,
                       images_per_second=round(self.pace.rate, 2), seconds_left=round(left), memory_gb=round(memory, 3),
                       **terms)
        numbers = " ".join(f"{name} {value:.4f}" for name, value in terms.items())
        lrs = " ".join(f"{rate:.1e}" for rate in sorted(set(rates)))
        bar.set_postfix_str(f"{numbers} | lr {lrs} | {self.pace.rate:.1f} img/s | {memory:.1f} GB | "
                            f"{duration(left)} left", refresh=False)
        for name, value in {**terms, "lr": rates[0], "images_per_second": self.pace.rate}.items():
            self.board.add_scalar(f"train/{name}", value, self._global_step())

    def finish_epoch(self):
        """Validate, log the epoch's means, and save."""
        means = {name: value / self.step for name, value in self.sums.items()}
        scores = {"score": -means["loss"]}
        if self.task.validate is not None:
            self.network.eval()
            # Whole images come in many sizes, and each would be compiled for anew.
            with torch.no_grad(), autocast(self.device, self.options["precision"]), _eager(self.options["compile"]):
                scores = self.task.validate(self.network)
        self.log.write(epoch=self.epoch, mean=means, validation=scores)
        for name, value in scores.items():
            self.board.add_scalar(f"validation/{name}", value, self._global_step())
        shown = "  ".join(f"{name} {value:.4f}" for name, value in {**means, **scores}.items())
        print(f"{self.task.step} epoch {self.epoch + 1}/{self.options['epochs']} | {shown}", file=sys.stderr)
        self.failures = distributed.merged(self.failures, self.task.samples.dataset.ids)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        improved = scores["score"] >= self.best
        self.best = max(self.best, scores["score"])
        if improved and distributed.is_main():
            save_checkpoint(self.run_dir / "model_best.pth.tar", self._contents())
        self.save()

    def _global_step(self):
        return self.epoch * self.steps_per_epoch + self.step

    def _contents(self):
        return {"step": self.task.step, "options": self.options, "epoch": self.epoch, **self.task.contents()}

    def save(self):
        """Write checkpoint.pth.tar, from which --resume goes on."""
        if distributed.is_main():
            save_checkpoint(self.newest, {**self._contents(), **state_of(self, self.log.size())})
        self.saved = time.monotonic()

    def _save_in_time(self):
        """Save if the last state on the disk is `save_every` minutes old (0: at the end of epochs only)."""
        minutes = self.options["save_every"]
        if minutes and time.monotonic() - self.saved >= 60 * minutes:
            self.save()

    def stop_if_interrupted(self):
        """After a signal to any of the processes: save, say how to go on, and raise Interrupted in all of them."""
        number = self.interrupt.seen()
        if not number:
            return
        self.save()
        print(f"\nSaved {self.newest} at epoch {self.epoch + 1}, step {self.step} of {self.steps_per_epoch}; the same "
              "command with --resume goes on from there.", file=sys.stderr)
        distributed.barrier()
        raise Interrupted(number)

    def _note_failures(self, texts):
        """Remember which images were passed over (--on_bad_image skip), and say so once of each."""
        for image_id, reason in {key: value for text in texts for key, value in json.loads(text).items()}.items():
            if image_id not in self.failures:
                print(f"Skipping {image_id}: {reason}", file=sys.stderr)
            self.failures[image_id] = reason

    def write_record(self):
        """options.json: how the run was made, and which images it passed over."""
        if distributed.is_main():
            write_json(self.run_dir / "options.json", {
                "step": self.task.step, "options": self.options, **environment(self.device),
                "processes": distributed.world(), "failures": self.failures})

    def open_log(self, size):
        return JsonLog(self.run_dir / "log.jsonl", size) if distributed.is_main() else NoLog()

    def open_board(self):
        wanted = self.options["tensorboard"] and distributed.is_main()
        return tensorboard(self.run_dir, self._global_step()) if wanted else NoBoard()


class Pace:
    """Images a second of the running epoch, and seconds a step."""

    def start(self):
        self.started, self.images, self.steps = time.time(), 0, 0

    def count(self, images):
        self.images, self.steps = self.images + images, self.steps + 1
        spent = time.time() - self.started
        self.rate, self.seconds = self.images / spent, spent / self.steps


def _check_processes(images, batch_size):
    """UserError if there are more processes than images in a step."""
    if min(images, batch_size) < distributed.world():
        raise UserError(f"{distributed.world()} processes cannot share steps of {min(images, batch_size)} images; "
                        "start fewer, or pass a larger --batch_size: it counts the images of all processes")


def _eager(compiled):
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
