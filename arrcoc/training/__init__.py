"""Training of relevance heads."""
