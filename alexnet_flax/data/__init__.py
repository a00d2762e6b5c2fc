"""Data sets, decoding, augmentation, and batches on devices."""
