"""Turns a set of severity weights into the lines that show them on a screen, and into advice where they do nothing.

`train`, `plan` and `annotate` show the same picture, because the commonest mistake is invisible in a loss curve: with
probabilities near a third each, all weights are near one and the training is plain cross-entropy under another name.
"""

from __future__ import annotations

from sevpeft.severity.weighting import WeightSummary

# Below this share of effective consultations, a few rows decide what is learnt.
SMALL_SAMPLE = 0.5


def histogram_lines(histogram: list[tuple[float, float, int]], width: int = 60) -> list[str]:
    """Lines for (from, to, count) as `WeightSummary.histogram` holds them, also after a way through JSON."""
    ends = {round(high - low, 9) for low, high, _ in histogram}
    finest = min((end for end in ends if end > 0), default=0.01)
    places = 2 if finest >= 0.01 else 3 if finest >= 0.001 else 4
    labels = [
        f"{low:.{places}f}" if low == high else f"{low:.{places}f} to {high:.{places}f}" for low, high, _ in histogram
    ]
    numbers = [f"{count:,}" for _, _, count in histogram]
    label_width, number_width = max(map(len, labels)), max(map(len, numbers))
    room = max(1, width - label_width - number_width - 4)
    most = max(count for _, _, count in histogram)
    lines = []
    for label, number, (_, _, count) in zip(labels, numbers, histogram, strict=True):
        # A bar that holds anything is never drawn as none.
        bar = "█" * max(round(room * count / most), 1 if count else 0)
        lines.append(f"{label:>{label_width}}  {bar:<{room}}  {number:>{number_width}}")
    return lines


def effective_sample(summary: WeightSummary) -> str:
    """`257 of 300 (86%)`."""
    share = summary.effective_sample_size / summary.consultations
    return f"{summary.effective_sample_size:,.0f} of {summary.consultations:,} ({share:.0%})"


def advice(summary: WeightSummary) -> str | None:
    """What to do about weights that will not do what they are for; None when they are fit for it."""
    if summary.too_small_to_matter:
        low, high = summary.minimum, summary.maximum
        places = 2 if high - low >= 0.01 else 4
        same = f"All weights are {low:.2f}"
        near = f"The weights lie in {low:.{places}f} to {high:.{places}f}"
        return (
            f"{same if low == high else near}, too close together to matter: shuffled weights would train the same "
            "model. Calibrate the classifier (sevpeft classifier fit), sharpen the probabilities "
            "(severity.temperature=0.5), use severity.weights=strong, or gather labels."
        )
    if summary.effective_sample_size < SMALL_SAMPLE * summary.consultations:
        return (
            f"The effective sample size is {effective_sample(summary)}: a few consultations decide what is learnt. "
            "Use coefficients that lie closer together, or flatten the probabilities (severity.temperature=2)."
        )
    return None
