#!/usr/bin/env python3
"""Draws a result file of the scaling run, as SVG and PNG beside it (or in --output).

    benchmarks/plot.py benchmarks/results/FILE.json [--output FOLDER]

FILE-time: milliseconds against length, ours and dense, and how many times faster ours is.
FILE-efficiency: against GPUs, strong (same length) and weak (same length a GPU, by rate).
FILE-stages: milliseconds by stage, for each length and number of GPUs.
FILE-decode-time: microseconds of a step of decoding against cached tokens, for each batch.
Of another pass than the forward PASS stands before time, efficiency and stages. For the first shape
of heads in the file. Needs matplotlib (Debian: python3-matplotlib).
"""

import argparse
from functools import partial
from pathlib import Path

import figures
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # pylint: disable=wrong-import-position

# Colours that colour-blind readers can tell apart (Okabe and Ito).
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000"]
STYLE = {"figure.dpi": 150, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "svg.hashsalt": "nsa",
         "axes.prop_cycle": pyplot.cycler(color=COLORS)}


def tokens_name(tokens):
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)


def gpus_name(gpus):
    return f"{gpus} GPU" + "s" * (gpus > 1)


def show_lengths(axis, lengths):
    axis.set_xscale("log", base=2)
    ticks = sorted(t for t in lengths if t % 1024 == 0)
    axis.set_xticks(ticks, map(tokens_name, ticks))
    axis.minorticks_off()
    axis.set_xlabel("tokens")


def add_legend(axis):
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    else:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")


def draw_time(ours, dense, name):
    figure, (time, ratio) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained",
                                            sharex=True)
    for color, gpus in zip(COLORS, sorted({p for p, _ in ours})):
        time.plot(*zip(*figures.times(ours, gpus)), "o-", color=color, label=gpus_name(gpus))
        if any(p == gpus for p, _ in dense):
            time.plot(*zip(*figures.times(dense, gpus)), "s--", color=color, alpha=0.6,
                      label=f"{gpus_name(gpus)}, dense cuDNN")
        ratios = figures.dense_ratios(ours, dense, gpus)
        if ratios:
            ratio.plot(*zip(*ratios), "o-", color=color, label=gpus_name(gpus))
    lengths = {tokens for _, tokens in ours}
    time.set_yscale("log")
    time.set_ylabel(f"{name}, ms")
    ratio.set_ylabel("times faster than dense")
    ratio.axhline(1, color="black", linewidth=0.8)
    for axis in (time, ratio):
        show_lengths(axis, lengths)
        add_legend(axis)
    return figure


def draw_decode(ours, dense):
    figure, (time, ratio, legend) = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained",
                                                    width_ratios=(4, 4, 2))
    markers = dict(zip(sorted({gpus for gpus, _, _ in ours}), "o^Dv"))
    for color, batch in zip(COLORS, sorted({batch for _, batch, _ in ours})):
        for gpus, marker in markers.items():
            style = {"marker": marker, "color": color, "label": f"batch {batch}, {gpus_name(gpus)}"}
            for axis, points in ((time, figures.decode_times(ours, gpus, batch)),
                                 (ratio, figures.decode_ratios(ours, gpus, batch))):
                if points:
                    axis.plot(*zip(*points), **style)
        points = figures.decode_times(dense, 1, batch)
        if points:
            time.plot(*zip(*points), "s--", color=color, alpha=0.6,
                      label=f"batch {batch}, 1 GPU, dense cuDNN")
    time.set_yscale("log")
    time.set_ylabel("a step, microseconds")
    ratio.set_yscale("log")
    ratio.set_ylabel("times faster than dense on one GPU")
    ratio.axhline(1, color="black", linewidth=0.8)
    for axis in (time, ratio):
        show_lengths(axis, {cached for _, _, cached in ours})
        axis.set_xlabel("cached tokens")
    legend.axis("off")
    legend.legend(*time.get_legend_handles_labels(), loc="center")
    return figure


def draw_efficiency(ours):
    counts = sorted({gpus for gpus, _ in ours})
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, efficiency, name in ((axes[0], figures.strong_efficiency, "{}"),
                                   (axes[1], figures.weak_efficiency, "{} a GPU")):
        for tokens in sorted({tokens for gpus, tokens in ours if gpus == 1}):
            points = efficiency(ours, tokens)
            if len(points) > 1:
                axis.plot(*zip(*points), "o-", label=name.format(tokens_name(tokens)))
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(counts)
        axis.set_xlabel("GPUs")
        axis.set_ylim(0, 1.1)
        add_legend(axis)
    axes[0].set_ylabel("efficiency")
    axes[0].set_title("strong: the same length")
    axes[1].set_title("weak: FLOP/s of a GPU, the same length a GPU")
    return figure


def draw_stages(ours):
    rows = [(place, r["stages_ms"]) for place, r in sorted(ours.items()) if r.get("stages_ms")]
    figure, axis = pyplot.subplots(figsize=(10, 1 + 0.35 * max(len(rows), 3)),
                                   layout="constrained")
    names = [f"{gpus_name(gpus)}, {tokens_name(tokens)}" for (gpus, tokens), _ in rows]
    stages = list(dict.fromkeys(stage for _, times in rows for stage in times))
    left = [0.0] * len(rows)
    totals = [sum(times.values()) for _, times in rows]
    for i, stage in enumerate(stages):
        shares = [times.get(stage, 0) / total for (_, times), total in zip(rows, totals)]
        axis.barh(names, shares, left=left, label=stage, color=COLORS[i % len(COLORS)],
                  hatch="//" if i >= len(COLORS) else None, edgecolor="white")
        left = [a + b for a, b in zip(left, shares)]
    for name, total in zip(names, totals):
        axis.text(1.01, name, f"{total:.3g} ms", va="center")
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the stages' time")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    if rows:
        axis.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, help="folder; that of the file if not said")
    args = parser.parse_args()
    file = figures.load(args.file)
    shape = figures.shapes(file["results"])[0]
    folder = args.output or args.file.parent
    pyplot.rcParams.update(STYLE)
    for name in figures.passes(file["results"]):
        select = figures.select_decode if name == "decode" else partial(figures.select, name=name)
        ours, dense = (select(file["results"], of, shape) for of in ("nsa", "dense"))
        prefix = args.file.stem + ("" if name == "forward" else f"-{name}")
        if name == "decode":
            plots = {"time": draw_decode(ours, dense)}
        else:
            plots = {"time": draw_time(ours, dense, name), "efficiency": draw_efficiency(ours)}
        if name in ("forward", "backward"):  # a step's stages are those of its backward
            plots["stages"] = draw_stages(ours)
        for plot, figure in plots.items():
            figure.suptitle(f"NSA {name}, {file['gpu']}, {file['date']}")
            for suffix in ("svg", "png"):
                path = folder / f"{prefix}-{plot}.{suffix}"
                figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None)
                print(path)


if __name__ == "__main__":
    main()
