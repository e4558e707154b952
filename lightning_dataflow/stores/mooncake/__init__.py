"""The feature store in Mooncake."""
