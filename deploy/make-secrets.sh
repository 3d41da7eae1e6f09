#!/bin/sh
# Creates the passwords that docker-compose.yml mounts, in the folder secrets/ next to it. Existing ones are kept.
set -eu
cd "$(dirname "$0")/.."
# Nobody else may enter the folder. The files themselves are readable: containers run as other users, and see each file alone.
mkdir -p -m 700 secrets
password() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }
create() { [ -e "secrets/$1" ] || (umask 022 && printf '%s\n' "$2" > "secrets/$1"); }
create superuser_password "$(password)"
for role in owner runner dashboard; do
  create "${role}_url" "postgresql://hpo_$role:$(password)@database:5432/hpo"
done
create dashboard_password "$(password)"
create ray_token "$(password)$(password)"
echo "The password of the dashboard, for any user name: $(cat secrets/dashboard_password)"
