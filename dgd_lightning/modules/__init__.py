"""The LightningModules of `dgd`: decoding, draft training, pretraining of the lab's target."""
