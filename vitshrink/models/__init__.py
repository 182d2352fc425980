"""Models: found, checked, loaded, changed in place, priced, saved and published."""
