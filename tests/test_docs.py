"""The documentation names files and commands that exist, and shows the numbers that were recorded."""
import argparse
import importlib
import json
import pathlib
import re
import shlex

import pytest

from launch import balance_page, cli, kernels_page, ladder_page, results, retrofit_page, scale_page

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ['README.md', 'CONTRIBUTING.md', 'docs/papers.md', 'docs/kernels.md', 'docs/scale.md', 'docs/lossless.md',
         'docs/failures.md', 'docs/data.md', 'docs/ladder.md']
FOLDERS = ('', 'pallas_kernels', 'data_pipelines', 'keye_jax', 'tests/data_pipelines')
# What the documentation names without promising that it lies in the checkout.
ELSEWHERE = re.compile(r'runs/|~/|report\.html$|dataset\.json$|(reference|xla|tpu|gpu|__init__|utils)\.py$')


@pytest.mark.parametrize('page', PAGES)
def test_files_that_are_named_exist(page):
  quoted = re.findall(r'`([^`\s]+)`', (ROOT / page).read_text())
  paths = [q.split(':')[0] for q in quoted if re.search(r'/|\.(py|md|json|toml|sh)\b', q) and '<' not in q]
  missing = [p for p in paths if not ELSEWHERE.search(p) and not any((ROOT / f / p).exists() for f in FOLDERS)]
  assert len(paths) > 3 and not missing, missing


def commands() -> list[list[str]]:
  lines = re.findall(r'^keye .*$', (ROOT / 'README.md').read_text(), re.M)
  return [shlex.split(re.split(r'\s{3,}', line)[0])[1:] for line in lines]


@pytest.mark.parametrize('words', commands(), ids=' '.join)
def test_commands_that_are_shown_parse(words):
  module = importlib.import_module(cli.COMMANDS[words[0]][0])
  parser = argparse.ArgumentParser(exit_on_error=False)
  module.add_arguments(parser)
  cli.split(parser, words[1:])


def test_every_command_is_on_the_ladder_and_in_the_help(capsys):
  assert {words[0] for words in commands()} == set(cli.COMMANDS)
  assert cli.main(['--help']) == 0
  said = capsys.readouterr().out
  assert all(name in said for name in cli.COMMANDS)


def test_readme_shows_what_was_recorded():
  shown = (ROOT / 'README.md').read_text().split(results.START)[1].split(results.END)[0].strip()
  recorded = results.FOLDER / 'quickstart.json'
  assert shown == (results.readme_block(json.loads(recorded.read_text())) if recorded.exists() else '')


def test_kernels_page_shows_what_was_recorded():
  shown = kernels_page.PAGE.read_text().split(kernels_page.START)[1].split(kernels_page.END)[0].strip()
  assert shown == kernels_page.block(json.loads((results.FOLDER / 'kernels_aot.json').read_text()))


def test_kernels_page_shows_what_was_timed():
  shown = kernels_page.PAGE.read_text().split(kernels_page.TIMED_START)[1].split(kernels_page.END)[0].strip()
  recorded = kernels_page.TIMED
  assert shown == kernels_page.block_timed(json.loads(recorded.read_text()) if recorded.exists() else None)


@pytest.mark.parametrize('table', ['scale', 'scale_gpu'])
def test_scale_page_shows_what_was_recorded(table):
  shown = scale_page.PAGE.read_text().split(scale_page.start(table))[1].split(scale_page.END)[0].strip()
  assert shown == scale_page.block(json.loads((results.FOLDER / f'{table}.json').read_text()))


def test_scale_page_shows_the_balance_that_was_recorded():
  shown = balance_page.PAGE.read_text().split(balance_page.START)[1].split(balance_page.END)[0].strip()
  assert shown == balance_page.block(json.loads((results.FOLDER / 'balance.json').read_text()))


def test_lossless_page_shows_what_was_recorded():
  page = retrofit_page.PAGE.read_text()
  shown = page.split(retrofit_page.START)[1].split(retrofit_page.END)[0].strip()
  recorded = results.FOLDER / 'lossless.json'
  said = json.loads(recorded.read_text()) if recorded.exists() else None
  assert shown == (retrofit_page.block(said) if said else '')
  for name, svg in (retrofit_page.plots(next(iter(said['rows'].values()))) if said else {}).items():
    assert (retrofit_page.PAGE.parent / name).read_text() == svg + '\n'


def test_ladder_page_shows_what_was_recorded():
  shown = ladder_page.PAGE.read_text().split(ladder_page.START)[1].split(ladder_page.END)[0].strip()
  recorded = results.FOLDER / 'ladder.json'
  assert shown == (ladder_page.block(json.loads(recorded.read_text())) if recorded.exists() else '')


@pytest.mark.parametrize('change, why', [
  ({}, ''),
  ({'temp bytes': 5 * 2**30}, 'dsa_attention backward on v6e at 262144/8 is over its limit'),
  ({'error': 'RESOURCE_EXHAUSTED'}, 'dsa_attention backward on v6e at 262144/8 does not compile'),
  ({'limit bytes': None}, 'no row of v6e backward'),
])
def test_the_claim_about_kernels_needs_every_row(change, why):
  rows = [{'op': 'dsa_attention', 'direction': direction, 'target': target, 'length': 262144, 'shards': 8,
           'limit bytes': limit, 'temp bytes': limit} for target in kernels_page.TPUS
          for direction, limit in kernels_page.LIMITS.items()]
  rows[3] |= change
  assert kernels_page.lacks(rows) == why
