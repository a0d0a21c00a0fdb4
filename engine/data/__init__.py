"""Data loading, from the data set to batches on the device."""
