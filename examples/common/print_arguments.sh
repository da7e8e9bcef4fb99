#!/usr/bin/env bash
# In place of an interpreter or a launcher: prints its arguments, one a line.
printf '%s\n' "$@"
