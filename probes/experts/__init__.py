"""Routers and routes of mixtures of experts."""
