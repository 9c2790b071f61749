"""The figures as pictures. matplotlib is needed for these alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from driver import Samples
from report import PHASES

mpl.use("Agg")
import matplotlib.pyplot as plt


def draw(results: dict[str, Any], directory: Path) -> None:
    """Writes latency.png, throughput.png and phases.png."""
    directory.mkdir(parents=True, exist_ok=True)
    _latency(results["latency"]["3 ms apart"], directory / "latency.png")
    _throughput(results["throughput"], directory / "throughput.png")
    _phases(results["latency"]["3 ms apart"]["isojob"], directory / "phases.png")


def _latency(samples: dict[str, Samples], to: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5))
    for at, (name, one) in enumerate(samples.items()):
        ordered = sorted(one.total)
        shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
        axes.plot(
            [value / 1e6 for value in ordered],
            shares,
            label=name,
            color=mpl.colormaps["tab20"](at),
            linewidth=2.5 if name.startswith("isojob") else 1.2,
        )
    axes.set(xscale="log", xlabel="milliseconds", ylabel="share of jobs", ylim=(0, 1))
    ticks = (0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.5, 1.1 * max(one.quantile(0.99) / 1e3 for one in samples.values()))
    axes.set_title("/bin/true, output captured, 3 ms apart, job by job in turn")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def _throughput(rates: dict[int, dict[str, float]], to: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    for name in ("asyncio exec", "isojob"):
        axes.plot(list(rates), [row[name] for row in rates.values()], marker="o", label=name)
    axes.set(xscale="log", xlabel="jobs in flight", ylabel="jobs a second", ylim=(0, None))
    axes.set_xticks(list(rates), [str(count) for count in rates])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def soak(samples: list[dict[str, float]], to: Path) -> None:
    """Memory and latency over the jobs of soak.py."""
    figure, axes = plt.subplots(figsize=(6, 3.5))
    jobs = [sample["jobs"] for sample in samples]
    for name, label in (
        ("host MB", "host process, MB"),
        ("zygote MB", "zygote, MB"),
        ("p50 ms", "a plain job, p50, ms"),
    ):
        axes.plot(jobs, [sample[name] for sample in samples], marker="o", label=label)
    axes.set(xlabel="jobs", yscale="log", ylim=(0.5, 100))
    ticks = (0.5, 1, 2, 5, 10, 20, 50, 100)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def _phases(samples: Samples, to: Path) -> None:
    summary = samples.summary()
    figure, axes = plt.subplots(figsize=(9, 1.9))
    left = 0.0
    for name in PHASES:
        width = summary[name]
        if width:
            axes.barh(0, width, left=left, label=f"{name} {width:.0f}")
        left += width
    axes.set(yticks=[], xlabel="microseconds, p50 of each phase")
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.45))
    figure.savefig(to, dpi=110, bbox_inches="tight")
