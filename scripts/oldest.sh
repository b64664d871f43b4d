#!/usr/bin/env bash
# The tests and the coverage of the oldest supported releases: run it from anywhere, on a machine that reaches PyPI.
# It takes some minutes, and 8 GB of disk for as long as it runs (less with torch's CPU wheels: see INDEX).
set -euo pipefail
cd "$(dirname "$0")/.."

# The lower bounds in pyproject.toml, and nothing else: raise both together. torchvision is the one of this torch.
pins=(torch==2.9.0 torchvision==0.24.0 timm==1.0.26 transformers==4.56.0 open_clip_torch==3.0.0 safetensors==0.5.0)
# Where torch comes from, if not from PyPI: INDEX=https://download.pytorch.org/whl/cpu scripts/oldest.sh
index=${INDEX:+--index-url $INDEX}

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
# shellcheck disable=SC1091
source "$environment/bin/activate"

# shellcheck disable=SC2086  # INDEX is two words, or none
pip install -q $index "${pins[@]:0:2}"
# scipy is for two architectures only. --no-deps, so that nothing that testreg asks for moves a pin.
pip install -q "${pins[@]}" matplotlib tqdm pytest scipy hatchling editables
pip install -q --no-deps --no-build-isolation -e .

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# Of the other tests, some build models that those releases do not have.
pytest tests/test_{register,families,calibrate,neurons,outliers,checkpoint,models,cli,readme,diagnose}.py
python scripts/coverage --brief
