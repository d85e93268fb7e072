"""Compiled programs, read from their text: collectives, FLOPs, memory."""
