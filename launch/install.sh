#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs this checkout on a host of a slice, into ~/ip2p/venv, with the versions of
# constraints.txt. The hosts' own Python may be older than ours: uv brings another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -m pip install --quiet --user uv
[[ -x ~/ip2p/venv/bin/python ]] || python3 -m uv venv --quiet --python 3.11 ~/ip2p/venv
python3 -m uv pip install --quiet --python ~/ip2p/venv/bin/python \
    --constraint constraints.txt --editable '.[tpu]'
