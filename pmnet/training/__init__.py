"""Training: the LightningModule, pretraining of backbones, metrics. Needs lightning and torchmetrics."""
