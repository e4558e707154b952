"""The commands of `lightning-dataflow`."""
