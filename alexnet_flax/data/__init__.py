"""From a TFDS record to a sharded batch on the devices."""
