"""Severity classifiers: fitted on labeled questions, calibrated, evaluated beside baselines, and stored."""
