"""Label words as anchors: how a model uses demonstrations in its context."""
