"""What pictures tell of themselves outside of this system: exports, sidecars and marks in files."""
