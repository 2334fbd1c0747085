"""Training: the LightningModule, pretraining of backbones, metrics."""

try:
    import lightning  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    raise ImportError("pmnet.training needs Lightning and torchmetrics: pip install 'pmnet[framework]'") from error
