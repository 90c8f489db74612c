"""Bytes: formats and places of weight files, read without running code in them."""
