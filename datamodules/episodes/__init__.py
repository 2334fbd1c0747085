"""Episodes: the batch type, who meets whom, and the LightningDataModule that supplies them."""
