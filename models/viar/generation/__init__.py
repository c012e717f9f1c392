"""From classes to images: the sampler, guidance, editing, reports, series."""
