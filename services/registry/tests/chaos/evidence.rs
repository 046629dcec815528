//! What the replicas hold in the end, read from their SQLite files.

use std::{collections::BTreeMap, path::Path};

use hiqlite::rusqlite::{Connection, OpenFlags, Result, Row as SqlRow, types::Value};

use crate::history::{Event, Holdings, Object, Row};

/// Not what is a replica's own: which entries it has applied, and what its query planner has learnt.
const SHARED: &str = "name <> '_metadata' AND name NOT LIKE 'sqlite_stat%'";

/// Reads one replica's file.
pub(crate) fn read(database: &Path) -> Result<Holdings> {
    let connection = Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let all = connection.unchecked_transaction()?;
    let names = format!("SELECT name FROM sqlite_master WHERE type = 'table' AND {SHARED} ORDER BY name");
    let names: Vec<String> = all.prepare(&names)?.query_map([], |row| row.get(0))?.collect::<Result<_>>()?;
    let mut tables: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in names {
        tables.insert(name.clone(), rows(&all, &format!("SELECT * FROM \"{name}\" ORDER BY 1"))?);
    }
    let schema = format!("SELECT type, name, tbl_name, sql FROM sqlite_master WHERE {SHARED} ORDER BY type, name");
    tables.insert("sqlite_master".into(), rows(&all, &schema)?);
    let epoch: i64 = all.query_row("SELECT coalesce(max(epoch), 0) FROM leases", [], |row| row.get(0))?;
    Ok(Holdings { tables, events: events(&all)?, rows: objects(&all)?, epoch: epoch.try_into().unwrap() })
}

fn rows(connection: &Connection, sql: &str) -> Result<Vec<String>> {
    let mut statement = connection.prepare(sql)?;
    let columns = statement.column_count();
    let text = |row: &SqlRow<'_>| {
        let values: Result<Vec<Value>> = (0..columns).map(|column| row.get(column)).collect();
        Ok(format!("{:?}", values?))
    };
    statement.query_map([], text)?.collect()
}

fn events(connection: &Connection) -> Result<Vec<Event>> {
    let sql = "SELECT revision, entity, entity_id, coalesce(to_state, '') FROM events ORDER BY revision";
    let event = |row: &SqlRow<'_>| {
        let (revision, entity): (i64, String) = (row.get(0)?, row.get(1)?);
        let object = Object::of(&entity, row.get(2)?);
        Ok(Event { revision: revision.try_into().unwrap(), object, to_state: row.get(3)? })
    };
    connection.prepare(sql)?.query_map([], event)?.collect()
}

fn objects(connection: &Connection) -> Result<BTreeMap<Object, Row>> {
    let sql = "SELECT 'vm', id, state, generation, 0 FROM vms \
        UNION ALL SELECT 'job', id, state, generation, attempt FROM jobs \
        UNION ALL SELECT 'node', id, state, incarnation, 0 FROM nodes";
    let object = |row: &SqlRow<'_>| {
        let (entity, generation): (String, i64) = (row.get(0)?, row.get(3)?);
        let generation = generation.try_into().unwrap();
        Ok((Object::of(&entity, row.get(1)?), Row { state: row.get(2)?, generation, attempt: row.get(4)? }))
    };
    connection.prepare(sql)?.query_map([], object)?.collect()
}
