"""Reads, splits, mixes and prepares rows of questions and answers."""
