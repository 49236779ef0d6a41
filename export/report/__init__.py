"""The report of a bundle, and of several: pages that need no network and no torch."""
