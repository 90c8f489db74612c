"""How it is served: access, background jobs, warming up."""
