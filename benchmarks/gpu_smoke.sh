#!/usr/bin/env bash
# Equal numbers from all engines and what they cost, on one GPU, without network: see README.md beside this file.
#
#   benchmarks/gpu_smoke.sh [--budget_s S] [--only REGEX] [--record FILE]
#   benchmarks/gpu_smoke.sh --device cpu --size tiny --record FILE
exec "$(dirname "${BASH_SOURCE[0]}")/module.sh" benchmarks.gpu_smoke "$@"
