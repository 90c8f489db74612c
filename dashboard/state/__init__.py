"""What is selected and shown: the address, filters, the library of audits."""
