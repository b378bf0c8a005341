"""Training of a JEPA: the LightningModule, callbacks, schedules, optimizer and checkpoints."""
