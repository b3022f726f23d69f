# Sourced by the project's scripts: makes .venv in the checkout, with the tested versions, and
# enters it. Usage: source tools/setup.sh EXTRAS (of setup.py, with commas). Does nothing a second time, and
# nothing with SETUP=no in the environment: the active one is taken, such as that of a container.

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
        "$(command -v uv >/dev/null && uv python find 3.12 2>/dev/null)" python3 python; do
        # A pyenv shim may exist and answer with an error: ask, do not look.
        if [ -n "$candidate" ] && "$candidate" -c \
            'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

pip_install() { # ROOT WORDS: into its .venv, in the tested versions
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
        # An environment whose interpreter is gone or another is made anew.
        "$root/.venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' \
            2>/dev/null || "$python" -m venv --clear "$root/.venv" || return 1
        echo "installing into .venv (a few minutes, some GB for torch)" >&2
        others=${extra//gpu/}
        others=${others//,,/,}
        others=${others#,}
        others=${others%,}
        pip_install "$root" -e "$root${others:+[$others]}" || return 1
        if [ "$others" != "$extra" ]; then
            # A part of Transformer Engine is compiled against the torch that is there by now. In an
            # environment of its own pip would take the newest torch for that.
            pip_install "$root" wheel ninja || return 1
            pip_install "$root" --no-build-isolation -e "$root[$extra]" || return 1
        fi
        touch "$stamp"
    fi
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate"
}

[ "${SETUP:-yes}" = no ] || setup "$1"
