"""The figures that are drawn from a result file."""

import copy
import json
import tempfile
import unittest

from benchmarks import figures

SHAPE = {"q_heads": 64, "kv_heads": 4, "dim_qk": 128, "dim_v": 128, "sharding": "zigzag"}


def result(implementation, gpus, tokens, median_ms, **fields):
    return {"implementation": implementation, "gpus": gpus, "tokens": tokens,
            "median_ms": median_ms, **SHAPE, **fields}


SAMPLE = {
    "date": "2026-01-01",
    "results": [
        result("nsa", 1, 1024, 8.0, flops=100.0),
        result("nsa", 1, 2048, 20.0, flops=300.0),
        result("dense", 1, 2048, 60.0),
        result("nsa", 2, 2048, 12.5, flops=300.0),
        result("nsa", 2, 4096, 30.0),
        result("nsa", 2, 2048, 1.0, flops=300.0, sharding="contiguous"),
        result("nsa", 2, 2048, 1.0, flops=300.0, dim_qk=192),
        result("nsa", 2, 2048, 1.0, flops=300.0, relative_l2_against_cpu=1e-3),
    ],
}
FIRST_SHAPE = (64, 4, 128, 128)


def decode(implementation, gpus, batch, cached, median_us, flush=True, homes=1):
    fields = {name: value for name, value in SHAPE.items() if name != "sharding"}
    return {"implementation": implementation, "pass": "decode", "gpus": gpus, "batch": batch,
            "cached": cached, "flush": flush, "homes": homes, "median_us": median_us, **fields}


class DecodeTest(unittest.TestCase):
    def setUp(self):
        self.results = [
            decode("nsa", 1, 1, 16384, 10.0), decode("nsa", 1, 1, 4096, 8.0),
            decode("nsa", 1, 8, 16384, 20.0), decode("nsa", 4, 1, 16384, 16.0),
            decode("nsa", 1, 1, 16384, 5.0, flush=False), decode("dense", 1, 1, 16384, 40.0),
            result("nsa", 1, 16384, 2.0), result("dense", 1, 16384, 3.0),
            decode("nsa", 4, 1, 16384, 10.0, homes=4)]
        figures.add_dense_ratios(self.results)

    def test_any_number_of_gpus_is_compared_with_dense_on_one(self):
        self.assertEqual([r.get("dense_ratio") for r in self.results],
                         [4.0, None, None, 2.5, None, None, 1.5, None, 4.0])

    def test_times_of_a_batch(self):
        ours = figures.select_decode(self.results, "nsa", FIRST_SHAPE)
        self.assertEqual(figures.decode_times(ours, 1, 1), [(4096, 8.0), (16384, 10.0)])
        self.assertEqual(figures.decode_times(ours, 1, 8), [(16384, 20.0)])
        self.assertEqual(figures.decode_ratios(ours, 1, 1), [(16384, 4.0)])
        self.assertEqual(figures.decode_ratios(ours, 4, 1), [(16384, 2.5)])

    def test_a_file_of_decoding_alone_has_its_shape(self):
        alone = [r for r in self.results if figures.pass_of(r) == "decode"]
        self.assertEqual((figures.shapes(alone), figures.passes(alone)),
                         ([FIRST_SHAPE], ["decode"]))


class FiguresTest(unittest.TestCase):
    def setUp(self):
        self.results = copy.deepcopy(SAMPLE["results"])
        self.ours = figures.select(self.results, "nsa", FIRST_SHAPE)
        self.dense = figures.select(self.results, "dense", FIRST_SHAPE)

    def test_reads_a_file(self):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(SAMPLE, file)
            file.flush()
            self.assertEqual(figures.load(file.name), SAMPLE)

    def test_other_shapes_shardings_and_checks_are_kept_apart(self):
        self.assertEqual(figures.shapes(self.results), [FIRST_SHAPE, (64, 4, 192, 128)])
        self.assertEqual(figures.times(self.ours, 2), [(2048, 12.5), (4096, 30.0)])

    def test_lines_without_an_implementation_are_ours(self):
        for one in self.results:
            if one["implementation"] == "nsa":
                del one["implementation"]
        self.assertEqual(figures.times(figures.select(self.results, "nsa", FIRST_SHAPE), 1),
                         [(1024, 8.0), (2048, 20.0)])

    def test_dense_ratios(self):
        self.assertEqual(figures.dense_ratios(self.ours, self.dense, 1), [(2048, 3.0)])
        figures.add_dense_ratios(self.results)
        self.assertEqual([r.get("dense_ratio") for r in self.results],
                         [None, 3.0] + [None] * 6)

    def test_strong_efficiency(self):
        self.assertEqual(figures.strong_efficiency(self.ours, 2048), [(1, 1.0), (2, 0.8)])
        self.assertEqual(figures.strong_efficiency(self.ours, 4096), [])

    def test_weak_efficiency_compares_rates(self):
        (one, first), (two, second) = figures.weak_efficiency(self.ours, 1024)
        self.assertEqual((one, first, two), (1, 1.0, 2))
        # 300 / (2 * 12.5) against 100 / 8 a GPU.
        self.assertAlmostEqual(second, 0.96)
        # On two GPUs at 2048 a GPU nobody counted the FLOPs.
        self.assertEqual(figures.weak_efficiency(self.ours, 2048), [(1, 1.0)])


if __name__ == "__main__":
    unittest.main()
