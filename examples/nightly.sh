#!/bin/sh
# Run the sweep, or go on with the one that was interrupted, and check every model that it leaves behind.
#
#   sh nightly.sh [SWEEP.yaml [FLAGS of vitshrink sweep]]
#
# As a line of a crontab:  0 3 * * *  cd "$HOME/models" && sh nightly.sh
set -eu

sweep=${1:-sweep.yaml}
[ $# -eq 0 ] || shift

code=0
vitshrink sweep "$sweep" --output results --resume "$@" || code=$?

case $code in
    0) ;;
    3) echo "a bound is missed: see results/summary.md" >&2 ;;
    *) exit "$code" ;;
esac

for model in results/*/model; do
    vitshrink verify "$model"
done
exit "$code"
