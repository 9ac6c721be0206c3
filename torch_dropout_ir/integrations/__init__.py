"""Floor 4: the analysis inside other people's trainers; each needs its own package."""
