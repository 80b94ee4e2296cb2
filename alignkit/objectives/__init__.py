"""Methods, one short file each."""
