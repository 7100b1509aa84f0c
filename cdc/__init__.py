"""Change data capture for Postgres: from logical replication to a lake, and results back."""

__version__ = "0.1.0"
