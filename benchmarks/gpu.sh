#!/usr/bin/env bash
# Pairs per second, MFU and memory on one GPU against TRL, without network: see README.md beside this file.
#
#   benchmarks/gpu.sh [--only REGEX] [--budget_s S] [--record FILE]
#   benchmarks/gpu.sh --device cpu --size tiny --record FILE
exec "$(dirname "${BASH_SOURCE[0]}")/module.sh" benchmarks.gpu "$@"
