"""Severity classifiers: fit on labeled questions, calibration, evaluation against baselines, and storage."""
