"""The published checkpoints, read and written."""
