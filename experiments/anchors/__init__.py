"""Label words as anchors: how a model uses demonstrations in its context."""

VARIANTS = ('dense', 'gshard', 'fine')  # of configs/episodes.py, that the study trains
