"""Where bytes lie: folders and S3 behind one port, artifacts under the hash of their bytes."""
