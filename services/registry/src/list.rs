//! Pages: filters, tokens and their limits.

use std::collections::BTreeMap;

use blixard::{
    error::{Error, invalid},
    limits,
    pb::common::v1 as pb,
    vm::VmState,
};
use hiqlite::rusqlite::{self, Connection, Row, ToSql, types::Value};
use prost::Message;

use crate::{
    mutation::names,
    read::newest_revision,
    rows::{JOB_COLUMNS, JobRow, NODE_COLUMNS, VM_COLUMNS, VmRow, maybe_vm_state, node, number, text, when},
};

/// Which list a token belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum List {
    Vms,
    Jobs,
    VmEvents,
    Nodes,
}

impl List {
    fn tag(self) -> char {
        match self {
            Self::Vms => 'v',
            Self::Jobs => 'j',
            Self::VmEvents => 'e',
            Self::Nodes => 'n',
        }
    }
}

/// What part of a list is wanted.
#[derive(Debug, Clone)]
pub(crate) struct PageRequest {
    size: usize,
    /// The last position of the page before.
    after: Option<Vec<u8>>,
}

impl PageRequest {
    /// Checks `page_size` and `page_token`.
    pub(crate) fn parse(list: List, size: u32, token: &str) -> Result<Self, Error> {
        if size > limits::MAX_PAGE_SIZE {
            return Err(invalid("page_size", size, &format!("0 to {}", limits::MAX_PAGE_SIZE)));
        }
        let size = if size == 0 { limits::DEFAULT_PAGE_SIZE } else { size };
        let after =
            match token {
                "" => None,
                token => Some(decode_token(list, token).ok_or_else(|| {
                    invalid("page_token", token, "the next_page_token of an answer to the same request")
                })?),
            };
        Ok(Self { size: size as usize, after })
    }

    /// Checks a request whose positions are revisions.
    pub(crate) fn parse_revision(list: List, size: u32, token: &str) -> Result<Self, Error> {
        let page = Self::parse(list, size, token)?;
        match &page.after {
            Some(bytes) if bytes.len() != 8 => {
                Err(invalid("page_token", token, "the next_page_token of an answer to the same request"))
            }
            _ => Ok(page),
        }
    }

    /// Rows from the newest on have revisions below this.
    fn before(&self) -> i64 {
        let bytes = self.after.as_deref().and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(i64::MAX, i64::from_be_bytes)
    }
}

/// Part of a list, and the revision that it shows.
#[derive(Debug)]
pub(crate) struct Page<T> {
    pub(crate) items: Vec<T>,
    pub(crate) next_page_token: String,
    pub(crate) revision: u64,
}

/// Conditions on rows, with their parameters.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    sql: String,
    params: Vec<Value>,
}

impl Filter {
    /// Only rows in one of these states; none: all.
    pub(crate) fn states(mut self, states: impl Iterator<Item = &'static str>) -> Self {
        let states = names(states);
        if !states.is_empty() {
            self.sql += &format!(" AND state IN ({states})");
        }
        self
    }

    /// Only rows whose column has this value; empty: all.
    pub(crate) fn equals(mut self, column: &str, value: &str) -> Self {
        if !value.is_empty() {
            self.params.push(Value::Text(value.to_owned()));
            // The first two parameters are the page's.
            self.sql += &format!(" AND {column} = ?{}", self.params.len() + 2);
        }
        self
    }

    /// Only rows with all of these labels.
    pub(crate) fn labels(mut self, labels: &BTreeMap<String, String>) -> Self {
        for (key, value) in labels {
            self.params.push(Value::Text(key.clone()));
            self.params.push(Value::Text(value.clone()));
            let (key, value) = (self.params.len() + 1, self.params.len() + 2);
            self.sql += &format!(
                " AND EXISTS (SELECT 1 FROM json_each(labels) AS label WHERE label.key = ?{key} AND label.value = ?{value})"
            );
        }
        self
    }
}

/// VMs, newest first.
pub(crate) fn vms(connection: &Connection, page: &PageRequest, filter: &Filter) -> rusqlite::Result<Page<pb::Vm>> {
    newest_first(connection, "vms", VM_COLUMNS, List::Vms, page, filter, |row| {
        let row = VmRow::read(row)?;
        Ok((row.created_revision, row.vm))
    })
}

/// Jobs, newest first.
pub(crate) fn jobs(connection: &Connection, page: &PageRequest, filter: &Filter) -> rusqlite::Result<Page<pb::Job>> {
    newest_first(connection, "jobs", JOB_COLUMNS, List::Jobs, page, filter, |row| {
        let row = JobRow::read(row)?;
        Ok((row.created_revision, row.job))
    })
}

fn newest_first<T: Message>(
    connection: &Connection,
    table: &str,
    columns: &str,
    list: List,
    page: &PageRequest,
    filter: &Filter,
    read: impl Fn(&Row<'_>) -> rusqlite::Result<(u64, T)>,
) -> rusqlite::Result<Page<T>> {
    // The inner select finds the page in an index; only its rows are then read whole.
    let sql = format!(
        "SELECT {columns} FROM {table} WHERE created_revision IN
             (SELECT created_revision FROM {table} WHERE created_revision < ?1 {}
              ORDER BY created_revision DESC LIMIT ?2)
         ORDER BY created_revision DESC",
        filter.sql
    );
    let mut params = vec![Value::Integer(page.before()), limit(page)];
    params.extend(filter.params.iter().cloned());
    let encode = |revision: u64| encode_token(list, &revision.to_be_bytes());
    cut(connection, &sql, &params, page, encode, read)
}

/// The history of one VM or, when `vm_id` is empty, of all, newest first.
pub(crate) fn vm_events(
    connection: &Connection,
    page: &PageRequest,
    vm_id: &str,
) -> rusqlite::Result<Page<pb::VmEvent>> {
    let filter = Filter::default().equals("entity_id", vm_id);
    let sql = format!(
        "SELECT revision, entity_id, timestamp, from_state, to_state, reason, job_id FROM events
         WHERE entity = 'vm' AND revision < ?1 {} ORDER BY revision DESC LIMIT ?2",
        filter.sql
    );
    let mut params = vec![Value::Integer(page.before()), limit(page)];
    params.extend(filter.params);
    let state = |state: Option<VmState>| state.map_or(pb::VmState::Unspecified, VmState::to_pb).into();
    let read = |row: &Row<'_>| {
        let event = pb::VmEvent {
            revision: number(row, 0)?,
            vm_id: row.get(1)?,
            timestamp: Some(when(row, 2)?),
            from_state: state(maybe_vm_state(row, 3)?),
            to_state: state(maybe_vm_state(row, 4)?),
            reason: row.get(5)?,
            job_id: text(row, 6)?,
        };
        Ok((event.revision, event))
    };
    let encode = |revision: u64| encode_token(List::VmEvents, &revision.to_be_bytes());
    cut(connection, &sql, &params, page, encode, read)
}

/// Nodes in the order of their ids.
pub(crate) fn nodes(connection: &Connection, page: &PageRequest) -> rusqlite::Result<Page<pb::Node>> {
    let sql = format!("SELECT {NODE_COLUMNS} FROM nodes WHERE id > ?1 ORDER BY id LIMIT ?2");
    let after = page.after.as_deref().map_or(String::new(), |bytes| String::from_utf8_lossy(bytes).into_owned());
    let read = |row: &Row<'_>| node(row).map(|node| (node.id.clone(), node));
    let encode = |id: String| encode_token(List::Nodes, id.as_bytes());
    cut(connection, &sql, &[Value::Text(after), limit(page)], page, encode, read)
}

/// One more than wanted, to know whether a page follows.
fn limit(page: &PageRequest) -> Value {
    Value::Integer(i64::try_from(page.size + 1).unwrap_or(i64::MAX))
}

/// Takes rows until the page is full, in number or in bytes. A row that is too large for any page still makes one.
fn cut<K, T: Message>(
    connection: &Connection,
    sql: &str,
    params: &[Value],
    page: &PageRequest,
    encode: impl Fn(K) -> String,
    read: impl Fn(&Row<'_>) -> rusqlite::Result<(K, T)>,
) -> rusqlite::Result<Page<T>> {
    let mut statement = connection.prepare_cached(sql)?;
    let params: Vec<&dyn ToSql> = params.iter().map(|value| value as &dyn ToSql).collect();
    let mut rows = statement.query(params.as_slice())?;
    let mut items = Vec::new();
    let mut last = None;
    let mut bytes = 0;
    let mut next_page_token = String::new();
    while let Some(row) = rows.next()? {
        let (key, item) = read(row)?;
        bytes += item.encoded_len();
        if items.len() == page.size || (bytes > limits::MAX_PAGE_BYTES && !items.is_empty()) {
            next_page_token = last.map(encode).unwrap_or_default();
            break;
        }
        last = Some(key);
        items.push(item);
    }
    Ok(Page { items, next_page_token, revision: newest_revision(connection)? })
}

/// Tokens are opaque to clients: the list's tag and the last position in hexadecimal.
fn encode_token(list: List, position: &[u8]) -> String {
    format!("{}{}", list.tag(), hex::encode(position))
}

fn decode_token(list: List, token: &str) -> Option<Vec<u8>> {
    hex::decode(token.strip_prefix(list.tag())?).ok().filter(|position| !position.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_another_list_and_damaged_ones_are_refused() {
        let token = encode_token(List::Vms, &7_u64.to_be_bytes());
        assert!(PageRequest::parse_revision(List::Vms, 0, &token).is_ok());
        for bad in [encode_token(List::Jobs, &7_u64.to_be_bytes()).as_str(), "v", "v0", "vzz", "vé1", "v07", "nonsense"]
        {
            let error = PageRequest::parse_revision(List::Vms, 0, bad).unwrap_err();
            assert_eq!(error.metadata.get("field").map(String::as_str), Some("page_token"), "{bad}");
        }
    }

    #[test]
    fn page_sizes_have_a_default_and_a_limit() {
        assert_eq!(PageRequest::parse(List::Vms, 0, "").unwrap().size, 100);
        assert_eq!(PageRequest::parse(List::Vms, 1000, "").unwrap().size, 1000);
        assert!(PageRequest::parse(List::Vms, 1001, "").is_err());
    }
}
