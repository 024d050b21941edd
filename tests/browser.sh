#!/bin/sh
# Installs Chromium where no browser of its kind is found and apt-get can; else says that its tests are skipped.
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" > /dev/null; then exit 0; fi
done
if command -v apt-get > /dev/null; then
    if [ "$(id -u)" = 0 ]; then as=""; else as="sudo -n"; fi
    export DEBIAN_FRONTEND=noninteractive
    $as apt-get update -qq && $as apt-get install -qq -y --no-install-recommends chromium > /dev/null && exit 0
fi
echo "No Chromium, and none could be installed: the browser tests of the HTML report are skipped." >&2
