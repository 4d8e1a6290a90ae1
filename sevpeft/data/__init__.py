"""From files, Hub data sets and the bundled sample to rows with a question and an answer."""
