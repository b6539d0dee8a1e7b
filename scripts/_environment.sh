# Create the virtual environment .venv in the repository root and add it to PATH. Sourced by the other scripts.
#
# Packages are pinned by version and hash in requirements.lock. PYTHON selects the interpreter (3.11 or later), VENV the
# directory of the environment (default: .venv).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: no Python 3.11 or later with the venv module found; install one or set PYTHON to its path" >&2
    return 1
}

ensure_environment() {
    local stamp="$VENV/.installed" wanted python
    wanted=$(cat requirements.lock pyproject.toml hatch_build.py grok1/ops/cpu/native/* | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    python=$(find_python) || return 1
    echo "installing into $VENV (takes a minute or two)" >&2
    rm -f "$stamp"
    "$python" -m venv "$VENV" || return 1
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock || return 1
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . || return 1
    echo "$wanted" >"$stamp"
}

ensure_environment || exit 1
PATH="$VENV/bin:$PATH"
