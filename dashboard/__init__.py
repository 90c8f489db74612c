"""What is seen: the Dash app that explores audits."""
