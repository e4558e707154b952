"""The control plane on one machine, or on a shared mount: the log is a file, the ledger a SQLite database."""
