"""How quantized experts stand in files, and how they are read."""
