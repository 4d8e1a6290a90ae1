"""Rows with a question and an answer, from files, Hub data sets and the bundled sample."""
