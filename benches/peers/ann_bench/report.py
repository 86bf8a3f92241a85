"""What was measured, as numbers at given recalls, ratios, tables and a plot."""

import math
from dataclasses import dataclass, field
from html import escape
from statistics import mean, median

# The recall that contenders are compared at, by k.
TARGET = {10: 0.975, 100: 0.975, 500: 0.95}
RECALLS = [0.90, 0.95, 0.975, 0.99]
# Ours, and Faiss's index of the same kind.
SAME_KIND = {"ivf_flat": "faiss IVFFlat", "ivf_sq8": "faiss IVF-SQ8", "ivf_pq": "faiss IVFPQFastScan + SQ8",
             "ivf_rabitq": "faiss IVF-RaBitQ fs + bf16", "hnsw": "faiss HNSW"}
COLOURS = ["#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#ff7f0e", "#393b79",
           "#637939", "#843c39", "#7b4173", "#5254a3"]


@dataclass
class Point:
    """One contender at one setting: recall and CPU µs per query of each round; `name` tells ways of asking apart."""

    name: str
    contender: str
    library: str
    k: int
    params: dict
    batch: bool
    selectivity: float = 1.0
    recalls: list[float] = field(default_factory=list)
    us: list[float] = field(default_factory=list)
    touched: float | None = None

    @property
    def recall(self) -> float:
        return mean(self.recalls)

    @property
    def time(self) -> float:
        return median(self.us)

    def as_json(self) -> dict:
        return {**self.__dict__, "recall": self.recall, "us_median": self.time}


def frontier(points: list[Point]) -> list[Point]:
    """Those that no other beats in both recall and time, by rising recall."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.recall, p.time)):
        if not kept or point.time < kept[-1].time:
            kept.append(point)
    return kept[::-1]


def at_recall(points: list[Point], recall: float, value=lambda point: point.time) -> float | None:
    """The value at a recall, its logarithm interpolated between the frontier's points around it.

    A frontier that begins above the recall gives its first value, one that ends below it none.
    """
    line = frontier(points)
    if not line or line[-1].recall < recall:
        return None
    above = next(at for at, point in enumerate(line) if point.recall >= recall)
    high = value(line[above])
    if above == 0 or high is None or value(line[above - 1]) is None:
        return high
    below, low = line[above - 1], value(line[above - 1])
    share = (recall - below.recall) / (line[above].recall - below.recall)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def by_name(points: list[Point]) -> dict[str, list[Point]]:
    grouped: dict[str, list[Point]] = {}
    for point in points:
        grouped.setdefault(point.name, []).append(point)
    return grouped


def best(points: list[Point], recall: float) -> tuple[float, str] | None:
    """The fastest contender among them at that recall: its µs, its name."""
    times = [(time, name) for name, own in by_name(points).items() if (time := at_recall(own, recall)) is not None]
    return min(times, default=None)


def ratios(points: list[Point], recall: float) -> list[dict]:
    """Ours against the best of each library at that recall; `ratio` above 1: ours takes less time."""
    ours = best([p for p in points if p.library == "ours"], recall)
    rows = []
    for library in sorted({p.library for p in points} - {"ours"}):
        theirs = [p for p in points if p.library == library]
        fastest = best(theirs, recall)
        rows.append({"library": library, "recall": recall, "ours": ours and ours[1], "ours_us": ours and ours[0],
                     "theirs": fastest and fastest[1], "theirs_us": fastest and fastest[0],
                     "best_recall": max(p.recall for p in theirs),
                     "ratio": fastest[0] / ours[0] if ours and fastest else None})
    return rows


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --: |" * (len(head) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def recall_table(points: list[Point], target: float) -> list[str]:
    """CPU µs per query and queries per second of every contender at some recalls."""
    recalls = sorted({*RECALLS, target})
    rows = []
    for name, own in by_name(points).items():
        times = {recall: at_recall(own, recall) for recall in recalls}
        top = max(own, key=lambda p: p.recall)
        qps = times[target] and 1e6 / times[target]
        rows.append((times[target] or math.inf, [name, *(number(times[r]) for r in recalls), number(qps),
                                                 f"{top.recall:.4f} at {top.time:.0f}"]))
    head = ["contender", *(f"µs at {recall:g}" for recall in recalls), f"QPS at {target:g}", "highest recall, its µs"]
    return table(head, [row for _, row in sorted(rows, key=lambda row: (row[0], row[1][0]))])


def ratio_table(rows: list[dict]) -> list[str]:
    def theirs(row: dict) -> str:
        return f"{row['theirs']}" if row["theirs"] else f"none; highest recall {row['best_recall']:.3f}"

    return table(["against the best of", "recall", "fastest there", "its µs", "fastest of ours", "its µs", "ratio"],
                 [[row["library"], f"{row['recall']:g}", theirs(row), number(row["theirs_us"]), row["ours"] or "none",
                   number(row["ours_us"]), number(row["ratio"], 2)] for row in rows])


def cost_table(costs: dict[str, dict], n: int) -> list[str]:
    """Bytes per vector and build seconds, ours beside Faiss's of the same kind."""
    rows = []
    for name, cost in costs.items():
        same = costs.get(SAME_KIND.get(cost.get("kind"), ""))
        compared = [f"{cost[what] / same[what]:.2f}" if same else "" for what in ("bytes", "cpu_s")]
        rows.append([name, f"{cost['bytes'] / n:.0f}", compared[0], f"{cost['cpu_s']:.1f}", compared[1],
                     f"{cost['wall_s']:.1f}", str(cost["threads"])])
    head = ["contender", "bytes per vector", "times Faiss's", "build CPU s", "times Faiss's", "wall s", "threads"]
    return table(head, rows)


def memory_table(points: list[Point], target: float, bandwidth: float) -> list[str]:
    """How far each is from the core's memory: bytes it has to read, the time that takes, the time it took."""
    rows = []
    for name, own in by_name(points).items():
        bytes_, us = at_recall(own, target, lambda p: p.touched), at_recall(own, target)
        if bytes_ is not None and us is not None:
            limit = bytes_ / bandwidth * 1e6
            rows.append((us, [name, f"{bytes_ / 1e6:.2f}", f"{limit:.0f}", f"{us:.0f}", f"{us / limit:.1f}"]))
    head = ["contender", "MB read per query", f"µs at {bandwidth / 1e9:.1f} GB/s", "µs taken", "times the limit"]
    return table(head, [row for _, row in sorted(rows)])


def frontier_table(points: list[Point]) -> list[str]:
    rows = [[name, f"{p.recall:.4f}", f"{p.time:.1f}", f"{1e6 / p.time:.0f}", f"{min(p.us):.0f} to {max(p.us):.0f}",
             ", ".join(f"{key} {value:g}" for key, value in p.params.items())]
            for name, own in by_name(points).items() for p in frontier(own)]
    return table(["contender", "recall", "µs", "QPS", "µs over rounds", "parameters"], rows)


def plot(points: list[Point], title: str) -> str:
    """Frontiers as SVG: a panel per k, recall to the right, queries per second upwards on a logarithmic scale."""
    width, height, left, top, low = 460, 360, 56, 44, 0.8
    ks = sorted({p.k for p in points})
    names = list(by_name(points))
    ours = [name for name in names if name.startswith("ours")]
    colours = {name: "#d62728" if name in ours else COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}
    shown = [p for p in points if p.recall >= low]
    rates = [1e6 / p.time for p in shown] or [1.0]
    bottom, roof = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)) + 1e-9)
    roof = max(roof, bottom + 1)
    legend = len(ks) * (width + left) + 20
    full = max(height + 90, 60 + 18 * len(names))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{legend + 250}" height="{full}" '
           'font-family="sans-serif" font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{left}" y="20" font-size="15">{escape(title)}</text>']
    for panel, k in enumerate(ks):
        x0 = left + panel * (width + left)

        def place(recall: float, rate: float, x0: int = x0) -> str:
            x = x0 + (recall - low) / (1 - low) * (width - 20)
            return f"{x:.1f},{top + (roof - math.log10(rate)) / (roof - bottom) * height:.1f}"

        for step in range(9):
            recall = low + step * (1 - low) / 8
            x = place(recall, 10**bottom).split(",")[0]
            out.append(f'<path d="M{x} {top}V{top + height}" stroke="#ddd"/>'
                       f'<text x="{x}" y="{top + height + 16}" text-anchor="middle">{recall:.3f}</text>')
        for power in range(bottom, roof + 1):
            for digit in range(1, 10):
                if power == roof and digit > 1:
                    break
                y = place(low, digit * 10**power).split(",")[1]
                out.append(f'<path d="M{x0} {y}h{width - 20}" stroke="{"#bbb" if digit == 1 else "#eee"}"/>')
                if digit in (1, 2, 5):
                    out.append(f'<text x="{x0 - 4}" y="{float(y) + 4:.1f}" text-anchor="end">{digit * 10**power:g}</text>')
        out.append(f'<text x="{x0 + width / 2 - 10}" y="{top + height + 36}" text-anchor="middle">'
                   f"recall@{k}, against queries per second of one core</text>")
        for name, own in by_name([p for p in shown if p.k == k]).items():
            line = " ".join(place(p.recall, 1e6 / p.time) for p in frontier(own))
            dash = f' stroke-dasharray="{[2, 5, 9, 14][ours.index(name) % 4]} 3"' if name in ours[1:] else ""
            out.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" '
                       f'stroke-width="{2.6 if name in ours else 1.4}"{dash}/>')
            out += [f'<circle cx="{at.split(",")[0]}" cy="{at.split(",")[1]}" r="2.2" fill="{colours[name]}"/>'
                    for at in line.split()]
    for at, name in enumerate(names):
        y = 50 + 18 * at
        dash = f' stroke-dasharray="{[2, 5, 9, 14][ours.index(name) % 4]} 3"' if name in ours[1:] else ""
        out.append(f'<path d="M{legend} {y}h24" stroke="{colours[name]}" '
                   f'stroke-width="{2.6 if name in ours else 1.4}"{dash}/>'
                   f'<text x="{legend + 30}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
