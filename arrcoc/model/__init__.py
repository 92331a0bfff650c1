"""The relevance model: similarity, head and the components around them."""
