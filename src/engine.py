"""The one training loop of all stages: schedule, logging, validation, checkpoints, and resuming to the same result."""
import contextlib
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.artifacts import write_json
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.loader import EpochBatches, training_loader
from utils.log import JsonLog, environment, progress

POLY_POWER = 0.9


@dataclass
class Task:
    """What one stage trains.

    step: "stage1", "stage2" or "deeplab".  network: the module that learns.
    loss: function (network, batch on the device) -> (scalar loss, {term: number}).
    samples: addressed by (epoch, index).  count: how many there are.
    validate: function (network) -> {"score": higher is better, ...}, or None.
    contents: function () -> what a checkpoint holds besides the loop's own state: networks, classes.
    """
    step: str
    network: torch.nn.Module
    loss: object
    samples: object
    count: int
    validate: object
    contents: object


def train(task, options, run_dir, device):
    """Train a task and return the path of its model_best.pth.tar.

    options: the resolved flags, a dict.  Writes options.json, log.jsonl, checkpoint.pth.tar after every epoch (and when
    interrupted, after the running step) and model_best.pth.tar after the epoch with the best validation score; of
    equal epochs the later wins.  KeyboardInterrupt is raised once the state is saved.
    """
    run_dir = Path(run_dir)
    run = Run(task, options, run_dir, device)
    if options["resume"]:
        run.restore()
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "options.json", {"step": task.step, "options": options, **environment(device)})
    with contextlib.closing(JsonLog(run_dir / "log.jsonl", append=options["resume"])) as log, \
            contextlib.closing(_tensorboard(options, run_dir)) as board, _Interrupt() as interrupt:
        while run.epoch < options["epochs"]:
            run.train_epoch(log, board, interrupt)
            run.finish_epoch(log, board)
            if interrupt.seen:  # while it validated
                run._save_and_stop()
    return run_dir / "model_best.pth.tar"


class Run:
    """The state of a training run, and how it moves on by one epoch."""

    def __init__(self, task, options, run_dir, device):
        self.task, self.options, self.run_dir, self.device = task, options, run_dir, device
        self.network = task.network.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(parameter_groups(self.network, options), lr=options["lr"],
                                         momentum=options["momentum"])
        self.steps_per_epoch = len(EpochBatches(task.count, options["batch_size"], options["seed"], 0))
        self.epoch, self.step, self.sums, self.best = 0, 0, {}, -math.inf

    def train_epoch(self, log, board, interrupt):
        """Go through the rest of the current epoch, from `self.step` on."""
        batches = EpochBatches(self.task.count, self.options["batch_size"], self.options["seed"], self.epoch, self.step)
        loader = training_loader(self.task.samples, batches, self.options["workers"], self.device)
        self.network.train()
        bar = progress(loader, f"{self.task.step} epoch {self.epoch + 1}/{self.options['epochs']}", unit="step")
        started, images = time.time(), 0
        for batch in bar:
            terms = self._step(batch)
            images += len(batch["image"])
            rate = images / (time.time() - started)
            bar.set_postfix_str(f"loss {terms['loss']:.4f} img/s {rate:.1f}", refresh=False)
            line = {"epoch": self.epoch, "step": self._global_step(), "lr": self.optimizer.param_groups[0]["lr"],
                    "images_per_second": round(rate, 2), **terms}
            log.write(**line)
            for name, value in terms.items():
                board.add_scalar(f"train/{name}", value, line["step"])
            if interrupt.seen:
                bar.close()
                self._save_and_stop()

    def _step(self, batch):
        """One optimiser step; returns the loss and its terms as numbers."""
        progress_made = self._global_step() / (self.steps_per_epoch * self.options["epochs"])
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - progress_made) ** POLY_POWER
        # Dropout draws depend on (seed, step) alone, so that a resumed run draws the same.
        torch.manual_seed(self.options["seed"] * 1_000_003 + self._global_step())
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.options["precision"]):
            loss, terms = self.task.loss(self.network, batch)
        terms = {"loss": loss.item(), **terms}
        if not math.isfinite(terms["loss"]):
            raise UserError(f"the loss is not finite at step {self._global_step()} ({terms}); lower --lr")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        return terms

    def finish_epoch(self, log, board):
        """Validate, log the epoch's means, and save."""
        means = {name: value / self.step for name, value in self.sums.items()}
        scores = {"score": -means["loss"]}
        if self.task.validate is not None:
            self.network.eval()
            with torch.no_grad(), autocast(self.device, self.options["precision"]):
                scores = self.task.validate(self.network)
        log.write(epoch=self.epoch, mean=means, validation=scores)
        for name, value in scores.items():
            board.add_scalar(f"validation/{name}", value, self._global_step())
        shown = "  ".join(f"{name} {value:.4f}" for name, value in {**means, **scores}.items())
        print(f"{self.task.step} epoch {self.epoch + 1}/{self.options['epochs']} | {shown}", file=sys.stderr)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        improved = scores["score"] >= self.best
        self.best = max(self.best, scores["score"])
        if improved:
            save_checkpoint(self.run_dir / "model_best.pth.tar", self._contents())
        self._save()

    def _global_step(self):
        return self.epoch * self.steps_per_epoch + self.step

    def _contents(self):
        return {"step": self.task.step, "options": self.options, "epoch": self.epoch, **self.task.contents()}

    def _save(self):
        save_checkpoint(self.run_dir / "checkpoint.pth.tar", {
            **self._contents(), "optimizer": self.optimizer.state_dict(), "step_in_epoch": self.step,
            "sums": self.sums, "best": self.best})

    def _save_and_stop(self):
        self._save()
        print(f"Saved {self.run_dir / 'checkpoint.pth.tar'} at epoch {self.epoch + 1}, step {self.step} of "
              f"{self.steps_per_epoch}; the same command with --resume goes on from there.", file=sys.stderr)
        raise KeyboardInterrupt

    def restore(self):
        """Take up the state of checkpoint.pth.tar; UserError if it was made with other options."""
        path = self.run_dir / "checkpoint.pth.tar"
        payload = load_checkpoint(path, steps=(self.task.step,))
        changed = [f"{name} was {_show(payload['options'].get(name))}, is {_show(value)}"
                   for name, value in self.options.items()
                   if name not in RESUME_FREE and payload["options"].get(name) != value]
        if changed:
            raise UserError(f"--resume: {path} was made with other options ({'; '.join(changed)}); pass the same ones, "
                            "or leave --resume out to start anew")
        name = next(iter(payload["networks"]))
        self.network.load_state_dict(payload["networks"][name]["state"])
        self.optimizer.load_state_dict(payload["optimizer"])
        self.epoch, self.step = payload["epoch"], payload["step_in_epoch"]
        self.sums, self.best = payload["sums"], payload["best"]
        print(f"Resuming {path} at epoch {self.epoch + 1}, step {self.step}", file=sys.stderr)


# Options that may differ between the parts of one run: they do not change what is computed.
RESUME_FREE = ("resume", "workers", "device", "dry_run", "tensorboard", "download", "output_dir", "data_root",
               "cam_dir", "mask_dir")


def _show(value):
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def parameter_groups(network, options):
    """Every parameter that learns, in exactly one of four groups: trunk or head, decayed weights or the rest.

    Heads learn `head_lr` times as fast; biases and batch normalisation are not decayed.
    """
    groups = []
    for is_head in (False, True):
        for decayed in (True, False):
            chosen = [p for name, p in network.named_parameters() if p.requires_grad
                      and name.startswith("trunk.") != is_head and (p.ndim > 1) == decayed]
            lr = options["lr"] * (options["head_lr"] if is_head else 1)
            groups.append({"params": chosen, "lr": lr, "initial_lr": lr,
                           "weight_decay": options["weight_decay"] if decayed else 0.0})
    return [group for group in groups if group["params"]]


def autocast(device, precision):
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class _Interrupt:
    """Remembers SIGINT and SIGTERM, so that the running step is finished and the state saved; a second one kills."""

    def __enter__(self):
        self.seen, self.process = False, os.getpid()
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        if os.getpid() != self.process:  # a data worker, forked with this handler; Ctrl-C reaches it too
            return
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        print("\nInterrupted: finishing this step, then saving.", file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class _NoBoard:
    def add_scalar(self, *_):
        pass

    def close(self):
        pass


def _tensorboard(options, run_dir):
    if not options["tensorboard"]:
        return _NoBoard()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package; run: pip install tensorboard") from None
    return SummaryWriter(str(run_dir))
