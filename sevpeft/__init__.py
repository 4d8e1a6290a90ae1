"""Parameter-efficient fine-tuning of Arabic medical text generators with a severity-weighted loss."""

__version__ = "0.1.0"
