"""kontext-batch: a batch processor for image assets on FLUX.1 Kontext. See README.md for the file tree."""
