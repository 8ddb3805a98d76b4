"""Versions of other packages, and SpeechBrain's classes, which are never imported."""
