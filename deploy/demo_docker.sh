#!/usr/bin/env bash
# Run the demo as on a cluster: data from DVC, every step in a container, a registered model. `make demo-docker` starts the servers
# of tests/helpers/services.py and calls this script with their addresses and keys in the environment.
set -euo pipefail
out=$1
data=$out/data
mkdir -p "$out"

if [ ! -e "$data/.git" ]; then
  echo "== painted scenes, versioned by DVC"
  pixelclip toy --out "$out/toy" --params params.yaml
  mkdir -p "$data"
  cp -r "$out/toy/images" "$out/toy/toy" "$data/"
  (
    cd "$data"
    git init -q -b main
    dvc init -q
    dvc config core.analytics false
    dvc remote add -q -d store "$DVC_REMOTE_URL"
    dvc add -q images toy
    git add .
    git -c user.name=demo -c user.email=demo@example.com commit -qm "Painted scenes"
  )
fi
echo "== push to the DVC remote $DVC_REMOTE_URL at $AWS_ENDPOINT_URL"
(cd "$data" && dvc add -q images toy && dvc push -q && rm -rf .dvc/cache)  # the remote keeps the only copy

echo "== the pipeline, every step in a container of $PIXELCLIP_IMAGE"
pixelclip pipeline run --runner docker --repo "$data" --revision main --images images --labelled toy \
  --out "$out" --params params.yaml

echo "== where the champion comes from"
pixelclip lineage models:/pixelclip-toy@champion
