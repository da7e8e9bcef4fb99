#!/usr/bin/env bash
# Processes that end with the same status, some seconds apart: STATUS [SECONDS]
read -ra launch <<< "$LAUNCH"
exec "${launch[@]}" -c "import os, sys, time; time.sleep(${2:-3} * int(os.environ['SLURM_PROCID'])); sys.exit($1)"
