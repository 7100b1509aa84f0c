"""The lake: per table an append-only changelog and a current table, both Delta, in any object store."""
