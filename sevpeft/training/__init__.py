"""From rows, weights and a base model to a trained adapter in a run folder."""
