"""Severity probabilities of consultations, and one loss weight per consultation from them."""
