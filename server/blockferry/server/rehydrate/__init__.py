"""Rehydration: a disk that works at once, while what it lacks is fetched from a backup."""
