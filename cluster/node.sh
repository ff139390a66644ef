#!/usr/bin/env bash
# Prepares a cloud machine (Ubuntu 22.04): shared storage, Python 3.11, the project's own lock. aws.yaml and gcp.yaml
# call it on every node, head included, so that driver and workers run the same packages; a second call does little.
#   bash cluster/node.sh SERVER:/PATH
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "node.sh: error: $1" >&2; exit 2; }

storage=${1:-}
[[ $storage == *:/* ]] || fail "the shared storage is '$storage'; write SERVER:/PATH"
[[ $storage != *CHANGE-ME* ]] || fail "the shared storage is still '$storage'; write your own into the cluster's YAML file"

export DEBIAN_FRONTEND=noninteractive
if ! command -v python3.11 >/dev/null || ! command -v g++ >/dev/null || ! command -v mount.nfs4 >/dev/null; then
  sudo apt-get update -qq
  sudo apt-get install -y -qq software-properties-common nfs-common g++
  sudo add-apt-repository -y ppa:deadsnakes/ppa # Ubuntu 22.04 itself has 3.10
  sudo apt-get install -y -qq python3.11 python3.11-venv python3.11-dev
fi

if ! mountpoint -q /shared; then
  sudo mkdir -p /shared
  sudo mount -t nfs4 -o nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2 "$storage" /shared \
    || sudo mount -t nfs -o nfsvers=3,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2 "$storage" /shared \
    || fail "$storage cannot be mounted; let port 2049 through from these machines"
  sudo mkdir -p /shared/runs /shared/models
  sudo chown "$(id -u):$(id -g)" /shared/runs /shared/models
fi

chmod 600 ~/.ray/auth_token || fail "no token in ~/.ray/auth_token; make one first: ray get-auth-token --generate"
RAIRL_LOCK=requirements/cuda.txt bash requirements/install.sh
grep -q rairl ~/.bashrc || cat >>~/.bashrc <<TEXT
# rairl
export PATH=$PWD/.venv/bin:\$PATH RAY_AUTH_MODE=token HF_HOME=/shared/models
TEXT
