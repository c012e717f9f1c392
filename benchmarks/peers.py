"""torchdeq 0.1, imported without its warnings."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # Its docstrings hold invalid escapes, of which Python tells when it compiles them.
    for category in (DeprecationWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", "invalid escape sequence", category)
    import torchdeq

__all__ = ["torchdeq"]
