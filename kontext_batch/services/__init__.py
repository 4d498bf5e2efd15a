"""The use cases. Each reads top to bottom; what it needs from outside comes as a port."""
