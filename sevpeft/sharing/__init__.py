"""What leaves the machine: the model card of an adapter."""
