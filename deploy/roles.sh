#!/bin/sh
# Creates the roles of docker-compose.yml in a new database. The image of PostgreSQL runs it once, as the superuser.
#
#   hpo_owner      owns the tables: creates and migrates them (`hpo migrate`)
#   hpo_runner     runs searches: reads and writes rows
#   hpo_dashboard  serves the dashboard: reads and writes rows, which deleting a study needs
set -eu
password_of() { sed -n 's#^postgresql://[^:]*:\([^@]*\)@.*$#\1#p' "${SECRETS:-/run/secrets}/$1"; }
OWNER=$(password_of owner_url) RUNNER=$(password_of runner_url) DASHBOARD=$(password_of dashboard_url)
export OWNER RUNNER DASHBOARD
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
\getenv owner OWNER
\getenv runner RUNNER
\getenv dashboard DASHBOARD
CREATE ROLE hpo_owner LOGIN PASSWORD :'owner';
CREATE ROLE hpo_runner LOGIN PASSWORD :'runner';
CREATE ROLE hpo_dashboard LOGIN PASSWORD :'dashboard';
REVOKE ALL ON DATABASE :"DBNAME", postgres, template1 FROM PUBLIC;
GRANT CONNECT ON DATABASE :"DBNAME" TO hpo_owner, hpo_runner, hpo_dashboard;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO hpo_owner;
GRANT USAGE ON SCHEMA public TO hpo_runner, hpo_dashboard;
ALTER DEFAULT PRIVILEGES FOR ROLE hpo_owner IN SCHEMA public
  GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO hpo_runner, hpo_dashboard;
ALTER DEFAULT PRIVILEGES FOR ROLE hpo_owner IN SCHEMA public GRANT USAGE ON SEQUENCES TO hpo_runner, hpo_dashboard;
SQL
