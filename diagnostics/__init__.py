"""What is concluded from models: one module an analysis, and the audit that runs them."""
