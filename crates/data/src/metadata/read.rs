//! The three formats of metadata files, each read whole into records of named text values.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::DataError;

/// The named values of one row.
type Record = Vec<(String, String)>;

/// What a row holds, or what is wrong with it.
type Read = Result<Record, DataError>;

/// Reads a file in the format its extension names.
pub(super) fn records(path: &Path) -> Result<Vec<Read>, DataError> {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let parse = match extension.as_str() {
        "csv" => csv_records,
        "json" => json_records,
        "jsonl" => jsonl_records,
        _ => return Err(DataError::Format { path: path.into(), found: extension }),
    };
    let bytes = fs::read(path).map_err(DataError::io(path))?;
    let text =
        String::from_utf8(bytes).map_err(|fault| malformed(path, None, format!("not UTF-8: {fault}")))?;
    // Spreadsheets write a byte order mark; it is no part of the first column's name.
    parse(path, text.trim_start_matches('\u{feff}'))
}

fn csv_records(path: &Path, text: &str) -> Result<Vec<Read>, DataError> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().map_err(|fault| malformed(path, None, fault.to_string()))?.clone();
    if let Some(twice) =
        header.iter().enumerate().find(|(at, name)| header.iter().take(*at).any(|other| other == *name))
    {
        return Err(malformed(path, None, format!("column `{}` appears twice in the header", twice.1)));
    }
    let named =
        |record: csv::StringRecord| header.iter().zip(&record).map(|(n, v)| (n.into(), v.into())).collect();
    let rows = reader.records().zip(1..);
    let read = |(record, row): (csv::Result<csv::StringRecord>, usize)| {
        record.map(named).map_err(|fault| malformed(path, Some(row), csv_reason(&fault)))
    };
    Ok(rows.map(read).collect())
}

/// The csv crate's own message also numbers the records, from another start than ours.
fn csv_reason(fault: &csv::Error) -> String {
    match fault.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!(
                "found {len} values, expected {expected_len} as in the header\nhint: put values with commas into double quotes"
            )
        }
        _ => fault.to_string(),
    }
}

fn json_records(path: &Path, text: &str) -> Result<Vec<Read>, DataError> {
    let value: Value =
        serde_json::from_str(text).map_err(|fault| malformed(path, None, fault.to_string()))?;
    let Value::Array(rows) = value else {
        return Err(malformed(path, None, format!("found {}, expected a list of objects", kind(&value))));
    };
    let rows = rows.into_iter().zip(1..);
    Ok(rows
        .map(|(row, number)| object(row).map_err(|reason| malformed(path, Some(number), reason)))
        .collect())
}

fn jsonl_records(path: &Path, text: &str) -> Result<Vec<Read>, DataError> {
    let lines = text.lines().filter(|line| !line.trim().is_empty()).zip(1..);
    let parse = |line| serde_json::from_str(line).map_err(|fault| fault.to_string()).and_then(object);
    Ok(lines.map(|(line, row)| parse(line).map_err(|reason| malformed(path, Some(row), reason))).collect())
}

fn object(value: Value) -> Result<Record, String> {
    match value {
        Value::Object(fields) => Ok(fields_as_text(fields)),
        other => Err(format!("found {}, expected an object", kind(&other))),
    }
}

fn fields_as_text(fields: Map<String, Value>) -> Record {
    let present = fields.into_iter().filter(|(_, value)| !value.is_null());
    let text = |value| if let Value::String(text) = value { text } else { value.to_string() };
    present.map(|(name, value)| (name, text(value))).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn malformed(path: &Path, row: Option<usize>, reason: String) -> DataError {
    DataError::Malformed { path: path.into(), row, reason }
}
