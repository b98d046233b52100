#!/usr/bin/env bash
# Puts together what a Space of Hugging Face needs: `bash deploy/space/make.sh YOU/NAME FOLDER`; nothing is sent.
set -euo pipefail
name=${1:?the Space: YOU/NAME} out=${2:?a new folder}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir "$out" # not into a folder that holds something
cp -R deploy/space/. moevision LICENSE NOTICE "$out"
rm "$out/make.sh"
find "$out" -name __pycache__ -prune -exec rm -r {} +
cp docs/img/explorer.jpg "$out/thumbnail.jpg"
# The card that others see when the Space is shared: its address is known now.
sed -i.bak "s|^app_file:|thumbnail: https://huggingface.co/spaces/$name/resolve/main/thumbnail.jpg\napp_file:|" "$out/README.md"
rm "$out/README.md.bak"
