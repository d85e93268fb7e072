"""Graphs of samples: networks on them, PageRank, training weights by topology (ReNode)."""
