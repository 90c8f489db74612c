"""What is selected and shown, as values."""
