-- Two users of the database: one that owns the tables and migrates, one that works and can change no table.
--
--   createdb kontext
--   psql --dbname kontext --set ON_ERROR_STOP=1 --file postgresql-roles.sql      # as a superuser
--   psql --dbname kontext --command '\password kontext_owner'                     # and kontext_worker
--   KONTEXT_BATCH_DATABASE_URL=postgresql://kontext_owner:...@HOST/kontext kontext-batch db upgrade
--
-- Everything but `db upgrade` (workers, beats, people) connects as kontext_worker. The file may be run again; do so once
-- after the first `db upgrade`, which makes the table that its last statement is about.

DO $$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'kontext_owner') THEN
    CREATE ROLE kontext_owner LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE;
  END IF;
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'kontext_worker') THEN
    CREATE ROLE kontext_worker LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE;
  END IF;
  EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE format('GRANT CONNECT ON DATABASE %I TO kontext_owner, kontext_worker', current_database());
END
$$;

REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO kontext_owner;
GRANT USAGE ON SCHEMA public TO kontext_worker;

-- What kontext_owner makes from now on.
ALTER DEFAULT PRIVILEGES FOR ROLE kontext_owner IN SCHEMA public
  GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO kontext_worker;
ALTER DEFAULT PRIVILEGES FOR ROLE kontext_owner IN SCHEMA public
  GRANT USAGE ON SEQUENCES TO kontext_worker;

-- What is there already, in an installation that had one user for everything.
DO $$
DECLARE
  found record;
BEGIN
  FOR found IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP
    EXECUTE format('ALTER TABLE public.%I OWNER TO kontext_owner', found.tablename);
  END LOOP;
END
$$;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO kontext_worker;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO kontext_worker;

-- Which version's tables these are is the owner's to say.
DO $$
BEGIN
  IF to_regclass('public.alembic_version') IS NOT NULL THEN
    REVOKE INSERT, UPDATE, DELETE ON public.alembic_version FROM kontext_worker;
  END IF;
END
$$;
