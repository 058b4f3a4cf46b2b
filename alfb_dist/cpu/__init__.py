"""Compiled and shared-memory forms for CPUs of what plain torch computes elsewhere in the package."""
