"""Real text with a retrieval task in it, as bytes.

Somewhere in the text stand lines such as "The number of qzrt is 48213."; the last lines of a
sequence say them again, in another order. What follows "is" there can be known only from before.
"""

import pathlib
import re

import numpy as np
import torch

SUFFIXES = {".c", ".cc", ".cuh", ".h", ".md", ".py", ".pyi", ".rst", ".txt"}
_RUN = re.compile(rb"([^\w])\1{2,}")
_LINE = "\nThe number of {} is {:05d}."
_LINE_BYTES = len(_LINE.format("aaaa", 0))
_ANSWER = slice(_LINE_BYTES - 6, _LINE_BYTES - 1)  # of a line


def read_text(paths: list[str], max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the files, or files under the folders, at `paths`: text to train on, and of each twentieth
    file, which is held out. [bytes] uint8, `max_bytes` read at most. Runs of a byte that is no
    letter or digit, such as indentation, are cut to two: a block that is nothing else has a summary
    larger than all others, and is selected again and again.
    """
    files = (
        file
        for path in map(pathlib.Path, paths)
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file() and (file == path or file.suffix in SUFFIXES)
    )
    parts, size = ([], []), 0
    for i, file in enumerate(files):
        if size >= max_bytes:
            break
        text = file.read_bytes()
        parts[i % 20 == 19].append(_RUN.sub(rb"\1\1", text))
        size += len(text)
    return tuple(np.frombuffer(b"\n".join(part), np.uint8) for part in parts)


def make_sequence(rng, text: np.ndarray, length: int, depths: np.ndarray):
    """A sequence with a line at each of `depths` (ascending, 0 to 1: the first byte to the last
    question) and as many questions.

    Returns:
        bytes [length+1] uint8, of which the model sees all but the last; and whether the byte after
        each is one of an answer, [length] bool.
    """
    count = len(depths)
    start = rng.integers(len(text) - length)
    sequence = text[start : start + length + 1].copy()
    answers = np.zeros(length + 1, bool)
    lines = []
    for _ in range(count):
        key = "".join(map(chr, rng.integers(97, 123, 4)))
        line = _LINE.format(key, rng.integers(100000))
        lines.append(np.frombuffer(line.encode(), np.uint8))
    body = length + 1 - count * _LINE_BYTES
    places = np.rint(depths * (body - count * _LINE_BYTES)).astype(int)
    for i, (line, place) in enumerate(zip(lines, places)):
        place += i * _LINE_BYTES
        sequence[place : place + _LINE_BYTES] = line
    for i, line in enumerate(rng.permutation(count)):
        place = body + i * _LINE_BYTES
        sequence[place : place + _LINE_BYTES] = lines[line]
        answers[place : place + _LINE_BYTES][_ANSWER] = True
    return sequence, answers[1:]


def stack(sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [B,length+1] and answers [B,length]."""
    parts = [torch.from_numpy(np.stack(part)) for part in zip(*sequences)]
    return parts[0], parts[1]


class Batches(torch.utils.data.IterableDataset):
    """Of each step from `first` on: (bytes, answers) of stack(). The same whatever the number of
    workers, and on every rank."""

    def __init__(self, text, length_of_step: list[int], step_tokens: int, first: int, seed: int):
        self.text, self.lengths, self.step_tokens = text, length_of_step, step_tokens
        self.first, self.seed = first, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        start, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first + start, len(self.lengths), stride):
            rng = np.random.default_rng((self.seed, step))
            length = self.lengths[step]
            most = np.log2(min(16, length / 256))
            yield stack(
                make_sequence(
                    rng, self.text, length, np.sort(rng.random(int(2 ** rng.uniform(0, most))))
                )
                for _ in range(self.step_tokens // length)
            )
