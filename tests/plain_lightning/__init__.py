"""A Trainer with a Brain, and with a plain LightningModule that does the same, in one test."""
