"""Flax linen modules: pure functions of parameters and inputs, free of devices, flags and files.

Axis letters, used in every docstring and einsum of this package:

  B batch   L query length   S key length   D embed   N heads   G query heads per key-value head
  H head dim   F FFN width   E experts   K experts per token   T = B*L tokens   R sorted rows   V
  vocab
"""
