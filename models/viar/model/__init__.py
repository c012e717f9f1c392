"""The transformer: configuration, blocks, trunks, caches, the schedule of iterations."""
