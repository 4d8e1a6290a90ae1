"""Gathered consultations made into a folder to train on: clean, mask, reject, find duplicates, split, write."""
