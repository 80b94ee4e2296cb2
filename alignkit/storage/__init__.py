"""Files that survive kills and full disks."""
