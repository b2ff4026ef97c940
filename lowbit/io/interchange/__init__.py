"""Other ecosystems' layouts of low-bit linears, one file each; what they share is in :mod:`base`."""
