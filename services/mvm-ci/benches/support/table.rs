//! Results beside their baselines: a table for people, JSON for programs.

use std::{collections::BTreeMap, fs, path::Path};

/// One measurement.
pub struct Row {
    pub unit: &'static str,
    pub ours: f64,
    pub baseline: f64,
}

/// Measurements by what was measured.
pub type Table = BTreeMap<String, Row>;

/// Prints the table and writes `target/bench/NAME.json`: {metric: {ours, baseline, ratio}}.
pub fn print(table: &Table, name: &str) -> anyhow::Result<()> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/bench");
    fs::create_dir_all(&target)?;
    let mut json = serde_json::Map::new();
    println!("{:<52} {:>12} {:>12} {:>8}  unit", "metric", "ours", "baseline", "ratio");
    for (metric, row) in table {
        let ratio = row.ours / row.baseline;
        println!("{metric:<52} {:>12.2} {:>12.2} {ratio:>8.2}  {}", row.ours, row.baseline, row.unit);
        let value = serde_json::json!({"unit": row.unit, "ours": row.ours, "baseline": row.baseline, "ratio": ratio});
        json.insert(metric.clone(), value);
    }
    println!("(load average afterwards: {})", load_average());
    fs::write(target.join(format!("{name}.json")), serde_json::to_string_pretty(&json)?)?;
    Ok(())
}

/// What else the machine does.
pub fn load_average() -> String {
    fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned()
}

/// Of values in any order.
pub fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) * percent / 100]
}
