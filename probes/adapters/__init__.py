"""PEFT adapters: their configuration, their factors, and the matrices they change."""
