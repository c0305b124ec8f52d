#!/usr/bin/env python3
"""Trains a byte-level transformer with context parallelism, then looks for needles with it.

    torchrun --nproc-per-node=4 train.py --attention nsa --text PATH... --output FOLDER

FOLDER gets checkpoint.pt (rewritten at the end of a run), from which a later run with the same
flags goes on, and result.json. README.md tells more.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

import nsa
import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from data import Batches, make_sequence, read_text, stack
from model import Model, ModelConfig


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--attention", choices=("nsa", "dense"), required=True)
    parser.add_argument("--text", nargs="+", required=True, help="files, or folders of files")
    parser.add_argument("--max_text_bytes", type=int, default=32 << 20)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder")
    parser.add_argument("--steps", type=int, default=2500, help="of the whole schedule")
    parser.add_argument("--seconds", type=float, default=480, help="this run stops training then")
    parser.add_argument("--curve_steps", type=int, default=25, help="of a point of the curve")
    parser.add_argument("--step_tokens", type=int, default=65536, help="of all ranks together")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768,65536")
    parser.add_argument("--shares", default="10,20,20,20,10,10,10", help="of steps, by length")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--summary_share",
        type=float,
        default=0.5,
        help="of all steps but the last 5%%: nsa attends to summaries only, see model.py",
    )
    parser.add_argument("--warmup_steps", type=int, default=50, help="of every run")
    parser.add_argument("--eval_lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--depths", type=int, default=11, help="of needles, evenly from 0 to 1")
    parser.add_argument("--samples", type=int, default=8, help="needles at each length and depth")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes that make batches")
    parser.add_argument("--seed", type=int, default=0)
    for field in dataclasses.fields(ModelConfig)[1:]:
        kind = json.loads if field.type is bool else field.type
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    return parser.parse_args()


def start_ranks(device):
    """The ranks that torchrun started, or one."""
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29504")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        dist.init_process_group("gloo")
    return nsa.Group.from_process_group()


def schedule(arguments):
    """The length of each step's sequences."""
    lengths = [int(length) for length in arguments.lengths.split(",")]
    shares = np.cumsum([float(share) for share in arguments.shares.split(",")])
    ends = np.rint(shares / shares[-1] * arguments.steps)
    return [lengths[np.searchsorted(ends, step, side="right")] for step in range(arguments.steps)]


@functools.cache
def make_plan(batch, length, ranks):
    ends = range(0, batch * length + 1, length)
    return nsa.Plan(num_ranks=ranks, sharding="zigzag_per_document", cu_seqlens=ends)


class Trainer:
    def __init__(self, arguments):
        self.arguments = arguments
        self.text, self.held_out = read_text(arguments.text, arguments.max_text_bytes)
        self.lengths = schedule(arguments)
        self.eval_lengths = [int(length) for length in arguments.eval_lengths.split(",")]
        # Not when training is over.
        for flag, text, lengths in (
            ("lengths", self.text, self.lengths),
            ("eval_lengths", self.held_out, self.eval_lengths),
        ):
            if len(text) <= max(lengths):
                sys.exit(f"--{flag}: has {max(lengths)}, must be less than the {len(text)} bytes")
        self.checkpoint = arguments.output / "checkpoint.pt"
        state = None
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.first = self.step = state["step"] if state else 0
        batches = Batches(
            self.text, self.lengths, arguments.step_tokens, self.first, arguments.seed
        )
        # Its processes start before there is anything of CUDA's in this one.
        self.batches = iter(
            torch.utils.data.DataLoader(batches, None, num_workers=arguments.workers)
        )
        self.group = start_ranks(arguments.device)
        self.device = torch.device(self.group.device)
        torch.manual_seed(arguments.seed)
        fields = [field.name for field in dataclasses.fields(ModelConfig)]
        self.config = ModelConfig(**{name: getattr(arguments, name) for name in fields})
        self.model = Model(self.config, self.group)
        if state:
            self.model.load_state_dict(state["model"])
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            arguments.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=self.device.type == "cuda",
        )
        # Gradients lie in one tensor, so that one all-reduce adds up those of all ranks.
        parameters = list(self.model.parameters())
        self.gradients = torch.zeros(
            sum(parameter.numel() for parameter in parameters), device=self.device
        )
        parts = self.gradients.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts):
            parameter.grad = part.view_as(parameter)

    def losses(self, sequences, answers, summaries_only=False):
        """Of a batch of data.stack: (nats of each of this rank's tokens, whether it was predicted,
        whether it is of an answer), all [B,T]."""
        sequences, answers = (
            part.to(self.device, non_blocking=True) for part in (sequences, answers)
        )
        plan = make_plan(*answers.shape, self.group.size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(sequences[:, :-1], plan=plan, summaries_only=summaries_only)
        targets = self.model.shard(sequences[:, 1:], plan).long()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        hits = logits.detach().argmax(-1) == targets
        return loss.view_as(targets), hits, self.model.shard(answers, plan)

    def train_step(self, sequences, answers):
        """Returns this rank's sums [3] of nats over all tokens, nats over answers, and answers'
        bytes that were predicted, each over their number."""
        arguments, tokens = self.arguments, answers.numel()
        since, ahead = self.step - self.first + 1, arguments.steps - self.step
        rate = min(1, since / arguments.warmup_steps, ahead / (0.3 * arguments.steps))
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate * arguments.learning_rate
        count = max(1, int(answers.sum()))
        share = arguments.summary_share if self.step < 0.95 * arguments.steps else 0
        # So many of each hundred steps, evenly.
        summaries_only = int((self.step + 1) * share) > int(self.step * share)
        loss, hits, mask = self.losses(sequences, answers, summaries_only)
        self.gradients.zero_()
        of_text, of_answers = loss.sum() / tokens, (loss * mask).sum() / count
        (of_text + of_answers).backward()
        dist.all_reduce(self.gradients)
        norm = self.gradients.norm()
        self.gradients.mul_((1 / norm).clamp(max=1))
        self.optimizer.step()
        self.step += 1
        return torch.stack([of_text, of_answers, (hits & mask).sum() / count]).detach()

    def train(self):
        """Until the schedule or the time is over. Returns (curve, stages) of the result file."""
        curve, stages, sums = [], [], []
        begin = time.monotonic()
        is_over = torch.zeros(1, device=self.device)
        while self.step < self.arguments.steps:
            length = self.lengths[self.step]
            if not stages or stages[-1]["length"] != length:
                self.finish_stage(stages)
                stages.append({"length": length, "first_step": self.step})
            # The first steps of a length make engines and find memory.
            if self.step - stages[-1]["first_step"] == 5:
                stages[-1]["begin"] = self.now()
            sums.append(self.train_step(*next(self.batches)))
            if len(sums) == self.arguments.curve_steps or self.step == self.arguments.steps:
                mean = torch.stack(sums).mean(0)
                sums.clear()
                dist.all_reduce(mean)
                nats, answer_nats, hits = mean.tolist()
                is_over.fill_(time.monotonic() - begin > self.arguments.seconds)
                dist.broadcast(is_over, 0)
                curve.append(
                    {
                        "step": self.step,
                        "tokens": self.step * self.arguments.step_tokens,
                        "length": length,
                        "bits_per_byte": nats / np.log(2),
                        "answer_nats": answer_nats,
                        "answer_accuracy": hits,
                        "seconds": time.monotonic() - begin,
                    }
                )
                if self.group.rank == 0:
                    print(json.dumps(round_figures(curve[-1])), flush=True)
                if is_over:
                    break
        self.finish_stage(stages)
        return curve, stages

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def finish_stage(self, stages):
        """Fills in the figures of the last stage."""
        if not stages:
            return
        stage = stages[-1]
        begin, steps = stage.pop("begin", None), self.step - stage.pop("first_step")
        stage["steps"] = steps
        if begin is not None and steps > 5:
            seconds = (self.now() - begin) / (steps - 5)
            stage["ms_per_step"] = seconds * 1e3
            stage["tokens_per_second"] = self.arguments.step_tokens / seconds
        if self.device.type == "cuda":
            stage["torch_peak_bytes"] = torch.cuda.max_memory_allocated()
            free, total = torch.cuda.mem_get_info()
            stage["device_bytes"] = total - free
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def save(self):
        """Weights only: Adam's moments start anew, with a warm-up."""
        if self.group.rank == 0:
            model = {name: value.cpu() for name, value in self.model.state_dict().items()}
            torch.save({"step": self.step, "model": model}, self.checkpoint)

    @torch.no_grad()
    def evaluate(self):
        """Held-out bits per byte by length, and of needles at each length (rows) and depth the
        share that is answered exactly."""
        arguments = self.arguments
        lengths = self.eval_lengths
        depths = np.linspace(0, 1, arguments.depths)
        bits, grid = [], []
        for length in lengths:
            rng = np.random.default_rng((arguments.seed, length, 1))
            batch = max(1, min(arguments.step_tokens // length, arguments.samples))
            nats, exact = torch.zeros(2, device=self.device), []
            for depth in depths:
                wrong = []
                for first in range(0, arguments.samples, batch):
                    count = min(batch, arguments.samples - first)
                    parts = [
                        make_sequence(rng, self.held_out, length, np.array([depth]))
                        for _ in range(count)
                    ]
                    loss, hits, mask = self.losses(*stack(parts))
                    nats += torch.stack([(loss * ~mask).sum(), (~mask).sum()])
                    wrong.append((mask & ~hits).sum(1))
                wrong = torch.cat(wrong)
                dist.all_reduce(wrong)
                exact.append((wrong == 0).float().mean().item())
            dist.all_reduce(nats)
            bits.append((nats[0] / nats[1] / np.log(2)).item())
            grid.append(exact)
            if self.group.rank == 0:
                print(f"needles at {length}:", *exact, f" held out: {bits[-1]:.3f} bits a byte")
        return {
            "held_out_bits_per_byte": dict(zip(map(str, lengths), bits)),
            "needles": {
                "lengths": lengths,
                "depths": depths.tolist(),
                "samples": arguments.samples,
                "exact": grid,
            },
        }

    def facts(self):
        """What was run, where."""
        cuda = self.device.type == "cuda"
        return {
            "date": datetime.date.today().isoformat(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "ranks": self.group.size,
            "driver": output_of(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ).partition("\n")[0],
            "torch": torch.__version__,
            "commit": commit(),
            "environment": {
                name: os.environ[name] for name in ("NCCL_NVLS_ENABLE",) if name in os.environ
            },
            "config": dataclasses.asdict(self.config),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "text_bytes": len(self.text),
            "held_out_bytes": len(self.held_out),
        }


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit():
    """As a file COMMIT beside this one says, else git."""
    folder = pathlib.Path(__file__).resolve().parent
    if (folder / "COMMIT").exists():
        return (folder / "COMMIT").read_text().strip()
    return output_of("git", "-C", str(folder), "rev-parse", "--short", "HEAD")


def round_figures(value):
    """Floats to five digits, in whatever holds them."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: round_figures(part) for key, part in value.items()}
    return [round_figures(part) for part in value] if isinstance(value, list) else value


def main():
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments)
    begin = time.monotonic()
    curve, stages = trainer.train()
    run = {
        "command": shlex.join(sys.argv),
        "first_step": trainer.first,
        "steps": trainer.step - trainer.first,
        "seconds": time.monotonic() - begin,
        "stages": stages,
    }
    trainer.save()
    result = arguments.output / "result.json"
    earlier = {"runs": [], "curve": []}
    if trainer.first and trainer.group.rank == 0:  # which alone writes it
        earlier = json.loads(result.read_text())

    def write(**more):
        if trainer.group.rank == 0:
            report = {
                **trainer.facts(),
                "runs": [*earlier["runs"], run],
                "curve": [*earlier["curve"], *curve],
                **more,
            }
            result.write_text(json.dumps(round_figures(report), indent=1) + "\n")

    write()  # in case the time ends in what follows
    write(**trainer.evaluate())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
