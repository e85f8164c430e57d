"""What `keye ladder` measured, as a table, the evidence file and the page docs/ladder.md."""
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from keye_jax.evals import uncertainty
from launch import results

PAGE = results.FOLDER.parent / 'ladder.md'
CONTROLS = ('0-random-lm', 'blind', '3-dense')
CLAIM = ('on held-out clips a stage is better than the one before at what it adds: pictures find their captions, stage '
         '0 beats the same stage of an untrained language model, stages 1 and 2 answer more than the stage before '
         'them and than the blind control, and neither sparse attention nor fine-tuning loses more than 0.03 points a '
         'question; sparse attention costs less than 1% of the loss of an answer token against dense attention '
         'continued for the same steps')


class Pair(NamedTuple):
  """`stage` must earn more points a question than `than`, by at least `least`, with the lower end of the interval."""
  stage: str
  than: str
  least: float


SWITCH, SWITCH_COSTS = ('3', '3-dense'), 0.01         # sparse, dense: the upper end of what it may cost
AIMS = (Pair('0', '0-random-lm', 0.0), Pair('1', '0', 0.0), Pair('1', 'blind', 0.0), Pair('2', '1', 0.0),
        Pair('3', '2', -0.03), Pair('sft', '3', -0.03))


def difference(measured: Mapping[str, Any], pair: Pair) -> uncertainty.Difference | None:
  """Points a question, with its interval over clips; None when one of the two was not run."""
  first, second = (measured['stages'].get(name) for name in pair[:2])
  if not first or not second:
    return None
  if first['clips'] != second['clips']:
    raise ValueError(f'stages {pair.stage} and {pair.than} were not asked the same questions')
  return uncertainty.paired(first['earned'], second['earned'], first['clips'])


def switch(measured: Mapping[str, Any]) -> uncertainty.Relative | None:
  """What sparse attention adds to the loss of the answers' tokens; None when one of the two was not run."""
  sparse, dense = (measured['stages'].get(name, {}).get('losses') for name in SWITCH)
  if not sparse or not dense:
    return None
  if sparse['tokens'] != dense['tokens'] or sparse['clips'] != dense['clips']:
    raise ValueError(f'stages {" and ".join(SWITCH)} were not given the same answers')
  return uncertainty.relative(sparse['nats'], dense['nats'], sparse['clips'])


def lacks(measured: Mapping[str, Any]) -> str:
  """What the claim lacks; '' when the numbers show it."""
  why, vit = [], measured['stages'].get('vit')
  if not vit:
    why.append('vit was not run')
  elif vit['scores']['retrieval'][1] <= vit['scores']['majority'][0]:
    why.append('pictures do not find their captions more often than the most frequent caption is theirs')
  for pair in AIMS:
    d = difference(measured, pair)
    if d is None:
      why.append(f'{pair.stage} and {pair.than} were not both run')
    elif d.low <= pair.least:
      why.append(f'{pair.stage} minus {pair.than} is {d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f}), not surely above '
                 f'{pair.least:+.2f}')
  cost = switch(measured)
  if cost is None:
    why.append(f'{" and ".join(SWITCH)} were not both run')
  elif cost.high >= SWITCH_COSTS:
    why.append(f'sparse attention costs {cost.value:+.2%} ({cost.low:+.2%} to {cost.high:+.2%}) of the loss, not '
               f'surely less than {SWITCH_COSTS:.0%}')
  return '; '.join(why)


def record(measured: Mapping[str, Any]) -> pathlib.Path:
  """Writes docs/results/ladder.json, and from it the table of docs/ladder.md."""
  values = lambda found: {name: s[0] for name, s in found.items()}
  stages = {name: found for name, found in measured['stages'].items()}
  baselines = {arm: values(found) for arm, found in measured['baselines'].items()}
  baselines |= {name: values(stages[name]['scores']) for name in CONTROLS if name in stages}
  pairs = [pair._asdict() | d._asdict() for pair in AIMS if (d := difference(measured, pair))]
  slim = {name: {k: v for k, v in found.items() if k not in ('clips', 'earned', 'losses')}
          for name, found in stages.items()}
  if cost := switch(measured):
    lost = stages[SWITCH[0]]['losses']
    slim[SWITCH[0]]['switch'] = cost._asdict() | {'answers': len(lost['tokens']), 'tokens': sum(lost['tokens'])}
  path = results.record(
      'ladder', CLAIM, max((len(found.get('earned', ())) for found in stages.values()), default=0), baselines,
      {name: {'0': values(found['scores'])} for name, found in stages.items() if name not in CONTROLS},
      {name: {k: s[1:3] for k, s in found['scores'].items()} for name, found in stages.items()}, lacks(measured),
      rows={'baselines': measured['baselines'], 'stages': slim}, pairs=pairs)
  refresh()
  return path


def refresh() -> None:
  """The page from the evidence file."""
  results.put(PAGE, 'ladder', block(results.read('ladder')))


def table(measured: Mapping[str, Any]) -> list[str]:
  """Markdown: a line a stage or baseline, a column a score with its interval. The vision tower's own is not in it."""
  stages = {name: found for name, found in measured['stages'].items() if 'retrieval' not in found['scores']}
  rows = {arm: (found, '–') for arm, found in measured['baselines'].items()}
  rows |= {name: (found['scores'], f'{found["steps"]}, {found["train seconds"] / 60:.1f} min')
           for name, found in stages.items()}
  names = list(dict.fromkeys(name for found, _ in rows.values() for name in found if name != 'strict'))
  short = [name.removeprefix('accuracy/').replace('_', ' ') for name in names]
  lines = [f'| stage | steps, time | {" | ".join(short)} |', '|---' * (2 + len(names)) + '|']
  for arm, (found, spent) in rows.items():
    lines.append(f'| {arm} | {spent} | {" | ".join(map(cell, map(found.get, names)))} |')
  return lines + towers(measured)


def towers(measured: Mapping[str, Any]) -> list[str]:
  if not (vit := measured['stages'].get('vit')):
    return []
  found = vit['scores']
  return ['', f'vit: {vit["steps"]} steps, {vit["train seconds"] / 60:.1f} min. Pictures that find their caption: '
          f'{cell(found["retrieval"])} of {found["retrieval"][3]}; any caption {found["chance"][0]:.3f}, the most '
          f'frequent one {found["majority"][0]:.3f}.']


def cell(s: Sequence[float] | None) -> str:
  return f'{s[0]:.2f} ({s[1]:.2f}–{s[2]:.2f})' if s else '–'


def switched(measured: Mapping[str, Any]) -> list[str]:
  if not (cost := measured['stages'].get(SWITCH[0], {}).get('switch')):
    return []
  return [f'- Sparse attention ({SWITCH[0]}) against dense attention continued for the same steps ({SWITCH[1]}): loss '
          f'of an answer token {cost["value"]:+.2%}, 95% {cost["low"]:+.2%} to {cost["high"]:+.2%} over clips '
          f'({cost["answers"]:,} answers, {cost["tokens"]:,} tokens)']


def block(said: Mapping[str, Any]) -> str:
  """The generated part of the page, from the evidence file."""
  pairs = [f'- {p["stage"]} minus {p["than"]}: {p["value"]:+.3f} points a question, 95% {p["low"]:+.3f} to '
           f'{p["high"]:+.3f}, sign test over clips p = {p["p"]:.2g}' for p in said['pairs']]
  return '\n'.join([
      *table(said['rows']), '', *pairs, *switched(said['rows']), '',
      f'`{said["command"]}` on {said["hardware"]}; jax {said["versions"]["jax"]}, commit {said["commit"][:10]}, one '
      f'seed. {said["n"]} questions.', '', f'{said["claim"][0].upper()}{said["claim"][1:]}: {said["verdict"]}'
      + (f' ({said["why"]}).' if said['why'] else '.')])
