//! `mvm-ci sql`.

use std::process::ExitCode;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use blixard::pb::registry::v1::{self as pb, query_response::Message, sql_value::Value as Sql};
use serde_json::{Map, Value};

use super::{
    args::SqlArgs,
    client::{Client, missing},
    failure::Failure,
    output::{self, Printer},
};

/// What a statement gave.
#[derive(Default)]
struct Answer {
    columns: Vec<String>,
    rows: Vec<Vec<Option<Sql>>>,
    cut: pb::QueryCut,
}

/// See the module.
pub(crate) async fn sql(client: Client, args: SqlArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    let request = pb::QueryRequest {
        sql: args.statement,
        params: args.param.iter().map(|text| param(text)).collect(),
        max_rows: args.max_rows.unwrap_or(0),
        ..Default::default()
    };
    let answer = ask(&client, request).await?;
    printer.print(|| json(&answer), || table(&answer))?;
    match answer.cut {
        pb::QueryCut::Unspecified => {}
        pb::QueryCut::Rows => eprintln!("cut after {} rows; there are more", answer.rows.len()),
        pb::QueryCut::Bytes => eprintln!("cut after {} rows: the answer is too large", answer.rows.len()),
    }
    Ok(ExitCode::SUCCESS)
}

/// A parameter is NULL, a number or text, as it would be in JSON; `'7'` is text.
fn param(text: &str) -> pb::SqlValue {
    let quoted = text.strip_prefix('\'').and_then(|text| text.strip_suffix('\''));
    let value = match (quoted, text.parse::<i64>(), text.parse::<f64>()) {
        (Some(quoted), ..) => Some(Sql::Text(quoted.to_owned())),
        _ if text == "NULL" => None,
        (_, Ok(number), _) => Some(Sql::Integer(number)),
        (_, _, Ok(number)) if number.is_finite() => Some(Sql::Real(number)),
        _ => Some(Sql::Text(text.to_owned())),
    };
    pb::SqlValue { value }
}

async fn ask(client: &Client, request: pb::QueryRequest) -> Result<Answer, Failure> {
    let mut stream = client.query(request).await?;
    let mut answer = Answer::default();
    while let Some(message) = stream.message().await? {
        match message.message {
            Some(Message::Header(header)) => {
                answer.columns = header.columns.into_iter().map(|column| column.name).collect();
            }
            Some(Message::Rows(rows)) => {
                let values = |row: pb::QueryRow| row.values.into_iter().map(|value| value.value).collect();
                answer.rows.extend(rows.rows.into_iter().map(values));
            }
            Some(Message::Summary(summary)) => {
                answer.cut = summary.cut();
                return Ok(answer);
            }
            None => {}
        }
    }
    Err(missing("summary").into())
}

fn table(answer: &Answer) -> String {
    let cell = |value: &Option<Sql>| match value {
        None => "NULL".to_owned(),
        Some(Sql::Integer(value)) => value.to_string(),
        Some(Sql::Real(value)) => format!("{value:?}"),
        Some(Sql::Text(text)) => text.clone(),
        Some(Sql::Blob(blob)) => STANDARD.encode(blob),
    };
    let heading: Vec<&str> = answer.columns.iter().map(String::as_str).collect();
    let rows: Vec<Vec<String>> = answer.rows.iter().map(|row| row.iter().map(cell).collect()).collect();
    output::table(&heading, &rows)
}

/// Objects by column name. Reals that JSON does not have (infinity) are null; a later column of the same name wins.
fn json(answer: &Answer) -> Value {
    let cell = |value: &Option<Sql>| match value {
        None => Value::Null,
        Some(Sql::Integer(value)) => (*value).into(),
        Some(Sql::Real(value)) => (*value).into(),
        Some(Sql::Text(text)) => text.clone().into(),
        Some(Sql::Blob(blob)) => STANDARD.encode(blob).into(),
    };
    let object = |row: &Vec<Option<Sql>>| -> Map<String, Value> {
        answer.columns.iter().cloned().zip(row.iter().map(cell)).collect()
    };
    answer.rows.iter().map(|row| Value::Object(object(row))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_for_people_and_for_programs() {
        let row = vec![None, Some(Sql::Integer(-7)), Some(Sql::Real(1.0)), Some(Sql::Blob(vec![0, 255].into()))];
        let columns = ["n", "i", "r", "b"].map(Into::into).to_vec();
        let answer = Answer { columns, rows: vec![row], ..Default::default() };
        assert_eq!(table(&answer), "n     i   r    b\nNULL  -7  1.0  AP8=\n");
        assert_eq!(json(&answer), serde_json::json!([{ "n": null, "i": -7, "r": 1.0, "b": "AP8=" }]));
    }

    #[test]
    fn parameters_have_the_type_they_look_like() {
        let of = |text: &str| param(text).value;
        assert_eq!(of("NULL"), None);
        assert_eq!(of("7"), Some(Sql::Integer(7)));
        assert_eq!(of("7.5"), Some(Sql::Real(7.5)));
        assert_eq!(of("'7'"), Some(Sql::Text("7".into())));
        assert_eq!(of("inf"), Some(Sql::Text("inf".into())));
        assert_eq!(of("Ready"), Some(Sql::Text("Ready".into())));
    }
}
