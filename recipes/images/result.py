"""Draws result.svg, the figure of the README, from the figures of one experiment.

    python recipes/images/result.py

Measured with tests/experiments/critical_phase.py and critical_phase_cpu.yaml on 2026-11-30: Gemma-3-270M with its
vocabulary cut to the texts (122M parameters), bfloat16, LoRA r 16 in the three upper layers, learning rate 1e-3, 3
epochs (199 steps of 8 rows); 1,062 real consultations with labels by people (101 critical, 380 neutral, 581
non-critical), each measured by a model that did not train on it (two folds), 3 seeds. Intervals are 95 % bootstrap
intervals over questions, seeds a random factor; nothing is corrected. The router is a linear classifier of questions:
the fifth that it finds most critical is answered with balanced weights, the others by plain cross-entropy.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# Difference in nats per answer token: value, low, high.
FIGURES = {
    "balanced weights,\nall questions": {
        "critical": (-0.0286, -0.0445, -0.0141),
        "against shuffled": (-0.0370, -0.0557, -0.0197),
        "neutral": (0.0101, 0.0002, 0.0203),
        "non-critical": (0.0419, 0.0326, 0.0523),
    },
    "balanced weights,\nwhere a router\nfinds it critical": {
        "critical": (-0.0148, -0.0267, -0.0053),
        "against shuffled": (-0.0167, -0.0289, -0.0070),
        "neutral": (0.0033, 0.0008, 0.0061),
        "non-critical": (0.0033, 0.0013, 0.0057),
    },
}
STYLES = {
    "critical": ("#0b6e99", "o", "full", "critical cases, against plain cross-entropy"),
    "against shuffled": ("#0b6e99", "s", "none", "critical cases, against shuffled weights"),
    "neutral": ("#8a8f98", "D", "full", "neutral cases, against plain cross-entropy"),
    "non-critical": ("#c2500a", "D", "full", "non-critical cases, against plain cross-entropy"),
}


def main() -> None:
    # Text stays text, and the file is the same at every drawing.
    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "sevpeft", "font.family": "sans-serif", "font.size": 11}
    )
    figure, axes = plt.subplots(figsize=(8.2, 3.5))
    for row, figures in enumerate(FIGURES.values()):
        for number, (name, (color, marker, fill, label)) in enumerate(STYLES.items()):
            value, low, high = figures[name]
            place = row - 0.27 + 0.18 * number
            axes.plot([low, high], [place] * 2, color=color, linewidth=2)
            axes.plot(value, place, marker, color=color, fillstyle=fill, label=None if row else label)
    axes.axvline(0, color="#6b7280", linewidth=1)
    axes.set_yticks(range(len(FIGURES)), FIGURES)
    axes.set_ylim(len(FIGURES) - 0.5, -0.5)
    axes.set_xlabel("difference in NLL, nats per answer token   (← better · worse →)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="upper center", ncols=2, frameon=False, fontsize=9.5)
    figure.tight_layout(rect=(0, 0, 1, 0.86))
    path = Path(__file__).with_name("result.svg")
    figure.savefig(path, metadata={"Date": None}, transparent=False)
    print(path)


if __name__ == "__main__":
    main()
