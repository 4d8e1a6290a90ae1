"""Severity classifiers: fitted on labelled questions, calibrated, judged beside their baselines, and stored."""
