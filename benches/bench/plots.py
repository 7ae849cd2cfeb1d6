"""Draws ratios.svg, latency.svg and memory.svg. Run by a Python that has matplotlib: plots.py DATA.json FOLDER.

The data hold plain lists, made by report.py. The same data give the same bytes: no date, a fixed salt, text as text.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

STYLE = {
    "svg.hashsalt": "ringfence", "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e4e4e4",
    "axes.edgecolor": "#666666", "legend.frameon": False, "figure.facecolor": "white",
}  # fmt: skip
COLOURS = {
    "ringfence": "#b5372b", "envoy": "#4a4a4a", "envoy13": "#8c8c8c", "haproxy": "#2f6f9f", "nginx": "#3f8f5f", "consul": "#a0559a",
    "direct": "#c9c9c9", "floor": "#d9a441", "tokio-uring": "#7a6a4f", "tokio": "#6a8fb5",
}  # fmt: skip
BAR = 0.8
CUT = 4.0


def main():
    data, folder = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
    plt.rcParams.update(STYLE)
    for name, draw in (("ratios", ratios), ("latency", latency), ("memory", memory)):
        if data[name]:
            figure = draw(data[name])
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
            plt.close(figure)
            print(f"{name}.svg")


def ratios(rows):
    """Bars of each peer's CPU over Envoy's, with the spread; what is beyond the edge is cut and says its value."""
    peers = [peer for peer in COLOURS if any(peer in row["ratios"] for row in rows)]
    height = BAR / max(1, len(peers))
    # Room for each bar that is there at all: a run of one peer is not drawn as wide as one of ten.
    figure, axes = plt.subplots(figsize=(9, 1.2 + len(rows) * (0.16 * len(peers) + 0.18)))
    for at, row in enumerate(rows):
        present = [peer for peer in peers if peer in row["ratios"]]
        for index, peer in enumerate(present):
            one = row["ratios"][peer]
            y = at + (index - (len(present) - 1) / 2) * height
            value = min(one["median"], CUT)
            axes.barh(y, value, height * 0.9, color=COLOURS[peer], label=peer if peer not in axes.get_legend_handles_labels()[1] else None)
            if one["median"] < CUT:
                axes.plot([one["min"], min(one["max"], CUT)], [y, y], color="black", linewidth=0.7)
            axes.text(min(max(value, one["max"]), CUT) + 0.03, y, f"{one['median']:.2f}", va="center", fontsize=6.5)
        if row.get("must"):
            axes.plot([row["must"]] * 2, [at - BAR / 2, at + BAR / 2], color="#b5372b", linewidth=1, linestyle=":")
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, CUT * 1.05)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("CPU of both sidecars for one unit of work, Envoy = 1; the line is the spread, dotted what ringfence must reach")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.5 / figure.get_figheight()), ncols=5)
    return figure


def latency(rows):
    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5 * columns, 3.2 * lines), squeeze=False)
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(grid.flat, rows):
        for peer in COLOURS:
            if peer in row["curves"]:
                # Percentile p lies at 1 / (1 - p): each nine has the same width.
                points = [(100 / (100 - percent), us / 1000) for percent, us in row["curves"][peer] if percent < 100 and us > 0]
                axes.plot(*zip(*points), color=COLOURS[peer], label=peer, linewidth=1.4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(1, 10_000)
        axes.set_xticks([1, 2, 10, 100, 1_000, 10_000], ["0", "50", "90", "99", "99.9", "99.99"])
        axes.minorticks_off()
        axes.set_title(row["title"], fontsize=8.5)
        axes.set_ylabel("ms")
        axes.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    grid.flat[0].legend(fontsize=7)
    for axes in grid[-1] if len(rows) % columns == 0 else [*grid[-1][: len(rows) % columns], *grid[-2:-1, len(rows) % columns :].flat]:
        axes.set_xlabel("percentile")
    figure.tight_layout()
    return figure


def memory(peers):
    """Resident memory of one sidecar over the connections that it holds."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for peer in COLOURS:
        if peer in peers:
            axes.plot(*zip(*peers[peer]), color=COLOURS[peer], marker="o", markersize=3.5, label=peer)
    axes.set_xlabel("held connections")
    axes.set_ylabel("resident, one sidecar, MiB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    main()
