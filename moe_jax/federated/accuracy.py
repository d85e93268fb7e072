"""Accuracies of groups of classes, which are ordered from the most samples to the fewest."""

import numpy as np

GROUPS = ('balanced', 'head', 'middle', 'tail')


def members(classes: int) -> dict[str, slice]:
  """The classes of each group: tail the last 30 % (the paper's), head the first, all `balanced`."""
  size = round(0.3 * classes)
  return {
    'balanced': slice(0, classes),
    'head': slice(0, size),
    'middle': slice(size, classes - size),
    'tail': slice(classes - size, classes),
  }


def grouped(right: np.ndarray, totals: np.ndarray) -> dict[str, np.ndarray]:
  """Means of the accuracies of the classes of each group, [...].

  Args:
    right: test images of each class that are named rightly, [..., classes].
    totals: test images of each class, [classes].
  """
  accuracy = right / totals
  return {name: accuracy[..., part].mean(axis=-1) for name, part in members(len(totals)).items()}
