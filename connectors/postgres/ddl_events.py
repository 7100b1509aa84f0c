"""Event triggers that write DDL into the stream: what was changed is known at its very place among the changes.

Optional (`cdc setup --ddl-events`), for creating them takes a superuser. They emit a transactional logical message
(prefix `cdc`) that names the command and the objects, never a statement's text or a value; the daemon looks at the
catalog at once when one arrives. They never make anybody's DDL fail. Shared by all sources of a database; without
them the catalog is looked at every `watch_every_s` seconds and at each Relation message.
"""

from __future__ import annotations

from typing import Any

import psycopg

TRIGGERS = {
    "cdc_ddl_end": "ddl_command_end",
    "cdc_ddl_drop": "sql_drop",
    "cdc_ddl_rewrite": "table_rewrite",
}

FUNCTION = """create or replace function cdc.ddl_event() returns event_trigger
language plpgsql set search_path = pg_catalog as $cdc$
declare objects jsonb;
begin
  if tg_event = 'ddl_command_end' then
    select jsonb_agg(jsonb_build_object('oid', objid::int8, 'type', object_type, 'name', object_identity)) into objects
    from (select * from pg_event_trigger_ddl_commands() where coalesce(schema_name, '') <> 'pg_temp' limit 100) c;
  elsif tg_event = 'sql_drop' then
    select jsonb_agg(jsonb_build_object('oid', objid::int8, 'type', object_type, 'name', object_identity)) into objects
    from (select * from pg_event_trigger_dropped_objects() where original and not is_temporary limit 100) c;
  else
    objects := jsonb_build_array(jsonb_build_object(
      'oid', pg_event_trigger_table_rewrite_oid()::int8, 'reason', pg_event_trigger_table_rewrite_reason()));
  end if;
  if objects is not null then
    perform pg_logical_emit_message(true, 'cdc',
      jsonb_build_object('ddl', tg_tag, 'event', tg_event, 'objects', objects)::text);
  end if;
exception when others then
  raise log 'cdc.ddl_event: %', sqlerrm;
end $cdc$"""


def install_sql(connection: psycopg.Connection[Any]) -> list[str]:
    """The statements that are missing for the triggers to be there."""
    there = _there(connection)
    if len(there) == len(TRIGGERS):
        return []
    statements = ["create schema if not exists cdc", FUNCTION]
    for name, event in TRIGGERS.items():
        if name not in there:
            statements.append(f"create event trigger {name} on {event} execute function cdc.ddl_event()")
            # Also for DDL that another replication applies.
            statements.append(f"alter event trigger {name} enable always")
    return statements


def remove_sql(connection: psycopg.Connection[Any]) -> list[str]:
    """The statements that remove what is there of it; the schema stays, it may hold acknowledgements."""
    there = _there(connection)
    statements = [f"drop event trigger {name}" for name in TRIGGERS if name in there]
    return [*statements, "drop function if exists cdc.ddl_event()"] if statements else []


def _there(connection: psycopg.Connection[Any]) -> set[str]:
    rows = connection.execute("select evtname from pg_event_trigger where evtname = any(%s)", [list(TRIGGERS)])
    return {name for (name,) in rows.fetchall()}
