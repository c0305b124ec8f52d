"""Result files of the scaling run (benchmarks/README.md), and the figures that follow from them."""

import json
from pathlib import Path

SHAPE = ("q_heads", "kv_heads", "dim_qk", "dim_v")


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def shape_of(result):
    return tuple(result[field] for field in SHAPE)


def pass_of(result):
    return result.get("pass", "forward")


def passes(results):
    """Those that were measured, in order of appearance."""
    return list(dict.fromkeys(map(pass_of, results)))


def shapes(results):
    """Those of the zig-zag runs and of decoding, in order of appearance."""
    return list(dict.fromkeys(shape_of(r) for r in results
                              if pass_of(r) == "decode" or r["sharding"] == "zigzag"))


def select(results, implementation, shape, name="forward"):
    """{(gpus, tokens): result} of a pass; of several of the same the last. Zig-zag alone, and no
    checks."""
    return {(r["gpus"], r["tokens"]): r for r in results
            if r.get("implementation", "nsa") == implementation and shape_of(r) == shape
            and pass_of(r) == name and r["sharding"] == "zigzag"
            and "relative_l2_against_cpu" not in r}


def select_decode(results, implementation, shape, flush=True, homes=1):
    """{(gpus, batch, cached): result}; of several of the same the last."""
    return {(r["gpus"], r["batch"], r["cached"]): r for r in results
            if r["implementation"] == implementation and pass_of(r) == "decode"
            and shape_of(r) == shape and r["flush"] == flush and r.get("homes", 1) == homes}


def add_dense_ratios(results):
    """Sets dense_ratio, the dense time over ours, where both were measured."""
    for ours, dense in with_dense(results):
        if dense:
            time = "median_us" if "median_us" in ours else "median_ms"
            ours["dense_ratio"] = round(dense[time] / ours[time], 4)


def with_dense(results):
    """(result of ours, what it is compared with or None). Dense decoding runs on one GPU."""
    for shape in shapes(results):
        for name in passes(results):
            if name == "decode":
                for flush in (True, False):
                    dense = select_decode(results, "dense", shape, flush)
                    for homes in sorted({r.get("homes", 1) for r in results}):
                        ours = select_decode(results, "nsa", shape, flush, homes)
                        for (_, *case), result in ours.items():
                            yield result, dense.get((1, *case))
            else:
                dense = select(results, "dense", shape, name)
                for place, ours in select(results, "nsa", shape, name).items():
                    yield ours, dense.get(place)


def decode_times(of_case, gpus, batch):
    """[(cached, median us)], ascending."""
    return sorted((cached, r["median_us"]) for (p, b, cached), r in of_case.items()
                  if (p, b) == (gpus, batch))


def decode_ratios(of_case, gpus, batch):
    """[(cached, dense time / our time)], ascending."""
    return sorted((cached, r["dense_ratio"]) for (p, b, cached), r in of_case.items()
                  if (p, b) == (gpus, batch) and "dense_ratio" in r)


def times(of_place, gpus):
    """[(tokens, median ms)], ascending."""
    return sorted((tokens, r["median_ms"]) for (p, tokens), r in of_place.items() if p == gpus)


def dense_ratios(ours, dense, gpus):
    """[(tokens, dense time / our time)], ascending."""
    return sorted((tokens, dense[p, tokens]["median_ms"] / r["median_ms"])
                  for (p, tokens), r in ours.items() if p == gpus and (p, tokens) in dense)


def strong_efficiency(of_place, tokens):
    """[(gpus, time of one / (gpus * time))] for one length, ascending; needs the time of one."""
    one = of_place.get((1, tokens))
    return sorted((gpus, one["median_ms"] / (gpus * r["median_ms"]))
                  for (gpus, s), r in of_place.items() if s == tokens) if one else []


def weak_efficiency(of_place, tokens_per_gpu):
    """[(gpus, FLOP/s of a GPU over those of one GPU alone)], ascending, each at tokens_per_gpu.

    Attention's work grows faster than its tokens, so equal times are not to be expected: what
    should stay the same is the rate at which each GPU works.
    """
    def rate(result):
        return result["flops"] / (result["gpus"] * result["median_ms"])

    one = of_place.get((1, tokens_per_gpu))
    if not one or "flops" not in one:
        return []
    return sorted((gpus, rate(r) / rate(one)) for (gpus, tokens), r in of_place.items()
                  if tokens == gpus * tokens_per_gpu and "flops" in r)
