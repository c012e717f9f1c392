"""Images to train on, and pictures read and written."""
