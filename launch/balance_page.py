"""The table about balance in docs/scale.md, from its evidence file:

  keye bench balance --json --out docs/results/balance.json
  python -m launch.balance_page
"""
from collections.abc import Mapping
from typing import Any

from launch import results

PAGE = results.FOLDER.parent / 'scale.md'
MIB = 2**20
NAMES = {'none': 'none', 'rank': 'frames over the devices of a rank', 'vision': 'frames over all devices',
         'rows': 'rows of a step', 'both': 'frames and rows'}


def block(said: Mapping[str, Any]) -> str:
  """The generated part of the page."""
  found, lines = said['simulated'], [
      '| balance | waiting: vision tower | language model | step | step, s | faster | as compiled: step, s | faster |',
      '|---' * 8 + '|']
  for arm, kinds in found['seconds'].items():
    work, compiled, gain = kinds['work'], kinds['compiled'], said['gains'][arm]
    cells = [NAMES[arm], *(f'{work[k]:.1%}' for k in ('idle_vision', 'idle_language', 'idle')), f'{work["step_s"]:.2f}',
             f'{gain["work"]:.1%}', f'{compiled["step_s"]:.2f}', f'{gain["compiled"]:.1%}']
    lines.append(f'| {" | ".join(cells)} |')
  setting, seen, sent = found['setting'], found['seen'], found['exchange']
  rows = found['rows']
  a_row = lambda n: f'{n / seen["rows"]:,.0f}'
  lines += ['', f'{found["batches"]} steps of {setting["ranks"] * setting["micro"]} rows in {setting["micro"]} '
            f'micro-batches on {setting["ranks"]} ranks of {setting["devices"]} devices ({setting["chip"]}, '
            f'{setting["efficiency"]:.0%} of the peak), seed {setting["seed"]}: {seen["samples"]:,} samples, '
            f'{a_row(seen["tokens"])} tokens a row of which {a_row(seen["units"])} are vision, the largest frame '
            f'{seen["largest"]:,}; {seen["skipped"]} more samples fit no row. The vision tower has room for '
            f'{setting["room"]:.0%} of its slots: enough in {seen["fit"]} of {seen["micro"]} micro-batches.', '',
            f'The exchange, for the device with most of it: {sent["patch_bytes"] / MIB:.0f} MiB of patches and '
            f'{sent["embedding_bytes"] / MIB:.0f} MiB of embeddings a micro-batch, {sent["sent_bytes"] / MIB:.0f} MiB '
            f'with recomputation and gradients over two axes; at {sent["link_bytes_a_second"] / 1e9:.0f} GB/s '
            f'{1e3 * sent["step_s"]:.0f} ms a step, which the gains have paid, as they have the '
            f'{1e3 * rows["step_s"]:.0f} ms in which {rows["rows"]:.1f} rows leave a rank and as many come to it, '
            f'{rows["row_bytes"] / MIB:.0f} MiB of each on a device.', '',
            f'`{said["command"]}`, commit {said["commit"][:10]}. '
            f'{said["claim"][0].upper()}{said["claim"][1:]}: {said["verdict"]}'
            + (f' ({said["why"]}).' if said['why'] else '.')]
  return '\n'.join(lines)


def main() -> None:
  results.put(PAGE, 'balance', block(results.read('balance')))


if __name__ == '__main__':
  main()
