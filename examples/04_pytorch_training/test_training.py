"""A few steps on CPUs: one and two ranks have the same losses, sparse and dense; a run that was
stopped goes on where it was; results can be drawn. Skips where there is no torch."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("torch")
FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
FLAGS = (
    f"--text {FOLDER} {ROOT / 'nsa/python'} --device cpu --workers 0 --steps 6 --curve_steps 2 "
    "--warmup_steps 1 --step_tokens 512 --lengths 256,512 --shares 1,1 --eval_lengths 256 "
    "--depths 2 --samples 2 --num_layers 2 --hidden 32 --mlp 64 --num_q_heads 2 "
    "--num_selected_blocks 4 --window_tokens 32 --select_block_tokens 32"
).split()


def run(output, ranks, attention, *more):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if not os.environ.get("NSA_TEST_INSTALLED"):
        environment["PYTHONPATH"] = str(ROOT / "nsa/python")
        environment.setdefault("NSA_LIBRARY", str(ROOT / "bazel-bin/nsa/libnsa.so"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={ranks}", str(FOLDER / "train.py"), *FLAGS]
    command += ["--attention", attention, "--output", str(output), *more]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def train(output, ranks, attention, *more):
    """The result of a run."""
    done = run(output, ranks, attention, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((output / "result.json").read_text())


def losses(result):
    return [point["bits_per_byte"] for point in result["curve"]]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of (attention, ranks)."""
    folder = tmp_path_factory.mktemp("results")
    return {
        (attention, ranks): train(folder / f"{attention}-{ranks}", ranks, attention)
        for attention in ("nsa", "dense")
        for ranks in (1, 2)
    }


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_ranks_agree_and_learn(results, attention):
    one, two = results[attention, 1], results[attention, 2]
    assert losses(one) == pytest.approx(losses(two), abs=1e-3)
    assert one["held_out_bits_per_byte"]["256"] == pytest.approx(
        two["held_out_bits_per_byte"]["256"], abs=1e-3
    )
    assert losses(two)[-1] < losses(two)[0] - 0.1


def test_both_have_as_many_parameters(results):
    nsa, dense = (results[attention, 1]["parameters"] for attention in ("nsa", "dense"))
    assert nsa == pytest.approx(dense, rel=0.02)


def test_resumes(results, tmp_path):
    first = train(tmp_path, 2, "nsa", "--seconds", "0")
    assert [point["step"] for point in first["curve"]] == [2]
    assert (tmp_path / "checkpoint.pt").stat().st_size < 14 << 20
    result = train(tmp_path, 2, "nsa")
    assert [point["step"] for point in result["curve"]] == [2, 4, 6]
    assert [run["steps"] for run in result["runs"]] == [2, 4]
    whole = losses(results["nsa", 2])
    assert losses(result)[0] == whole[0]
    # AdamW has begun anew, so not quite the same.
    assert losses(result) == pytest.approx(whole, abs=0.3)


def test_too_little_text_is_said_at_once(tmp_path):
    for flag in ("--lengths", "--eval_lengths"):
        done = run(tmp_path, 1, "nsa", flag, f"256,{1 << 30}")
        assert done.returncode and f"{flag}: has {1 << 30}, must be less than" in done.stderr


def test_draws(results, tmp_path):
    pytest.importorskip("matplotlib")
    paths = []
    for attention in ("nsa", "dense"):
        paths.append(tmp_path / f"{attention}.json")
        paths[-1].write_text(json.dumps(results[attention, 2]))
    plot = [sys.executable, FOLDER / "plot.py", "--output", tmp_path / "plot", *paths]
    subprocess.run(plot, check=True, timeout=100)
    for name in ("loss", "needles"):
        assert (tmp_path / f"plot-{name}.png").stat().st_size > 10000
