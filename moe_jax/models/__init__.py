"""Flax linen modules: pure functions of parameters and inputs, free of devices, flags and files.

Axis letters of the whole library, in docstrings, comments and einsums:

  B    rows of a batch                 L    length of the queries       S    length of the keys
  T    B*L tokens                      D    embed                       V    vocabulary
  N    query heads                     Nkv  key-value heads             G    query heads per Nkv
  H    head dim                        Hn   MLA: unrotated part         Hr   MLA: rotated part
  Hv   MLA: values                     Q    MLA: query latent           R    MLA: key-value latent
  F    width of an FFN or expert       U    gate and up, 2              C    slots of an expert
  E    experts                         K    experts per token           P    devices of the experts
  A    (token, expert) assignments     I    a matrix's input width      O    a matrix's output width
  M    prediction modules

Other axes are written out, as in [layers, E], or declared by the module that has them, in a line
that begins with "Axis letters:".
"""
