"""What the tests of planning.hlo share."""

import numpy as np


class Device:
  def __init__(self, number):
    self.id = number


class Mesh:
  """Names and sizes of axes, and devices with the numbers that a topology gives them."""

  def __init__(self, ids=None, **shape):
    self.shape = shape
    ids = range(int(np.prod(list(shape.values())))) if ids is None else ids
    self.devices = np.array([Device(i) for i in ids])


MESH = Mesh(data=2, fsdp=2, expert=2)
CONDITION = """
%condition (p.0: (s32[], f32[8,4])) -> pred[] {
  %p.0 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(7)
  %i.0 = s32[]{:T(128)} get-tuple-element(%p.0), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.0, %bound), direction=LT, metadata={op_name="while/lt"}
}
"""
LOOP = (
  CONDITION
  + """
%body (p.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %one = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.1, %one)
  %sum = f32[8,4]{1,0:T(8,128)} all-reduce(%x.1), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %out.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%next, %sum)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %first = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%first)
  %init = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%start, %x)
  %loop = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8,4]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""
)
