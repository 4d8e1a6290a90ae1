"""From rows to severity probabilities, and from probabilities to one weight per consultation."""
