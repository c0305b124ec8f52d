"""The scaling run with programs that only pretend."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from pathlib import Path

NVIDIA_SMI = """#!/bin/sh
case "$1" in *driver*) echo 1.2.3 ;; *) echo "NVIDIA Pretended" ;; esac
"""
RESULT = json.dumps({"implementation": "nsa", "gpus": 1, "tokens": 1024, "q_heads": 64,
                     "kv_heads": 4, "dim_qk": 128, "dim_v": 128, "sharding": "zigzag",
                     "cuda": "13.0", "median_ms": 2.0})
DECODED = json.dumps({"implementation": "nsa", "pass": "decode", "gpus": 2, "q_heads": 64,
                      "kv_heads": 4, "dim_qk": 128, "dim_v": 128, "cached": 1024, "batch": 1,
                      "flush": True, "median_us": 20.0})
SKIPPED = json.dumps({"implementation": "nsa", "pass": "decode", "cached": 4096, "batch": 1,
                      "skipped": "no room"})
STEPS = json.dumps({"context": {"host_name": "secret"}, "benchmarks": [
    {"name": "pack/tokens:8192/iterations:10/manual_time", "median_us": 3.0, "cpu_time": 9.0}]})


class RunScalingTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.bundle = Path(folder.name)
        self.add_program("nvidia-smi", NVIDIA_SMI)

    def add_program(self, name, text):
        (self.bundle / name).write_text(text, encoding="utf-8")
        (self.bundle / name).chmod(0o755)

    def scaling_run(self, *arguments):
        """(exit status, result file)"""
        output = self.bundle / "result.json"
        done = subprocess.run(
            [sys.executable, "benchmarks/run_scaling.py", self.bundle, "--tokens=1024",
             "--dense_max_tokens_per_gpu=0", f"--output={output}", *arguments],
            env={**os.environ, "PATH": f"{self.bundle}:{os.environ['PATH']}", "NSA_COMMIT": "abc"},
            check=False, timeout=60)
        return done.returncode, json.loads(output.read_text(encoding="utf-8"))

    def test_writes_what_the_runs_print(self):
        self.add_program("passes_cuda", f"#!/bin/sh\necho '{RESULT}'\n")
        self.add_program("cuda_kernels_benchmark", f"#!/bin/sh\necho '{STEPS}'\n")
        status, file = self.scaling_run("--steps")
        self.assertEqual(status, 0)
        self.assertEqual(
            [file[name] for name in ("gpu", "gpus_of_host", "driver", "cuda", "commit")],
            ["NVIDIA Pretended", 1, "1.2.3", "13.0", "abc"])
        self.assertEqual([r["median_ms"] for r in file["results"]], [2.0])
        self.assertEqual(file["steps"], [{"program": "cuda_kernels_benchmark", "gpus": 1,
                                          "step": "pack/tokens:8192", "median_us": 3.0}])
        self.assertEqual([one["command"] for one in file["runs"]],
                         ["cuda_kernels_benchmark --benchmark_format=json",
                          "passes_cuda --dim_qk=128 --dim_v=128 --reps=10 --tokens=1024"])

    def test_decoding(self):
        self.add_program(
            "mpirun",
            "#!/bin/sh\nhomes=1\n"
            "for argument; do case $argument in --homes=*) homes=${argument#*=};; esac; done\n"
            f"""echo '{{"homes": '$homes', {DECODED[1:]}'\necho '{SKIPPED}'\n""")
        # Dense attention imports this as torch, and comes no further.
        (self.bundle / "torch.py").write_text(
            "import json\n"
            f"print(json.dumps({{**json.loads('{DECODED}'), 'implementation': 'dense',"
            " 'gpus': 1, 'median_us': 50.0}))\n"
            f"print('{SKIPPED}')\n"
            "raise SystemExit(0)\n", encoding="utf-8")
        with unittest.mock.patch.dict(os.environ, PYTHONPATH=str(self.bundle)):
            status, file = self.scaling_run("--passes=decode", "--gpus=2,4", "--cached=1024,4096",
                                            "--batch=1")
        self.assertEqual(status, 0)
        arguments = "--dim_qk=128 --dim_v=128 --reps=10 --cached=1024,4096 --batch=1"
        ours = "mpirun --oversubscribe --bind-to none -n {} decode_cuda " + arguments
        self.assertEqual(
            [one["command"] for one in file["runs"]],
            [ours.format(2), ours.format(2) + " --homes=2",
             "python3 benchmarks/dense/dense_attention.py --pass=decode " + arguments,
             ours.format(4), ours.format(4) + " --homes=4"])
        self.assertEqual([(r["implementation"], r.get("dense_ratio")) for r in file["results"]],
                         [("nsa", 2.5), ("nsa", 2.5), ("dense", None), ("nsa", 2.5), ("nsa", 2.5)])
        self.assertEqual(len(file["skipped"]), 5)

    def test_a_run_that_hangs_is_stopped_and_its_results_kept(self):
        self.add_program("passes_cuda", f"#!/bin/sh\necho '{RESULT}'\nsleep 1000\n")
        status, file = self.scaling_run("--run_limit=1")
        self.assertEqual(status, 1)
        self.assertEqual([one["end"] for one in file["runs"]], ["stopped after 1 s"])
        self.assertEqual(len(file["results"]), 1)

    def test_failures_are_noted(self):
        self.add_program("passes_cuda", "#!/bin/sh\nexit 3\n")
        self.assertEqual([one["end"] for one in self.scaling_run()[1]["runs"]], ["exit 3"])
        self.add_program("passes_cuda", "#!/bin/sh\n")
        status, file = self.scaling_run()
        self.assertEqual((status, [one["end"] for one in file["runs"]]), (1, ["0 of 1 results"]))

    def test_out_of_time(self):
        self.add_program("passes_cuda", f"#!/bin/sh\necho '{RESULT}'\n")
        self.assertEqual([one["end"] for one in self.scaling_run("--time_limit=1")[1]["runs"]],
                         ["not started, out of time"])


if __name__ == "__main__":
    unittest.main()
