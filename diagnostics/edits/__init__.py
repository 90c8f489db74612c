"""What writes a model: mitigate, graft, interpolate."""
