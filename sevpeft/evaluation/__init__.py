"""From a trained adapter to evidence: answers on the test split, their scores, and what can be said about them."""
