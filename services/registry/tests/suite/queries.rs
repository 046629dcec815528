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
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_sql_is_refused_or_cut_with_its_reason_while_changes_go_on() {
    let mut kit = Kit::start().await;
    let mut writer = kit.client.clone();
    let nested = format!("SELECT {}1{}", "(".repeat(5000), ")".repeat(5000));
    let many = "SELECT 1;".repeat(7000);
    let doubled: String = (1..40).map(|i| format!(", t{i} AS (SELECT a.x FROM t{0} a, t{0} b)", i - 1)).collect();
    let doubled = format!("WITH t0(x) AS (SELECT 1){doubled} SELECT count(*) FROM t39");
    for (query, reason) in [
        ("ATTACH '/tmp/x.db' AS x", "QUERY_REFUSED"),
        ("PRAGMA query_only = OFF", "QUERY_REFUSED"),
        ("SELECT * FROM pragma_table_info('vms')", "QUERY_REFUSED"),
        ("SELECT load_extension('/tmp/x.so')", "QUERY_REFUSED"),
        ("SELECT fts3_tokenizer('simple')", "QUERY_REFUSED"),
        ("WITH x AS (SELECT 1) DELETE FROM vms", "QUERY_REFUSED"),
        ("INSERT INTO purge_clock VALUES ('')", "QUERY_REFUSED"),
        ("UPDATE vms SET state = 'Failed'", "QUERY_REFUSED"),
        ("DELETE FROM vms WHERE state = 'Failed'", "QUERY_REFUSED"),
        ("DROP TABLE vms", "QUERY_REFUSED"),
        ("CREATE TABLE x (y)", "QUERY_REFUSED"),
        ("CREATE TEMP TABLE x (y)", "QUERY_REFUSED"),
        ("VACUUM INTO '/tmp/x.db'", "QUERY_REFUSED"),
        ("COMMIT", "QUERY_REFUSED"),
        ("SELECT 1; DROP TABLE vms", "QUERY_REFUSED"),
        (&many, "QUERY_REFUSED"),
        ("SELECT * FROM events", "QUERY_REFUSED"),
        ("SELECT * FROM sqlite_schema", "QUERY_REFUSED"),
        ("SELECT randomblob(50000000)", "QUERY_BUDGET_EXCEEDED"),
        (FOREVER, "QUERY_BUDGET_EXCEEDED"),
        (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT randomblob(500000) b FROM n ORDER BY b",
            "QUERY_BUDGET_EXCEEDED",
        ),
        (&nested, "INVALID_FIELD"),
        ("SELEC 1", "INVALID_FIELD"),
        ("-- nothing", "INVALID_FIELD"),
        (&"x".repeat(65_537), "INVALID_FIELD"),
    ] {
        let began = Instant::now();
        let result = ask(&mut kit.client, wire::QueryRequest { timeout_ms: 1000, ..sql(query) }).await;
        assert_eq!(refusal(result), reason, "{query:.80}");
        assert!(began.elapsed() < DEADLINE, "{query:.80}");
        writer.create_vm(create_vm(&uuid(), VmKind::Service)).await.unwrap();
    }
    let doubled = ask(&mut kit.client, wire::QueryRequest { timeout_ms: 1000, ..sql(&doubled) }).await.unwrap_err();
    assert!(
        ["QUERY_BUDGET_EXCEEDED", "INVALID_FIELD"].contains(&Error::from_status(&doubled).reason.name()),
        "{doubled}"
    );
    // More than any message may have: the transport's refusal.
    assert!(ask(&mut kit.client, sql(&"x".repeat(10_000_000))).await.is_err());
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
