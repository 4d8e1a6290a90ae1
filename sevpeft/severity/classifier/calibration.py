"""Turns a classifier's probabilities into ones that mean what they say, by rows that it was not fitted on.

Temperature scaling (Guo et al. 2017, "On Calibration of Modern Neural Networks") has one parameter and never changes
which severity is the likeliest. With a bias for each class (Alexandari et al. 2020, "Maximum Likelihood with
Bias-Corrected Calibration") it also repairs shares that are off as a whole: those of rules, which know none, and of a
training that weighted its classes. Isotonic regression (Zadrozny & Elkan 2002) fits one monotone function a class and
needs many more rows. None may see the rows that trained the classifier: their probabilities are too good.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sevpeft.errors import DataError
from sevpeft.severity.probabilities import SEVERITIES, SeverityClassifier, sharpened

# Below this a probability has no logarithm worth scaling: no classifier here knows better than one in a billion.
_SMALLEST = 1e-9
_TEMPERATURES = (0.05, 20.0)
_BIASES = (-10.0, 10.0)


class Calibration(Protocol):
    """A map from probabilities to probabilities that can be written as JSON."""

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """(n, 3) → (n, 3), each row summing to one."""

    def to_json(self) -> dict[str, Any]:
        """What `calibration_from_json` makes the same map of."""


@dataclass(frozen=True)
class Temperature:
    """p_i^(1/T) / Σ_j p_j^(1/T): T above 1 softens, below 1 sharpens, 1 leaves all as it is."""

    temperature: float = 1.0

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        return sharpened(probabilities, self.temperature)

    def to_json(self) -> dict[str, Any]:
        return {"method": "temperature", "temperature": self.temperature}


@dataclass(frozen=True)
class BiasCorrected:
    """p_i^(1/T) · exp(b_i) / Σ_j p_j^(1/T) · exp(b_j), with b_0 = 0."""

    temperature: float
    bias: tuple[float, ...]

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        return log_linear([probabilities], [1 / self.temperature], self.bias)

    def to_json(self) -> dict[str, Any]:
        bias = dict(zip(SEVERITIES, self.bias, strict=True))
        return {"method": "bias_corrected", "temperature": self.temperature, "bias": bias}


@dataclass(frozen=True)
class Isotonic:
    """A monotone function for each class, linear between its thresholds, and the three values made to sum to one.

    Attributes:
        thresholds: for each class the probabilities given (rising) and those they become.
        floor: smallest value a function gives. Isotonic regression says 0 wherever the lowest rows of the calibration
            split happen to lack a class; that few rows cannot know it.
    """

    thresholds: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    floor: float

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        mapped = np.stack(
            [np.interp(probabilities[:, i], given, become) for i, (given, become) in enumerate(self.thresholds)], axis=1
        )
        mapped = np.maximum(mapped, self.floor)
        result: np.ndarray = mapped / mapped.sum(axis=1, keepdims=True)
        return result

    def to_json(self) -> dict[str, Any]:
        return {
            "method": "isotonic",
            "floor": self.floor,
            "thresholds": {
                name: {"given": list(given), "become": list(become)}
                for name, (given, become) in zip(SEVERITIES, self.thresholds, strict=True)
            },
        }


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> Temperature:
    """The temperature of greatest likelihood for `labels` (n,), positions in `SEVERITIES`."""
    from scipy.optimize import minimize_scalar

    _check(probabilities, labels)

    def loss(log_temperature: float) -> float:
        scaled = Temperature(float(np.exp(log_temperature))).apply(probabilities)
        return float(-np.log(np.maximum(scaled[np.arange(len(labels)), labels], 1e-300)).mean())

    low, high = np.log(_TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return Temperature(float(np.exp(found.x)))


def fit_bias_corrected(probabilities: np.ndarray, labels: np.ndarray) -> BiasCorrected:
    """The temperature and biases of greatest likelihood for `labels` (n,).

    Raises:
        DataError: a class is missing from the rows: its bias would be as low as it can be.
    """
    _check(probabilities, labels)
    _refuse_missing(labels)
    (weight,), bias = fit_log_linear([probabilities], labels)
    return BiasCorrected(1 / weight, bias)


def log_linear(sources: Sequence[np.ndarray], weights: Sequence[float], bias: Sequence[float]) -> np.ndarray:
    """Π_s p_s^(w_s) · exp(b), made to sum to one: a pool of probabilities (n, 3), each with its weight."""
    scores = sum((w * np.log(np.maximum(p, _SMALLEST)) for w, p in zip(weights, sources, strict=True)), np.array(bias))
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return result


def fit_log_linear(sources: Sequence[np.ndarray], labels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Weights (one a source, none negative) and biases (three, the first 0) of greatest likelihood for `log_linear`."""
    from scipy.optimize import minimize

    count = len(sources)
    logs = np.stack([np.log(np.maximum(source, _SMALLEST)) for source in sources])
    truth = np.eye(len(SEVERITIES))[labels]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        bias = np.concatenate([[0.0], parameters[count:]])
        fitted = log_linear(sources, parameters[:count].tolist(), bias.tolist())
        error = (fitted - truth) / len(labels)
        slopes = np.concatenate([(logs * error).sum(axis=(1, 2)), error.sum(axis=0)[1:]])
        return float(-np.log(np.maximum(fitted[np.arange(len(labels)), labels], 1e-300)).mean()), slopes

    weights = (0.0 if count > 1 else 1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0])
    start = np.concatenate([np.full(count, 1 / count), np.zeros(len(SEVERITIES) - 1)])
    bounds = [weights] * count + [_BIASES] * (len(SEVERITIES) - 1)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12, "gtol": 1e-9})
    return tuple(found.x[:count].tolist()), (0.0, *found.x[count:].tolist())


def fit_isotonic(probabilities: np.ndarray, labels: np.ndarray) -> Isotonic:
    """One isotonic regression a class, of whether a row (of `labels`, (n,)) has it on its probability.

    Raises:
        DataError: a class is missing from the rows, so that its function would be 0 everywhere.
    """
    from sklearn.isotonic import IsotonicRegression

    _check(probabilities, labels)
    _refuse_missing(labels)
    thresholds = []
    for i in range(len(SEVERITIES)):
        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(probabilities[:, i], labels == i)
        thresholds.append((tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist())))
    return Isotonic(tuple(thresholds), floor=1 / (len(labels) + len(SEVERITIES)))


FITS: dict[str, Callable[[np.ndarray, np.ndarray], Calibration]] = {
    "temperature": fit_temperature,
    "bias_corrected": fit_bias_corrected,
    "isotonic": fit_isotonic,
}


def calibration_from_json(content: Any) -> Calibration:
    """The map that `to_json` wrote.

    Raises:
        DataError: it is no calibration that this version knows, or its numbers make no sense.
    """
    try:
        if content["method"] in ("temperature", "bias_corrected"):
            temperature = float(content["temperature"])
            if not _TEMPERATURES[0] / 2 <= temperature <= _TEMPERATURES[1] * 2:
                raise ValueError
            if content["method"] == "temperature":
                return Temperature(temperature)
            bias = tuple(float(content["bias"][name]) for name in SEVERITIES)
            if not all(_BIASES[0] <= value <= _BIASES[1] for value in bias):
                raise ValueError
            return BiasCorrected(temperature, bias)
        if content["method"] == "isotonic":
            thresholds = tuple(
                (
                    tuple(map(float, content["thresholds"][name]["given"])),
                    tuple(map(float, content["thresholds"][name]["become"])),
                )
                for name in SEVERITIES
            )
            for given, become in thresholds:
                if not given or len(given) != len(become) or _falls(given) or _falls(become) or become[-1] > 1:
                    raise ValueError
            floor = float(content["floor"])
            if not 0 < floor < 1:
                raise ValueError
            return Isotonic(thresholds, floor)
    except (KeyError, TypeError, ValueError):
        raise DataError("The classifier's calibration is damaged: fit the classifier again.") from None
    raise DataError(
        f"The classifier's calibration is of a kind this version does not know (it knows {', '.join(FITS)}): "
        "use the version of sevpeft that fitted it, or fit it again."
    )


class Calibrated:
    """A classifier and the calibration that belongs to it, as one classifier.

    Attributes:
        classifier: the one whose probabilities are calibrated.
        calibration: fitted on rows that the classifier was not fitted on.
        kind: the classifier's.
        version: changes with the classifier and with its calibration.
    """

    def __init__(self, classifier: SeverityClassifier, calibration: Calibration) -> None:
        self.classifier = classifier
        self.calibration = calibration
        self.kind = classifier.kind
        decides = json.dumps([classifier.version, calibration.to_json()], sort_keys=True)
        self.version = f"{self.kind}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"

    def probabilities(self, questions: Sequence[str]) -> np.ndarray:
        return self.calibration.apply(self.classifier.probabilities(list(questions)))


def _falls(values: tuple[float, ...]) -> bool:
    """Whether the values fall anywhere, or are not numbers from 0 on."""
    return not (np.all(np.isfinite(values)) and values[0] >= 0 and np.all(np.diff(values) >= 0))


def _refuse_missing(labels: np.ndarray) -> None:
    missing = [name for i, name in enumerate(SEVERITIES) if not (labels == i).any()]
    if missing:
        raise DataError(
            f"The calibration split has no {' and no '.join(missing)} row, and this calibration needs every severity: "
            "bring more rows, or use --calibration temperature."
        )


def _check(probabilities: np.ndarray, labels: np.ndarray) -> None:
    if not len(labels):
        raise DataError("The calibration split has no rows: bring more rows or make it larger.")
    if probabilities.shape != (len(labels), len(SEVERITIES)):
        raise ValueError(f"probabilities of shape {probabilities.shape} for {len(labels)} labels")
