"""The web page: what it asks of models, what it shows of the answers, and the page itself."""
