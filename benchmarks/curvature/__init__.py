"""Parts of the benchmark of curvature, which ``sharpness.py`` runs."""
