"""Programs that a run starts on this machine, and ends."""
