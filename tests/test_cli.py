"""The command line without the commands: help, unknown names, exit codes, and no jax before it is needed."""
import subprocess
import sys
import types

import pytest

from data_pipelines.errors import InputError
from launch import cli


@pytest.fixture
def fake(monkeypatch):
  """Puts a command `fake` in the table; returns the module to hang `run` on."""
  module = types.ModuleType('fake_command')
  module.__doc__ = 'Does nothing.'
  module.add_arguments = lambda parser: parser.add_argument('--config')
  module.run = lambda args, config_args: 0
  monkeypatch.setitem(sys.modules, 'fake_command', module)
  monkeypatch.setitem(cli.COMMANDS, 'fake', ('fake_command', 'does nothing'))
  return module


def test_help_lists_every_command(capsys):
  assert cli.main(['--help']) == 0
  out = capsys.readouterr().out
  for name, (_, text) in cli.COMMANDS.items():
    assert name in out and text in out
  assert cli.main([]) == 2


def test_an_unknown_command_suggests_the_nearest(capsys):
  assert cli.main(['trian']) == 2
  assert capsys.readouterr().err == "keye: no command 'trian'; did you mean `keye train`?\n"
  assert cli.main(['xyz']) == 2
  assert 'there are quickstart, describe' in capsys.readouterr().err


def test_overrides_are_kept_apart_and_nothing_else_is_swallowed(fake, capsys):
  seen = []
  fake.run = lambda args, config_args: seen.append((args.config, config_args)) or 5
  assert cli.main(['fake', '--config.a.b=1', '--config', 'x.py:tiny', '--config.c', '2', '--config.d']) == 5
  assert seen == [('x.py:tiny', ['--config.a.b=1', '--config.c=2', '--config.d=true'])]
  for wrong in (['--conf'], ['stray'], ['--config.a=1', 'stray'], ['--configg=1']):
    with pytest.raises(SystemExit) as stopped:
      cli.main(['fake', *wrong])
    assert stopped.value.code == 2 and wrong[-1] in capsys.readouterr().err


def test_wrong_input_is_one_line_and_a_bug_is_a_traceback(fake, capsys):
  def wrong(args, config_args):
    raise InputError('a.jsonl:3: no "messages"')
  fake.run = wrong
  assert cli.main(['fake']) == 2
  assert capsys.readouterr().err == 'keye fake: a.jsonl:3: no "messages"\n'
  fake.run = lambda *_: 1 / 0
  with pytest.raises(ZeroDivisionError):
    cli.main(['fake'])
  def interrupted(*_):
    raise KeyboardInterrupt
  fake.run = interrupted
  assert cli.main(['fake']) == 130


def test_no_jax_for_help_or_a_misspelt_key():
  code = '''
import sys
from launch import cli
assert cli.main(['--help']) == 0
try:
  cli.main(['train', '--help'])
except SystemExit as e:
  assert e.code == 0
assert cli.main(['train', '--config', 'configs/sft.py:tiny', '--out', 'nowhere', '--config.train.stepz=1']) == 2
assert 'jax' not in sys.modules
'''
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  assert done.stderr == 'keye train: --config.train.stepz: no such key; did you mean --config.train.steps?\n'
  assert 'usage: keye train' in done.stdout and 'SIGTERM' in done.stdout


def test_a_process_on_a_cpu_begins_again_with_memory_that_is_kept(monkeypatch):
  begun = []
  monkeypatch.setattr(cli.os, 'execve', lambda program, argv, env: begun.append((program, argv, env)))
  monkeypatch.setattr(cli, 'main', lambda: 7)
  monkeypatch.setattr(cli.sys, 'platform', 'linux')
  monkeypatch.setattr(cli, 'ACCELERATORS', ())
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  cli.entry()
  (program, argv, env), = begun
  assert program == sys.executable and argv == sys.orig_argv and env['GLIBC_TUNABLES'] == cli.KEEP_MEMORY
  monkeypatch.setenv('GLIBC_TUNABLES', env['GLIBC_TUNABLES'])
  assert cli.entry() == 7 and len(begun) == 1        # the second time it is the command
  monkeypatch.delenv('GLIBC_TUNABLES')
  monkeypatch.setattr(cli, 'ACCELERATORS', ('/dev/nul[l]',))
  assert cli.entry() == 7 and len(begun) == 1


def test_the_command_runs_after_it_began_again():
  done = subprocess.run([sys.executable, '-m', 'launch.cli', 'trian'], capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr == "keye: no command 'trian'; did you mean `keye train`?\n"


@pytest.mark.parametrize('accelerators, level', [((), '3'), (('/dev/nul[l]',), None)])
def test_xla_is_quiet_where_there_is_no_accelerator(monkeypatch, accelerators, level):
  monkeypatch.setattr(cli.os, 'environ', {})
  monkeypatch.setattr(cli, 'ACCELERATORS', accelerators)
  cli.keep_compilations()
  assert cli.os.environ.get('TF_CPP_MIN_LOG_LEVEL') == level
