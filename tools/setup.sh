# Sourced by the project's scripts: creates .venv in the checkout, installs the tested versions into it, and
# activates it. Usage: source tools/setup.sh EXTRAS (extras of setup.py, separated by commas). A second call installs
# nothing. With SETUP=no in the environment this file does nothing, and the active environment (such as that of a
# container) is used.

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
        "$(command -v uv >/dev/null && uv python find 3.12 2>/dev/null)" python3 python; do
        # Run each candidate: a pyenv shim may exist and still fail.
        if [ -n "$candidate" ] && "$candidate" -c \
            'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

pip_install() { # ROOT ARGUMENTS: runs pip install in ROOT/.venv, with the tested versions as constraints
    local root=$1
    shift
    "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check \
        -c "$root/examples/constraints.txt" "$@"
}

setup() {
    local extra=$1 root stamp python others
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    stamp=$root/.venv/installed-$extra-$(cat "$root/setup.py" "$root/examples/constraints.txt" \
        | sha256sum | cut -c1-16)
    if [ ! -e "$stamp" ]; then
        if ! python=$(find_python); then
            echo "error: no Python 3.12 found: install it (for example: uv python install 3.12," \
                "or pyenv install 3.12), or name one with PYTHON=/path/to/python3.12" >&2
            return 1
        fi
        # Create the environment again if its interpreter is gone or is not Python 3.12.
        "$root/.venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' \
            2>/dev/null || "$python" -m venv --clear "$root/.venv" || return 1
        echo "installing into .venv (a few minutes, some GB for torch)" >&2
        others=${extra//gpu/}
        others=${others//,,/,}
        others=${others#,}
        others=${others%,}
        pip_install "$root" -e "$root${others:+[$others]}" || return 1
        if [ "$others" != "$extra" ]; then
            # A part of Transformer Engine is compiled against torch, which is installed by now. With build
            # isolation pip would compile it against the newest torch instead.
            pip_install "$root" wheel ninja || return 1
            pip_install "$root" --no-build-isolation -e "$root[$extra]" || return 1
        fi
        touch "$stamp"
    fi
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate"
}

[ "${SETUP:-yes}" = no ] || setup "$1"
