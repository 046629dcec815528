//! SQL: what is answered, what is refused, what is cut.

use std::time::{Duration, Instant};

use blixard::{
    error::Error,
    pb::registry::v1::{self as wire, query_response::Message, sql_value::Value},
    vm::{VmKind, VmState},
};
use tonic::Status;

use crate::kit::{Client, Kit, create_vm, refusal, uuid};

const FOREVER: &str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";
const DEADLINE: Duration = Duration::from_secs(60);
/// Until when a query of half a second has ended, on a busy machine.
const OVERTIME: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Table {
    columns: Vec<(String, String)>,
    rows: Vec<Vec<Option<Value>>>,
    summary: wire::QuerySummary,
}

async fn ask(client: &mut Client, request: wire::QueryRequest) -> Result<Table, Status> {
    let mut stream = client.query(request).await?.into_inner();
    let (mut columns, mut rows) = (Vec::new(), Vec::new());
    while let Some(message) = stream.message().await? {
        match message.message.unwrap() {
            Message::Header(header) => {
                columns = header.columns.into_iter().map(|column| (column.name, column.declared_type)).collect();
            }
            Message::Rows(some) => {
                let values = |row: wire::QueryRow| row.values.into_iter().map(|value| value.value).collect();
                rows.extend(some.rows.into_iter().map(values));
            }
            Message::Summary(summary) => return Ok(Table { columns, rows, summary }),
        }
    }
    panic!("an answer without an end")
}

fn sql(sql: &str) -> wire::QueryRequest {
    wire::QueryRequest { sql: sql.into(), ..Default::default() }
}

fn text(value: &str) -> Option<Value> {
    Some(Value::Text(value.into()))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guides_queries_are_answered_with_names_types_and_parameters() {
    let mut kit = Kit::start().await;
    let id = kit.vm_in(VmKind::Service, VmState::Ready).await;
    let vms = ask(&mut kit.client, sql("SELECT id, state, node_id, created_at FROM vms;")).await.unwrap();
    assert_eq!(vms.columns[0], ("id".into(), "TEXT".into()));
    assert_eq!(vms.rows[0][..3], [text(&id), text("Ready"), text("node-1")]);
    let counts = ask(&mut kit.client, sql("SELECT state, COUNT(*) FROM vms GROUP BY state;")).await.unwrap();
    assert_eq!(counts.rows, [[text("Ready"), Some(Value::Integer(1))]]);
    let param = wire::SqlValue { value: text(&id) };
    let events = "SELECT * FROM vm_events WHERE vm_id = ? ORDER BY timestamp DESC";
    let request = wire::QueryRequest { params: vec![param], ..sql(events) };
    let events = ask(&mut kit.client, request).await.unwrap();
    assert_eq!((events.rows.len(), events.summary.rows), (2, 2));
    for query in [
        "SELECT id, config FROM vms WHERE state = 'Ready'",
        "SELECT COUNT(*) FROM vms WHERE state IN ('Ready', 'Busy')",
        "SELECT id, state, node_id FROM vms WHERE state = 'Failed'",
        "SELECT * FROM vms",
        "SELECT * FROM nodes",
        "SELECT id, state, exit_code, reason FROM jobs ORDER BY created_at DESC LIMIT 20",
        "SELECT vms.id, label.value FROM vms, json_each(vms.labels) AS label",
        "WITH n AS (SELECT 1) SELECT count(*) FROM n",
        "EXPLAIN QUERY PLAN SELECT * FROM vms WHERE state = 'Idle'",
    ] {
        ask(&mut kit.client, sql(query)).await.expect(query);
    }
    let missing = ask(&mut kit.client, sql("SELECT ?")).await;
    assert_eq!(refusal(missing), "INVALID_FIELD");
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_keep_their_types_and_answers_their_budgets() {
    let mut kit = Kit::start().await;
    let values = ask(&mut kit.client, sql("SELECT NULL, -7, 1.5, 'é', x'00ff'")).await.unwrap();
    let blob = Some(Value::Blob(vec![0, 255].into()));
    assert_eq!(values.rows, [[None, Some(Value::Integer(-7)), Some(Value::Real(1.5)), text("é"), blob]]);
    let many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 30000) SELECT i FROM n";
    let cut = ask(&mut kit.client, sql(many)).await.unwrap();
    assert_eq!((cut.rows.len(), cut.summary.cut()), (10_000, wire::QueryCut::Rows));
    let large =
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 50) SELECT zeroblob(1000000) FROM n";
    let cut = ask(&mut kit.client, sql(large)).await.unwrap();
    assert_eq!((cut.rows.len(), cut.summary.cut()), (16, wire::QueryCut::Bytes), "16 MiB of 50 MB");
    let whole = ask(&mut kit.client, wire::QueryRequest { max_bytes: 64 << 20, ..sql(large) }).await.unwrap();
    assert_eq!((whole.rows.len(), whole.summary.cut()), (50, wire::QueryCut::Unspecified));
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_no_query_is_refused_with_its_reason() {
    let mut kit = Kit::start().await;
    let many = "SELECT 1;".repeat(7000);
    for query in [
        "ATTACH '/tmp/x.db' AS x",
        "DETACH main",
        "PRAGMA query_only = OFF",
        "SELECT * FROM pragma_table_info('vms')",
        "SELECT load_extension('/tmp/x.so')",
        "SELECT fts3_tokenizer('simple')",
        "WITH x AS (SELECT 1) DELETE FROM vms",
        "WITH x AS (SELECT 1) INSERT INTO purge_clock SELECT * FROM x",
        "INSERT INTO purge_clock VALUES ('')",
        "UPDATE vms SET state = 'Failed'",
        "DELETE FROM vms WHERE state = 'Failed' RETURNING id",
        "DROP TABLE vms",
        "CREATE TABLE x (y)",
        "CREATE TEMP TABLE x (y)",
        "CREATE TEMP VIEW x AS SELECT * FROM events",
        "CREATE VIRTUAL TABLE temp.x USING dbstat",
        "VACUUM",
        "VACUUM INTO '/tmp/x.db'",
        "ANALYZE",
        "REINDEX",
        "BEGIN IMMEDIATE",
        "COMMIT",
        "SAVEPOINT x",
        "EXPLAIN DELETE FROM vms",
        "SELECT 1; DROP TABLE vms",
        &many,
        "SELECT * FROM events",
        "SELECT * FROM job_inputs",
        "SELECT count(*) FROM jobs JOIN job_inputs ON job_id = id",
        "SELECT * FROM leases",
        "SELECT * FROM requests",
        "SELECT * FROM sqlite_schema",
        "SELECT * FROM sqlite_sequence",
    ] {
        assert_eq!(refusal(ask(&mut kit.client, sql(query)).await), "QUERY_REFUSED", "{query:.80}");
    }
    let nested = format!("SELECT {}1{}", "(".repeat(5000), ")".repeat(5000));
    for query in [&nested, "SELECTED 1", "SELECT", "-- nothing", ";", "/* SELECT 1", "SELECT 'x", &"x".repeat(65_537)] {
        assert_eq!(refusal(ask(&mut kit.client, sql(query)).await), "INVALID_FIELD", "{query:.80}");
    }
    // More than any message may have: the transport's refusal.
    assert!(ask(&mut kit.client, sql(&"x".repeat(10_000_000))).await.is_err());
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_queries_end_in_time_with_the_budget_they_broke_while_changes_go_on() {
    let mut kit = Kit::start().await;
    let mut writer = kit.client.clone();
    let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)";
    // Both grow without end while SQLite compiles, where nothing of its own can stop it.
    let grown = |first: &str, next: &str| {
        let next = |i: i32| format!(", t{i} AS ({})", next.replace("before", &format!("t{}", i - 1)));
        format!("WITH t0 AS ({first}){} SELECT count(x) FROM t39", (1..40).map(next).collect::<String>())
    };
    let tables = grown("SELECT 1 AS x", "SELECT a.x FROM before a, before b");
    let sums = grown("SELECT vcpus AS x FROM vms", "SELECT x + x AS x FROM before");
    let text = "(SELECT hex(zeroblob(1000000)))";
    for (query, budgets) in [
        (FOREVER, &["time"][..]),
        (&format!("{endless} SELECT randomblob(500000) b FROM n ORDER BY b"), &["memory", "time"]),
        (&format!("{endless} SELECT count(DISTINCT randomblob(1000)) FROM n"), &["memory", "time"]),
        (&format!("{endless} SELECT group_concat(i) FROM n"), &["value", "time"]),
        (&format!("{endless} SELECT json_group_array(i) FROM n"), &["value", "time"]),
        (&format!("{endless} SELECT sum(a.i + b.i) FROM n a, n b, n c"), &["memory", "time"]),
        (&tables, &["memory", "time"]),
        (&sums, &["memory", "time"]),
        ("SELECT randomblob(50000000)", &["value"]),
        ("SELECT printf('%2000000000d', 1)", &["value"]),
        (&format!("SELECT replace({text}, '0', {text})"), &["value"]),
        (&format!("SELECT {text} || {text}"), &["value"]),
        (&format!("{endless} SELECT sum({text} LIKE printf('%.*c', 250, '%') || i) FROM n"), &["time"]),
        (&format!("{endless} SELECT sum({text} GLOB '*0*0*0*0*0*0*1' || i) FROM n"), &["time"]),
        (&format!("{endless} SELECT sum(length(replace({text} || i, '0', '1'))) FROM n"), &["time"]),
    ] {
        let began = Instant::now();
        let request = wire::QueryRequest { timeout_ms: 500, max_rows: 1, ..sql(query) };
        let error = Error::from_status(&ask(&mut kit.client, request).await.expect_err(query));
        assert_eq!(error.reason.name(), "QUERY_BUDGET_EXCEEDED", "{query:.80}: {error}");
        let budget = error.metadata["budget"].as_str();
        assert!(budgets.contains(&budget), "{query:.80} broke {budget}");
        assert!(began.elapsed() < OVERTIME, "{query:.80}");
        writer.create_vm(create_vm(&uuid(), VmKind::Service)).await.unwrap();
    }
    let error = ask(&mut kit.client, wire::QueryRequest { timeout_ms: 20_000, ..sql(&tables) }).await.unwrap_err();
    assert_eq!(Error::from_status(&error).metadata["budget"], "memory", "{error}");
    assert_eq!(ask(&mut kit.client, sql("SELECT count(*) FROM vms")).await.unwrap().rows, [[Some(Value::Integer(15))]]);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_queries_are_few_and_one_whose_client_left_frees_its_place() {
    let mut kit = Kit::start().await;
    let forever = || wire::QueryRequest { timeout_ms: 30_000, ..sql(FOREVER) };
    let mut running = Vec::new();
    for _ in 0..4 {
        let mut stream = kit.client.query(forever()).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap();
        running.push(stream);
    }
    assert_eq!(refusal(kit.client.query(sql("SELECT 1")).await), "OVERLOADED");
    kit.vm_in(VmKind::Service, VmState::Ready).await;
    running.pop();
    let began = Instant::now();
    while ask(&mut kit.client, sql("SELECT 1")).await.is_err() {
        assert!(began.elapsed() < DEADLINE / 3, "the place of a client that left is still taken");
        tokio::task::yield_now().await;
    }
    drop(running);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_columns_are_those_of_the_live_schema() {
    let mut kit = Kit::start().await;
    let page = include_str!("../../../../docs/SCHEMA.md");
    for section in page.split("\n## ").skip(1) {
        let (table, body) = section.split_once('\n').unwrap();
        let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
        let lines = body.lines().filter(|line| line.starts_with("| `")).map(cells);
        let base = |text: &str| text.split(' ').next().unwrap().to_owned();
        let documented: Vec<_> = lines.map(|line| (line[1].trim_matches('`').to_owned(), base(&line[2]))).collect();
        let live = ask(&mut kit.client, sql(&format!("SELECT * FROM {table}"))).await.unwrap().columns;
        assert_eq!(documented, live, "{table}");
    }
    kit.stop().await;
}
