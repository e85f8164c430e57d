"""The largest arrays that a compiled program keeps for itself, from the text of its HLO.

For TPUs jax hands out no assignment of buffers, but the text has every instruction with the layout of its result. An
array that is updated in place, or lives in what another one left, is listed like any other, also when the program gives
it back: the list says what is large, not what is there at once.
"""
import math
import re
from collections.abc import Iterator
from typing import Any

# Instructions whose result is no buffer of its own. An asynchronous one is counted where it is done.
_VIEWS = ('parameter', 'get-tuple-element', 'bitcast', 'tuple', 'while', 'conditional', 'call', 'constant',
          'opt-barrier')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]\{([^}]*)\}')


def largest(hlo: str, n: int = 5) -> list[dict[str, Any]]:
  """[{'bytes' in HBM with its padding, 'shape', 'op': where in the program}], one for each shape, descending.

  hlo: `compiled.as_text()`.
  """
  found: dict[str, dict[str, Any]] = {}
  for shape, layout, op in _results(hlo):
    size = _bytes(shape, layout)
    if size > found.get(shape, {'bytes': 0})['bytes']:
      found[shape] = {'bytes': size, 'shape': shape, 'op': op}
  return sorted(found.values(), key=lambda x: -x['bytes'])[:n]


def _results(hlo: str) -> Iterator[tuple[str, str, str]]:
  """(shape, layout, name of the operation) of every array that an instruction outside of a fusion makes in HBM."""
  fused, inside = set(re.findall(r'fusion\(.*calls=%?([\w.-]+)', hlo)), False
  for line in hlo.splitlines():
    if line[:1] not in (' ', '}', ''):
      inside = line.removeprefix('ENTRY ').lstrip('%').split(' ', 1)[0] not in fused
      continue
    if not inside or ' = ' not in line:
      continue
    kind, rest = _type(line.partition(' = ')[2])
    code = rest.partition('(')[0]
    if code in _VIEWS or code.endswith('-start'):
      continue
    said = re.search(r'op_name="([^"]*)"', rest)
    for dtype, dims, layout in _ARRAY.findall(kind):
      if not re.search(r'S\([1-9]', layout):
        yield f'{dtype}[{dims}]', layout, said.group(1) if said else code


def _type(text: str) -> tuple[str, str]:
  """(type, the rest) of what follows the equals sign; the type of several results is in brackets."""
  if not text.startswith('('):
    kind, _, rest = text.partition(' ')
    return kind, rest
  depth = 0
  for i, c in enumerate(text):
    depth += (c == '(') - (c == ')')
    if not depth:
      return text[:i + 1], text[i + 2:]
  return text, ''


def _bytes(shape: str, layout: str) -> int:
  """With the padding of the first tile: '1,0:T(8,128)' fills up the two dimensions that vary fastest."""
  dtype, dims = shape.rstrip(']').split('[')
  sizes = [int(d) for d in dims.split(',') if d]
  order, _, tiles = layout.partition(':')
  minor = [int(i) for i in order.split(',') if i]
  if tile := re.match(r'T\(([\d,]+)\)', tiles):
    for axis, t in zip(minor, reversed([int(t) for t in tile.group(1).split(',')])):
      sizes[axis] = -(-sizes[axis] // t) * t
  bits = re.search(r'\d+', dtype)
  return math.prod(sizes) * (int(bits.group()) if bits else 8) // 8
