"""The audit on disk, the keys of results, and caches."""
