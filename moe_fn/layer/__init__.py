"""The whole layer: stages in order, and how a call of it runs."""
