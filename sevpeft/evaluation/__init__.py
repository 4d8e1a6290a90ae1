"""Evidence: answers of an adapter and its base model on the test split, their scores, comparisons and reports."""
