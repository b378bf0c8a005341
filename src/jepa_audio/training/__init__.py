"""What trains a JEPA: the LightningModule, its callbacks, schedules and checkpoints."""
