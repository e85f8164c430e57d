"""The documentation names files and commands that exist, and shows the numbers that were recorded."""
import argparse
import importlib
import pathlib
import re
import shlex

import pytest

from launch import balance_page, bench_page, cli, kernels_page, ladder_page, results, retrofit_page, scale_page

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ['README.md', 'CONTRIBUTING.md', 'docs/papers.md', 'docs/kernels.md', 'docs/scale.md', 'docs/lossless.md',
         'docs/failures.md', 'docs/data.md', 'docs/ladder.md', 'docs/watching.md']
FOLDERS = ('', 'pallas_kernels', 'data_pipelines', 'keye_jax', 'tests/data_pipelines')
# What the documentation names without promising that it lies in the checkout.
ELSEWHERE = re.compile(r'runs/|(loss|data|heldout)/|metrics\.jsonl$|(tensorboard|profile)/$|'
                       r'~/|report\.html$|dataset\.json$|(reference|xla|tpu|gpu|__init__|utils)\.py$')


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
  assert results.shown(results.README, 'quickstart') == results.readme_block(results.read('quickstart'))


def test_kernels_page_shows_what_was_recorded():
  assert results.shown(kernels_page.PAGE, 'kernels_aot') == kernels_page.block(results.read('kernels_aot'))


@pytest.mark.parametrize('name', ['kernels_cpu', 'kernels_gpu'])
def test_kernels_page_shows_what_was_timed(name):
  assert results.shown(kernels_page.PAGE, name) == kernels_page.block_timed(results.read(name))


@pytest.mark.parametrize('name', ['model', 'model_zen4', 'video'])
def test_pages_show_what_benchmarks_recorded(name):
  assert results.shown(bench_page.PAGES[name], name) == bench_page.block(name, results.read(name))


@pytest.mark.parametrize('table', ['scale', 'scale_gpu'])
def test_scale_page_shows_what_was_recorded(table):
  assert results.shown(scale_page.PAGE, table) == scale_page.block(results.read(table))


def test_scale_page_shows_the_balance_that_was_recorded():
  assert results.shown(balance_page.PAGE, 'balance') == balance_page.block(results.read('balance'))


def test_lossless_page_shows_what_was_recorded():
  said = results.read('lossless')
  assert results.shown(retrofit_page.PAGE, 'lossless') == retrofit_page.block(said)
  for name, svg in retrofit_page.plots(next(iter(said['rows'].values()))).items():
    assert (retrofit_page.PAGE.parent / name).read_text() == svg + '\n'


def test_lossless_page_shows_the_control_that_was_measured_by_itself():
  said = results.read('lossless_control')
  assert results.shown(retrofit_page.PAGE, 'lossless_control') == retrofit_page.control_block(said)


def test_ladder_page_shows_what_was_recorded():
  assert results.shown(ladder_page.PAGE, 'ladder') == ladder_page.block(results.read('ladder'))


@pytest.mark.parametrize('change, why', [
  ({}, ''),
  ({'temp bytes': 5 * 2**30}, 'dsa_attention backward on v6e at 262144/8 is over its limit'),
  ({'error': 'RESOURCE_EXHAUSTED'}, 'dsa_attention backward on v6e at 262144/8 does not compile'),
  ({'limit bytes': None}, 'no row of v6e backward'),
])
def test_the_claim_about_kernels_needs_every_row(change, why):
  rows = [{'op': 'dsa_attention', 'direction': direction, 'target': target, 'length': 262144, 'shards': 8,
           'limit bytes': limit, 'temp bytes': limit} for target in kernels_page.TARGETS
          for direction, limit in kernels_page.LIMITS.items()]
  rows[3] |= change
  assert kernels_page.lacks(rows) == why
