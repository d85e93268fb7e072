"""A graph with features and classes of its nodes."""

from typing import NamedTuple

import numpy as np

from moe_jax.graphs import structs


class Dataset(NamedTuple):
  """Nodes to classify."""

  name: str
  graph: structs.Graph  # undirected, without self-loops
  features: np.ndarray  # [nodes, features] float32
  labels: np.ndarray  # [nodes] int32, -1 where unknown
  class_names: tuple[str, ...]
  border: np.ndarray | None = None  # [nodes] bool, at a planted border; None where nobody knows

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.class_names)


def homophily(data: Dataset) -> float:
  """Returns the share of edges between nodes of one class, among nodes whose class is known."""
  ends = data.labels[np.stack([data.graph.senders, data.graph.receivers])]
  known = (ends >= 0).all(0)
  return float((ends[0] == ends[1])[known].mean()) if known.any() else float('nan')


def unit_rows(features: np.ndarray) -> np.ndarray:
  """Returns the rows scaled to length 1; rows of zeros stay."""
  length = np.linalg.norm(features, axis=1, keepdims=True)
  return (features / np.where(length > 0, length, 1)).astype(np.float32)
