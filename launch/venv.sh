# Sourced by the launch scripts: makes .venv in the repository root and installs the package with constraints.txt.
#   prepare_venv ''        the package
#   prepare_venv '[test]'  the package and its test extras
# A second call does nothing while setup.py and constraints.txt are unchanged, so it needs no network.

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$name"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed and none was found; install one or set PYTHON=/path/to/python3" >&2
  return 2
}

prepare_venv() {
  local extras=$1 python stamp wanted
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python) || exit 2
    "$python" -m venv .venv || {
      rm -rf .venv
      echo "error: $python cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2
      exit 2
    }
  elif ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: .venv does not work or is older than Python 3.11; remove it and run this again" >&2
    exit 2
  fi
  stamp=.venv/installed$extras
  wanted=$(cat setup.py constraints.txt | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing entrust_jax$extras into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
    echo "$wanted" >"$stamp"
  fi
}
