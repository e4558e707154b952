"""A run of several processes on one machine."""
