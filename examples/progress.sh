# Sourced by the examples: runs a command, writes its output to a log, and shows its progress.

run_logged() { # LOG COMMAND...: the terminal shows the iteration and the name of the log after some seconds, and the
    # last error line if the command fails
    local log=$1 watch status=0
    shift
    : >"$log"
    watch_log "$log" >&2 &
    watch=$!
    "$@" >"$log" 2>&1 || status=$?
    kill "$watch" 2>/dev/null || true
    wait "$watch" 2>/dev/null || true
    [ "$status" -eq 0 ] || say_failed "$log"
    return "$status"
}

watch_log() { # LOG: prints a line every 30 s, or updates one line every 5 s on a terminal. Ends with the script.
    local log=$1 every=30 start=$SECONDS clear='' end=$'\n'
    [ ! -t 2 ] || every=5 clear=$'\r\033[K' end=''
    trap 'kill $! 2>/dev/null; printf %s "$clear"; exit' TERM
    while true; do
        # In the background, so that a signal is handled at once; without the script's pipes, so that it cannot keep
        # them open.
        sleep "$every" </dev/null >/dev/null 2>&1 &
        wait $!
        kill -0 $$ 2>/dev/null || exit 0
        printf '%s   %d s%s (log: %s)%s' "$clear" $((SECONDS - start)) "$(iteration_in "$log")" "$log" "$end"
    done
}

iteration_in() { # LOG: prints the last iteration in the log, after a comma
    local words
    read -r -a words < <(grep -aoE ' iteration +[0-9]+/ *[0-9]+' "$1" | tail -n 1 | tr / ' ') || true
    [ "${#words[@]}" -lt 3 ] || printf ', iteration %d of %d' "${words[@]:1}"
}

say_failed() { # LOG: prints the last error line of the log, and the log's name
    local line
    line=$(grep -a '^error: ' "$1" | tail -n 1 || true)
    [ -n "$line" ] || line=$(grep -aE '^(\[rank[0-9]+\]: )?[A-Za-z_.]*(Error|Exception)(:|$)' "$1" | tail -n 1 || true)
    [ -n "$line" ] || line=$(tail -n 1 "$1")
    line=${line#error: }
    echo "error: ${line//[[:cntrl:]]/?} (all of the output is in $1)" >&2
}
