#!/bin/sh
# Servers that tests talk to, from Debian, where this machine lacks them. Tests start and end their own instances.
set -eu
missing=""
command -v redis-server >/dev/null || missing="$missing redis-server"
command -v initdb >/dev/null || [ -n "$(find /usr/lib/postgresql -name initdb 2>/dev/null)" ] || missing="$missing postgresql"
if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get -qq update
    # No service is to start: a policy of 101 refuses each.
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $missing >/dev/null
    rm /usr/sbin/policy-rc.d
fi
