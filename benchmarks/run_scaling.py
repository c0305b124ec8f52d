#!/usr/bin/env python3
"""The scaling run: our passes and dense attention's, in turns, on the GPUs of this host.

    benchmarks/run_scaling.py BUNDLE --gpus 1,2,4 --tokens 65536,131072,262144,524288,1048576
    benchmarks/run_scaling.py BUNDLE --gpus 1,4 --passes decode

BUNDLE is a folder with passes_cuda (for the pass decode decode_cuda; for --steps also
cuda_kernels_benchmark and communication_benchmark) and the libraries that they need and this host
lacks. For each number of GPUs (and shape of heads, and round) it runs ours at all lengths, then
dense/dense_attention.py, and writes one result file; README.md describes both. Start it with a
python3 that has torch. A run that fails or takes too long is noted, and the others go on; the file
is written after each.
"""

import argparse
import ctypes
import datetime
import glob
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import figures

HERE = Path(__file__).resolve().parent


def parse_arguments():
    def numbers(text):
        return [int(part) for part in text.split(",")]

    def shapes(text):
        return [tuple(map(int, part.split("x"))) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gpus", type=numbers, default=[1], help="e.g. 1,2,4")
    parser.add_argument("--tokens", type=numbers, default=[8192, 65536], help="ascending")
    parser.add_argument("--passes", type=lambda text: text.split(","), default=["forward"],
                        help="of forward, backward, step (both), decode")
    parser.add_argument("--cached", type=numbers, default=[16384, 65536, 262144, 1048576],
                        help="of decode, ascending")
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32], help="of decode")
    parser.add_argument("--dims", type=shapes, default=[(128, 128)], help="DkxDv, e.g. 128x128")
    parser.add_argument("--max_tokens_per_gpu", type=int, default=1 << 20, help="of ours")
    parser.add_argument("--dense_max_tokens_per_gpu", type=int, default=1 << 17)
    parser.add_argument("--rounds", type=int, default=1, help="of all runs")
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--steps", action="store_true", help="also stages and communication steps")
    parser.add_argument("--check", action="store_true", help="also compare with references")
    parser.add_argument("--time_limit", type=float, default=3600, help="of everything, seconds")
    parser.add_argument("--run_limit", type=float, default=300, help="of one run, seconds")
    parser.add_argument("--output", type=Path, help="default: results/DATE-PASSES-GPU.json")
    return parser.parse_args()


def nccl_folders():
    """Where torch's own NCCL lies, which is newer than most hosts'."""
    spec = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
    return [folder + "/lib" for folder in spec.submodule_search_locations] if spec else []


def nccl_version(folders):
    for path in [f for folder in folders for f in glob.glob(folder + "/libnccl.so.2")]:
        version = ctypes.c_int()
        if ctypes.CDLL(path).ncclGetVersion(ctypes.byref(version)) == 0:
            return f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100}"
    return "unknown"


def describe_host(bundle, folders):
    def nvidia_smi(field):
        query = subprocess.run(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"],
                               capture_output=True, text=True, timeout=60, check=True)
        return query.stdout.strip().splitlines()

    commit = os.environ.get("NSA_COMMIT")
    if not commit and (bundle / "COMMIT").exists():
        commit = (bundle / "COMMIT").read_text(encoding="utf-8").strip()
    names = nvidia_smi("name")
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": names[0],
        "gpus_of_host": len(names),
        "driver": nvidia_smi("driver_version")[0],
        "nccl": nccl_version(folders),
        "commit": commit or "unknown",
        "config": "bf16, l 32, d 16, l' 64, n 16, w 512, mean compression, k and v shared by the "
                  "branches, zig-zag; heads and dims stand in the results",
        "method": "device events, L2 flushed before each repetition, 3 calls before the timed "
                  "ones, the slowest rank of each repetition counts; steps of decoding are replays "
                  "of a CUDA graph",
        "environment": {name: value for name, value in sorted(os.environ.items())
                        if name.startswith("NCCL_") and name != "NCCL_VERSION"},
        "runs": [],
        "results": [],
        "skipped": [],
        "steps": [],
    }


def run(command, env, limit):
    """(stdout, stderr, what became of it) of a command that ends within `limit` seconds."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=limit)
        return out, err, "ok" if process.returncode == 0 else f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        for kill in (signal.SIGTERM, signal.SIGKILL):  # mpirun and torchrun end their ranks first
            try:
                os.killpg(process.pid, kill)
                out, err = process.communicate(timeout=10)
                break
            except (ProcessLookupError, subprocess.TimeoutExpired):
                out, err = "", ""
        return out, err, f"stopped after {limit:.0f} s"


def mpirun(gpus):
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(gpus)] if gpus > 1 else []


def decode_commands_of(args, gpus, dims):
    """As commands_of. On several GPUs sequences have one home, and then a home on each GPU. Dense
    attention decodes on one GPU, beside the first number of ours."""
    flags = [f"--dim_qk={dims[0]}", f"--dim_v={dims[1]}", f"--reps={args.reps}",
             "--cached=" + ",".join(map(str, args.cached)),
             "--batch=" + ",".join(map(str, args.batch))]
    cases = len(args.cached) * len(args.batch)
    ours = mpirun(gpus) + [str(args.bundle / "decode_cuda"), *flags]
    yield ours, cases
    if gpus > 1:
        yield ours + [f"--homes={gpus}"], cases
    if gpus == args.gpus[0]:
        yield [sys.executable, str(HERE / "dense/dense_attention.py"), "--pass=decode",
               *flags] + ["--check"] * args.check, cases


def commands_of(args, name, gpus, dims):
    """(command, results it should print) of each run of a pass on that many GPUs."""
    if name == "decode":
        yield from decode_commands_of(args, gpus, dims)
        return
    heads = [f"--dim_qk={dims[0]}", f"--dim_v={dims[1]}", f"--reps={args.reps}"]
    if name != "forward":
        heads.append(f"--pass={name}")
    ours = mpirun(gpus) + [str(args.bundle / "passes_cuda"), *heads]
    dense = [sys.executable]
    if gpus > 1:
        dense += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    dense += [str(HERE / "dense/dense_attention.py"), *heads] + ["--check"] * args.check
    if args.check and name == "forward":
        yield ours + ["--tokens=4096", "--check"], 1
    for command, limit in ((ours, args.max_tokens_per_gpu), (dense, args.dense_max_tokens_per_gpu)):
        lengths = [t for t in args.tokens if t <= limit * gpus]
        if lengths:
            yield command + ["--tokens=" + ",".join(map(str, lengths))], len(lengths)


class ScalingRun:
    """The result file, and the time that is left."""

    def __init__(self, args):
        self.args = args
        self.deadline = time.monotonic() + args.time_limit
        folders = [str(args.bundle), *nccl_folders()]
        folders += [f for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
        self.environment = dict(os.environ, LD_LIBRARY_PATH=":".join(folders))
        if os.geteuid() == 0:
            self.environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        self.file = describe_host(args.bundle, folders)
        gpu = self.file["gpu"].split()[-1].lower()
        self.output = args.output or HERE / f"results/{self.file['date']}-{'-'.join(args.passes)}-{gpu}.json"
        self.output.parent.mkdir(parents=True, exist_ok=True)

    def run(self, command, read):
        """Runs `command`; read(stdout) puts its figures into the file, or says what is missing."""
        shown = shlex.join(command).replace(f"{self.args.bundle}/", "").replace(
            f"{HERE}/", "benchmarks/").replace(sys.executable, "python3")
        start = time.monotonic()
        left = self.deadline - start
        out, err, end = "", "", "not started, out of time"
        if left > 5:
            out, err, end = run(command, self.environment, min(self.args.run_limit, left))
        missing = read(out)
        if end == "ok" and missing:
            end = missing
        self.file["runs"].append(
            {"command": shown, "end": end, "seconds": round(time.monotonic() - start, 1)})
        print(f"{end}: {shown}", flush=True)
        if end != "ok":
            print(err[-4000:], file=sys.stderr, flush=True)
        figures.add_dense_ratios(self.file["results"])
        self.output.write_text(json.dumps(self.file, indent=1) + "\n", encoding="utf-8")

    def measure(self, name, gpus, dims, number):
        for command, expected in commands_of(self.args, name, gpus, dims):
            def read(out, expected=expected):
                lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
                for line in lines:
                    if "skipped" in line:
                        self.file["skipped"].append(line)
                        continue
                    if self.args.rounds > 1:
                        line["round"] = number
                    if "cuda" in line:
                        self.file["cuda"] = line.pop("cuda")
                    self.file["results"].append(line)
                return "" if len(lines) == expected else f"{len(lines)} of {expected} results"
            self.run(command, read)

    def steps(self, gpus, program):
        def read(out):
            rows = json.loads(out)["benchmarks"] if out.endswith("}\n") else []
            for row in rows:
                figures_of_row = {name: round(row[name], 4) for name in (
                    "median_us", "min_us", "max_us", "TFLOP/s", "GB/s", "of_floor") if name in row}
                self.file["steps"].append({
                    "program": program, "gpus": gpus, "step": row["name"].split("/iterations:")[0],
                    **figures_of_row})
            return "" if rows and not any(row.get("error_occurred") for row in rows) else "errors"
        self.run(mpirun(gpus) + [str(self.args.bundle / program), "--benchmark_format=json"], read)


def main():
    args = parse_arguments()
    args.bundle = args.bundle.resolve()
    scaling = ScalingRun(args)
    if args.steps:
        scaling.steps(1, "cuda_kernels_benchmark")
        for gpus in args.gpus:
            if gpus > 1:
                scaling.steps(gpus, "communication_benchmark")
    for number in range(args.rounds):
        for dims in args.dims:
            for gpus in args.gpus:
                for name in args.passes:
                    scaling.measure(name, gpus, dims, number)
    for line in scaling.file["results"]:
        what = (f"{line['cached']:8} cached x {line['batch']:2} {line['median_us']:10.1f} us"
                if figures.pass_of(line) == "decode" else
                f"{line['tokens']:8} tokens {line['median_ms']:10.3f} ms")
        print(f"{line['implementation']:6} {figures.pass_of(line)} {line['gpus']} GPUs {what}",
              *(f"{name} {line[name]:.3f}" for name in ("dense_ratio", "exposed_communication")
                if name in line), flush=True)
    return 0 if all(one["end"] == "ok" for one in scaling.file["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
