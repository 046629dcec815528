//! What a query may ask for: reading the public tables with harmless functions.
//!
//! SQLite asks the authorizer about each thing a statement would do while it compiles it, so a refused statement never
//! starts. The lists name what is allowed; whatever a later SQLite adds is refused until it is listed.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use blixard::error::{Error, Reason};
use rusqlite::{
    Connection,
    hooks::{AuthAction, AuthContext, Authorization},
};

/// The tables of docs/SCHEMA.md, and SQLite's two for JSON.
const TABLES: [&str; 8] = ["vms", "jobs", "attempts", "late_reports", "nodes", "vm_events", "json_each", "json_tree"];
/// The table below `vm_events`, read through that view only.
const BEHIND_VM_EVENTS: &str = "events";

/// SQLite's functions on values, times, JSON and windows. Not among them: what loads code, reads the process's state or
/// drives a full-text index.
const FUNCTIONS: &str = "abs avg ceil ceiling char coalesce concat concat_ws count cume_dist date datetime dense_rank exp
    first_value floor format glob group_concat hex if ifnull iif instr json json_array json_array_length json_extract
    json_group_array json_group_object json_object json_patch json_pretty json_quote json_remove json_replace json_insert
    json_set json_type json_valid json_error_position julianday lag last_value lead length like likely likelihood ln log
    log10 log2 lower ltrim max median min mod nth_value ntile nullif octet_length percent_rank percentile percentile_cont
    percentile_disc pow power printf quote radians random randomblob rank replace round row_number rtrim sign soundex sqrt
    strftime string_agg substr substring sum time timediff total trim trunc typeof unhex unicode unistr unixepoch unlikely
    upper zeroblob -> ->> current_date current_time current_timestamp sqlite_version subtype match";

/// What was refused, if anything was.
#[derive(Clone, Default)]
pub(crate) struct Refused(Arc<Mutex<Option<Error>>>);

impl Refused {
    pub(crate) fn take(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Lets the connection compile nothing but queries from now on.
pub(crate) fn enforce(connection: &Connection) -> rusqlite::Result<Refused> {
    let mut names = connection.prepare("SELECT name FROM sqlite_schema")?;
    let private: BTreeSet<String> = names
        .query_map([], |row| row.get::<_, String>(0))?
        .filter(|name| name.as_ref().map_or(true, |name| !TABLES.contains(&name.as_str())))
        .collect::<Result<_, _>>()?;
    let functions: BTreeSet<&str> = FUNCTIONS.split_whitespace().collect();
    let refused = Refused::default();
    let noted = refused.clone();
    connection.authorizer(Some(move |context: AuthContext<'_>| match check(&context, &private, &functions) {
        Ok(()) => Authorization::Allow,
        Err(error) => {
            noted.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            Authorization::Deny
        }
    }))?;
    Ok(refused)
}

/// A refusal; `what` reads after "a query may not have".
pub(crate) fn refused(what: &str, short: &str) -> Error {
    let message = format!("a query is one read-only statement and may not have {what}");
    Error::new(Reason::QueryRefused, message).with("refused", short)
}

fn check(context: &AuthContext<'_>, private: &BTreeSet<String>, functions: &BTreeSet<&str>) -> Result<(), Error> {
    let short = match context.action {
        AuthAction::Select | AuthAction::Recursive => return Ok(()),
        AuthAction::Read { table_name, column_name } => {
            return check_read(table_name, column_name, context.accessor, private);
        }
        AuthAction::Function { function_name } => {
            return if functions.contains(function_name.to_ascii_lowercase().as_str()) {
                Ok(())
            } else {
                Err(refused(&format!("the function {function_name}"), &format!("function {function_name}")))
            };
        }
        AuthAction::Pragma { .. } => "PRAGMA",
        AuthAction::Attach { .. } => "ATTACH",
        AuthAction::Detach { .. } => "DETACH",
        AuthAction::Transaction { .. } => "a transaction of its own",
        AuthAction::Savepoint { .. } => "SAVEPOINT",
        AuthAction::Insert { table_name } if table_name.starts_with("sqlite_") => "a change of the schema",
        AuthAction::Insert { .. } => "INSERT",
        AuthAction::Update { .. } => "UPDATE",
        AuthAction::Delete { table_name } if table_name.starts_with("sqlite_") => "a change of the schema",
        AuthAction::Delete { .. } => "DELETE",
        AuthAction::Analyze { .. } => "ANALYZE",
        AuthAction::Reindex { .. } => "REINDEX",
        _ => "a change of the schema",
    };
    Err(refused(short, short))
}

fn check_read(table: &str, column: &str, through: Option<&str>, private: &BTreeSet<String>) -> Result<(), Error> {
    let same = |name: &&str| name.eq_ignore_ascii_case(table);
    let behind_view = table == BEHIND_VM_EVENTS && through == Some("vm_events");
    // A table of which no column is read may be one of the statement's own (WITH); then its name tells nothing.
    let own = column.is_empty()
        && !private.contains(&table.to_ascii_lowercase())
        && !["sqlite_", "pragma_", "dbstat"].iter().any(|prefix| table.to_ascii_lowercase().starts_with(prefix));
    if TABLES.iter().any(same) || behind_view || own {
        return Ok(());
    }
    Err(refused(&format!("the table {table}, which is not public (docs/SCHEMA.md has those that are)"), table))
}
