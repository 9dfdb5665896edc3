#!/bin/sh
# A Chromium for the tests that look at the parity report (marker browser). Those are skipped where there is none.
#
#   sh scripts/browser.sh             installs Debian's or Ubuntu's package where that is possible, else says how
#   K25_CHROMIUM=/path/to/chrome      makes the tests use another one
set -eu

say() { printf 'browser: %s\n' "$*"; }

for name in "${K25_CHROMIUM:-chromium}" chromium chromium-browser google-chrome google-chrome-stable chrome; do
  if command -v "$name" >/dev/null 2>&1; then
    say "$(command -v "$name") is there"
    exit 0
  fi
done

as_root=
if [ "$(id -u)" -ne 0 ]; then
  if command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root='sudo -n'
  else
    say 'no Chromium here, and no root to install one. Once: sudo apt-get install chromium (or set K25_CHROMIUM).'
    exit 0
  fi
fi
if ! command -v apt-get >/dev/null 2>&1; then
  say 'no Chromium here, and no apt-get. Install Chromium or Chrome in your own way (or set K25_CHROMIUM).'
  exit 0
fi

install() { DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1; }

say 'installing chromium'
if install || { $as_root apt-get update >/dev/null 2>&1 && install; }; then
  say 'done'
else
  say 'apt-get could not install chromium; the tests that need it are skipped. To see why: apt-get install chromium'
fi
