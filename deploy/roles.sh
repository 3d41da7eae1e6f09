#!/bin/sh
# Creates the roles of docker-compose.yml in a new database. The image of PostgreSQL runs it once, as the superuser.
#
#   hpo_owner      owns the tables: creates and migrates them (`hpo migrate`)
#   hpo_runner     runs searches: reads and writes rows
#   hpo_dashboard  serves the dashboard: reads and writes rows, which deleting a study needs
#
# The last two only read the tables that say which version the others have: whoever changes these stops every search.
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

-- The tables do not exist yet, and default privileges make no exceptions. So each statement that creates one takes the rights
-- back, whenever `hpo migrate` runs, and before anybody else sees the table.
CREATE FUNCTION keep_versions() RETURNS event_trigger LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE created text;
BEGIN
  FOR created IN SELECT object_identity FROM pg_catalog.pg_event_trigger_ddl_commands()
    WHERE object_identity IN ('public.hpo_schema', 'public.alembic_version', 'public.version_info')
  LOOP
    EXECUTE 'REVOKE INSERT, UPDATE, DELETE ON ' || created || ' FROM hpo_runner, hpo_dashboard';
  END LOOP;
END $$;
CREATE EVENT TRIGGER keep_versions ON ddl_command_end
  WHEN TAG IN ('CREATE TABLE', 'CREATE TABLE AS', 'SELECT INTO') EXECUTE FUNCTION keep_versions();

-- Large objects, which hpo does not use: anybody could fill the disk with them.
REVOKE EXECUTE ON FUNCTION lo_creat(integer), lo_create(oid), lo_from_bytea(oid, bytea), lo_import(text),
  lo_import(text, oid), lo_export(oid, text) FROM PUBLIC;
SQL
