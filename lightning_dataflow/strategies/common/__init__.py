"""What the networks and objectives of all strategies share."""
