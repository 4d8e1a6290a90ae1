"""From gathered consultations to a folder to train on."""
