#!/usr/bin/env python3
"""Draws result files of train.py, side by side, as PNG.

    plot.py --output NAME RESULT.json...

NAME-needles.png: of needles at each length and depth, how many were found.
NAME-loss.png: bits a byte and answers' accuracy against tokens, and tokens a second by length.
Needs matplotlib.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # pylint: disable=wrong-import-position

STYLE = {"figure.dpi": 150, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False}


def name_of(result):
    return f"{result['config']['attention']}, {result['ranks']} x {result['gpu'] or 'CPU'}"


def draw_needles(results):
    figure, axes = pyplot.subplots(1, len(results), figsize=(1 + 4.5 * len(results), 4),
                                   layout="constrained", squeeze=False, sharey=True)
    for axis, result in zip(axes[0], results):
        needles = result["needles"]
        lengths, depths = needles["lengths"], needles["depths"]
        grid = [[row[i] for row in needles["exact"]] for i in range(len(depths))]
        image = axis.imshow(grid, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
        for i, row in enumerate(grid):
            for j, share in enumerate(row):
                axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                          color="black" if 0.2 < share < 0.8 else "white")
        axis.set_xticks(range(len(lengths)), [f"{length / 1024:g}k" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axis.set_title(f"{name_of(result)}\n{needles['samples']} needles a cell", fontsize=9)
        axis.set_xlabel("tokens (bytes)")
    axes[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axes, label="answered exactly")
    return figure


def draw_losses(results):
    figure, (bits, answers, rate) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for result in results:
        tokens = [point["tokens"] / 1e6 for point in result["curve"]]
        for axis, field in ((bits, "bits_per_byte"), (answers, "answer_accuracy")):
            axis.plot(tokens, [point[field] for point in result["curve"]], label=name_of(result))
        rates = {stage["length"]: stage["tokens_per_second"] / 1e6  # the last run's of each length
                 for run in result["runs"] for stage in run["stages"]
                 if "tokens_per_second" in stage}
        if rates:
            rate.semilogx(*zip(*sorted(rates.items())), "o-", base=2)
    first = results[0]["curve"]
    for before, point in zip(first, first[1:]):
        if before["length"] != point["length"]:
            for axis in (bits, answers):
                axis.axvline(before["tokens"] / 1e6, color="0.85", zorder=0)
    bits.set(xlabel="million tokens (lines: longer sequences)", ylabel="bits a byte, text and task")
    answers.set(xlabel="million tokens", ylabel="bytes of answers predicted")
    rate.set(xlabel="tokens of a sequence", ylabel="million tokens a second, training", ylim=0)
    bits.legend()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", required=True, help="the files' names begin so")
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    arguments = parser.parse_args()
    results = [json.loads(path.read_text()) for path in arguments.results]
    with pyplot.rc_context(STYLE):
        draw_losses(results).savefig(f"{arguments.output}-loss.png")
        if all("needles" in result for result in results):
            draw_needles(results).savefig(f"{arguments.output}-needles.png")


if __name__ == "__main__":
    main()
