"""Access, background work, and audits started by visitors."""
