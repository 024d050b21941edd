"""Tools that know nothing of CLIP."""
