"""Episodes: the batch type, the sampler, and the LightningDataModule that supplies the batches."""
