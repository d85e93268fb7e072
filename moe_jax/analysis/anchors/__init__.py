"""Label words as anchors (arXiv 2305.14160): how a model uses demonstrations in its context."""
