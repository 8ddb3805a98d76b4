"""The generated LightningModule, and what its .ckpt file holds."""
