"""What is done to pictures without a model: exact sizes, formats, overlays, contact sheets."""
