"""Images, masks, shards, labelled sets, and the batches of a training."""
